"""What a local stack consists of: its children, their commands, and addresses that stay the same over restarts."""

import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from isthmus.cli import redis_server
from isthmus.process.rpc import bound_socket

HOST = "127.0.0.1"
_MODULES = {"router": "router", "prefill": "prefill_service", "decode": "decode_service"}


@dataclass(frozen=True, slots=True)
class StackSpec:
    """What the user asked for."""

    num_prefill: int = 1
    num_decode: int = 1
    num_routers: int = 1
    model: str = "bundled"
    dtype: str = "fp32"
    device: str = "cpu"
    block_size: int = 16
    context_length: int | None = None
    cache_bytes: str | None = None
    router_port: int = 0  # of the first router; 0: a free one
    redis_url: str | None = None  # None: a server of our own
    restart: bool = True
    ready_timeout_s: float = 60.0
    log_level: str = "info"


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """One process of the stack; it answers gRPC health at `grpc`, or Redis PING at `address`."""

    name: str
    role: str  # router | prefill | decode | redis
    command: tuple[str, ...]
    grpc: str | None = None
    zmq: str | None = None
    http: str | None = None
    address: str | None = None

    @property
    def addresses(self) -> dict[str, str]:
        fields = {"grpc": self.grpc, "address": self.address, "zmq": self.zmq, "http": self.http}
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(slots=True)
class Ports:
    """Free ports that stay ours: bound, never listening, so nobody else is given them while our children may bind them.

    Linux lets two sockets with SO_REUSEADDR share a port as long as at most one listens; the children all set it.
    """

    _held: list[socket.socket] = field(default_factory=list[socket.socket])

    def take(self, port: int = 0, setting: str = "grpc_port") -> int:
        """Raises CannotStart naming `setting` when a given port is taken."""
        held = bound_socket(HOST, port, setting)
        self._held.append(held)
        return int(held.getsockname()[1])

    def close(self) -> None:
        for held in self._held:
            held.close()
        self._held.clear()


def plan(spec: StackSpec, ports: Ports, state_dir: Path) -> list[ChildSpec]:
    """Redis first, then the others in the order they are shown. Raises CannotStart."""
    children: list[ChildSpec] = []
    redis_url = spec.redis_url
    if redis_url is None:
        redis_port = ports.take()
        redis_url = f"redis://{HOST}:{redis_port}/0"
        command = redis_server.command(redis_port, state_dir / "redis")
        children.append(ChildSpec("redis", "redis", command, address=f"{HOST}:{redis_port}"))
    counts = {"router": spec.num_routers, "prefill": spec.num_prefill, "decode": spec.num_decode}
    for role, count in counts.items():
        for index in range(count):
            asked_port = spec.router_port if (role, index) == ("router", 0) else 0
            children.append(
                _service(spec, role, f"{role}-{index}", redis_url, _Addresses.take(ports, role, asked_port))
            )
    return children


@dataclass(frozen=True, slots=True)
class _Addresses:
    grpc: int
    http: int
    zmq: int | None

    @classmethod
    def take(cls, ports: Ports, role: str, grpc_port: int) -> "_Addresses":
        return cls(ports.take(grpc_port, "router_port"), ports.take(), ports.take() if role == "decode" else None)


def _service(spec: StackSpec, role: str, name: str, redis_url: str, ports: _Addresses) -> ChildSpec:
    flags = {
        "--name": name,
        "--host": HOST,
        "--grpc-port": ports.grpc,
        "--http-port": ports.http,
        "--redis-url": redis_url,
        "--model": spec.model,
        "--log-level": spec.log_level,
    }
    if spec.context_length is not None:
        flags["--context-length"] = spec.context_length
    if role != "router":
        flags |= {"--dtype": spec.dtype, "--device": spec.device, "--block-size": spec.block_size}
    if role != "router" and spec.cache_bytes is not None:
        flags["--cache-bytes"] = spec.cache_bytes
    if ports.zmq is not None:
        flags["--zmq-port"] = ports.zmq
    return ChildSpec(
        name,
        role,
        (sys.executable, "-m", _MODULES[role], *_flat(flags)),
        grpc=f"{HOST}:{ports.grpc}",
        zmq=None if ports.zmq is None else f"tcp://{HOST}:{ports.zmq}",
        http=f"{HOST}:{ports.http}",
    )


def _flat(flags: Mapping[str, object]) -> Sequence[str]:
    return [word for flag, value in flags.items() for word in (flag, str(value))]
