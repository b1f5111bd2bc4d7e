"""Writes verified rows into the pool, large bodies beside the receiver's thread: it verifies the next frame meanwhile."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from kv_transfer.frames import FrameHeader
from kv_transfer.pool_memory import PoolMemory
from kv_transfer.transfers import Accept

_INLINE_BYTES = 256 * 2**10  # below, handing over costs more than the copy


class Write(NamedTuple):
    """A verified frame whose rows are being written."""

    link: bytes
    header: FrameHeader
    accept: Accept
    done: "Future[None]"


class RowWriter:
    """At most one write is under way; the receiver's thread starts it and takes it back."""

    def __init__(self, memory: PoolMemory):
        self._memory = memory
        self._helper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-writer")

    def start(self, link: bytes, header: FrameHeader, accept: Accept, body: memoryview) -> Write:
        if header.body_bytes >= _INLINE_BYTES and accept.gaps:
            return Write(link, header, accept, self._helper.submit(self._write, header, accept, body))
        self._write(header, accept, body)
        done: Future[None] = Future()
        done.set_result(None)
        return Write(link, header, accept, done)

    def close(self) -> None:
        self._helper.shutdown()

    def _write(self, header: FrameHeader, accept: Accept, body: memoryview) -> None:
        place, table = (header.plane, header.layer), accept.transfer.reservation.block_table
        row_bytes = self._memory.row_bytes(header.plane)
        for first, end in accept.gaps:
            self._memory.write_rows(place, table, (first, end), body[(first - header.first_token) * row_bytes :])
