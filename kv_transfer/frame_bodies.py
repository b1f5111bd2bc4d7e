"""Memory that frames are sent from: rows where they lie, or staging; and when a wire has let go of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from isthmus.types import Extent
from kv_transfer.frames import Buffer
from kv_transfer.link import InFlight
from kv_transfer.outgoing_state import OutgoingState
from kv_transfer.pool_memory import RowMemory
from kv_transfer.staging import Staging, StagingSlot

_ORPHAN_S = 0.005


@dataclass(frozen=True, slots=True)
class FrameBody:
    """The rows of one frame, contiguous."""

    bytes: Buffer
    slot: StagingSlot | None  # None: they lie in the pool


class FrameBodies:
    """Written by `sender_core.SenderCore` only."""

    def __init__(self, memory: RowMemory, staging_bytes: int):
        self._memory = memory
        self._staging = Staging(staging_bytes)
        self._orphans: list[InFlight] = []  # frames of closed wires that may still be read

    def next_look(self, now: float) -> float:
        """When to call `free_orphans` again: no wire tells when it has let go."""
        return now + _ORPHAN_S if self._orphans else inf

    def take(self, transfer: OutgoingState, rows: Extent) -> FrameBody | None:
        """None while staging has no room."""
        interval = (rows.first_token, rows.end)
        table = transfer.opened.block_table
        where_it_lies = self._memory.contiguous(rows.place, table, interval)
        if where_it_lies is not None:
            return FrameBody(where_it_lies, None)
        slot = self._staging.acquire(rows.num_tokens * self._memory.row_bytes(rows.plane))
        if slot is None:
            return None
        self._memory.read_rows(rows.place, table, interval, slot.view)
        return FrameBody(slot.view, slot)

    def give_back(self, body: FrameBody) -> None:
        """It was not sent."""
        if body.slot is not None:
            self._staging.release(body.slot)

    def let_go(self, frame: InFlight) -> None:
        """No wire reads the frame's memory any more."""
        if frame.slot is None:
            frame.transfer.num_borrowed -= 1
        else:
            self._staging.release(frame.slot)

    def orphan(self, frames: Iterable[InFlight]) -> None:
        """Their wire is closed, and may still read them."""
        self._orphans.extend(frames)

    def free_orphans(self, *, all_closed: bool = False) -> list[OutgoingState]:
        """Lets go of what is read no more, and names the transfers. `all_closed`: no wire is left to read anything."""
        done = [frame for frame in self._orphans if all_closed or frame.reading.done]
        kept = [frame for frame in self._orphans if not all_closed and not frame.reading.done]
        self._orphans = kept
        for frame in done:
            self.let_go(frame)
        return [frame.transfer for frame in done]
