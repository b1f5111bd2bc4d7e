"""A network that fails, between a client and a port: connections that stand still, or are reset."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator

_CHUNK_BYTES = 65_536


class Relay:
    """Passes bytes both ways until it freezes (reads and passes on nothing more) or cuts (resets)."""

    def __init__(self, host: str, port: int):
        self._far = (host, port)
        self._tasks: list[asyncio.Task[None]] = []
        self._writers: list[asyncio.StreamWriter] = []
        self._flows = asyncio.Event()
        self._flows.set()

    def freeze(self) -> None:
        self._flows.clear()

    def thaw(self) -> None:
        self._flows.set()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._far)
        self._writers += [writer, far_writer]
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            self._tasks.append(asyncio.create_task(self._pass(source, sink)))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError), contextlib.closing(sink):
            while data := await source.read(_CHUNK_BYTES):
                await self._flows.wait()
                sink.write(data)


@contextlib.asynccontextmanager
async def relayed_port(
    port: int, *, far_host: str = "127.0.0.1", host: str = "127.0.0.1", listen: int = 0
) -> AsyncGenerator[tuple[Relay, str]]:
    """A relay before `far_host:port`, and the address it listens on."""
    relay = Relay(far_host, port)
    listener = await asyncio.start_server(relay.accept, host, listen)
    try:
        yield relay, f"{host}:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()
        await relay.close()
