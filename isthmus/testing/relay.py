"""A network that fails, between a client and a port: connections that stand still, or are reset."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator

_CHUNK_BYTES = 65_536


class Relay:
    """Passes bytes both ways between clients and one far port, until it is told to fail. For one event loop."""

    def __init__(self, host: str, port: int):
        self._far = (host, port)
        self._tasks: list[asyncio.Task[None]] = []
        self._writers: list[asyncio.StreamWriter] = []
        self._flows = asyncio.Event()
        self._flows.set()

    def freeze(self) -> None:
        """Passes on nothing more, but keeps every connection open."""
        self._flows.clear()

    def thaw(self) -> None:
        """Goes on, with what has arrived meanwhile."""
        self._flows.set()

    def cut(self) -> None:
        """Resets every connection."""
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
    """A relay before `far_host:port`, and the address on which it listens. `listen`: that port, 0 for a free one."""
    relay = Relay(far_host, port)
    listener = await asyncio.start_server(relay.accept, host, listen)
    try:
        yield relay, f"{host}:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()
        await relay.close()
