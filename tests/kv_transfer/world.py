"""A prefill side and a decode side in one process, joined by real ZeroMQ; pools whose every byte is known."""

import queue
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isthmus.clock import SystemClock
from isthmus.ids import SystemIds
from isthmus.kv.layout import KvLayout, Plane, PlaneKind
from isthmus.ledger import Ledger
from isthmus.types import Extent, Place, Token, TransferTarget
from kv_transfer.outgoing import OutgoingTransfer, TransferOutcome
from kv_transfer.pool_memory import PoolMemory
from kv_transfer.receiver import Receiver
from kv_transfer.receiver_events import ClaimedTransfer, FailedTransfer, ReceiverOptions, TransferEvents
from kv_transfer.sender import Sender
from kv_transfer.sender_options import SenderOptions
from kv_transfer.transfers import Reservation

POISON = 0xAB
LAYOUT = KvLayout(
    "model",
    (
        Plane("latent", PlaneKind.APPEND_ONLY, 3, 10, "fp32"),
        Plane("index", PlaneKind.APPEND_ONLY, 2, 3, "bf16"),
    ),
    block_size=16,
)
NUM_BLOCKS = 32
PLACES = LAYOUT.places


class Pool:
    """Blocks of every plane and layer, filled with one byte or at random."""

    def __init__(self, fill: int | None = None, seed: int = 0, layout: KvLayout = LAYOUT, num_blocks: int = NUM_BLOCKS):
        rng = np.random.default_rng(seed)
        self.rows: dict[Place, Any] = {}
        for plane in layout.planes:
            for layer in range(plane.num_layers):
                shape = (num_blocks * layout.block_size, plane.row_bytes)
                # Bytes below the poison, so that a poisoned byte is never a right one.
                self.rows[plane.name, layer] = (
                    rng.integers(0, POISON, shape, dtype=np.uint8) if fill is None else np.full(shape, fill, np.uint8)
                )
        self.layout = layout
        self.memory = PoolMemory(layout, {place: rows.reshape(-1).data for place, rows in self.rows.items()})

    def slots(self, block_table: list[int], first: int, end: int) -> list[int]:
        size = self.layout.block_size
        return [block_table[p // size] * size + p % size for p in range(first, end)]


def extents(first: int, end: int, places: list[Place] = PLACES) -> tuple[Extent, ...]:
    return tuple(Extent(plane, layer, first, end - first) for plane, layer in places)


def assert_moved(
    source: Pool, source_table: list[int], landing: Pool, landing_table: list[int], moved: tuple[Extent, ...]
) -> None:
    """Every row of `moved` is the source's, and no other byte of the landing pool lost its poison."""
    for place, rows in landing.rows.items():
        touched = np.zeros(len(rows), dtype=bool)
        for extent in moved:
            if extent.place == place:
                ours = source.slots(source_table, extent.first_token, extent.end)
                theirs = landing.slots(landing_table, extent.first_token, extent.end)
                np.testing.assert_array_equal(rows[theirs], source.rows[place][ours])
                touched[theirs] = True
        assert (rows[~touched] == POISON).all(), f"a byte outside the reservation was written in {place}"


@dataclass
class DecodeSide:
    """A receiver over a poisoned pool, and what it reported."""

    options: ReceiverOptions = field(default_factory=ReceiverOptions)
    pool: Pool = field(default_factory=lambda: Pool(POISON))
    incarnation: str = field(default_factory=SystemIds().incarnation)
    news: "queue.SimpleQueue[ClaimedTransfer | FailedTransfer]" = field(default_factory=queue.SimpleQueue)

    def __enter__(self) -> "DecodeSide":
        self.ledger = Ledger(SystemClock())
        events = TransferEvents(on_ready=self.news.put, on_failed=self.news.put)
        receiver = Receiver(self.incarnation, self.pool.memory, self.ledger, events, SystemClock(), self.options)
        self.receiver = receiver.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.receiver.close()

    def reserve(
        self, table: list[int], missing: tuple[Extent, ...], fill_s: float = 10.0, open_from: int | None = None
    ) -> TransferTarget:
        transfer_id = SystemIds().transfer_id()
        deadline = time.monotonic() + fill_s
        self.receiver.reserve(Reservation(transfer_id, 1, "request", tuple(table), missing, deadline, open_from))
        return self.target(transfer_id, 1, missing)

    def target(self, transfer_id: str, attempt: int, missing: tuple[Extent, ...]) -> TransferTarget:
        layout = self.pool.layout.fingerprint
        return TransferTarget(transfer_id, attempt, self.receiver.endpoint, self.incarnation, layout, missing)

    def next(self, timeout_s: float = 10.0) -> ClaimedTransfer | FailedTransfer:
        return self.news.get(timeout=timeout_s)

    def quiet(self) -> bool:
        return self.news.empty()


def started_sender(memory: PoolMemory, options: SenderOptions | None = None) -> Sender:
    return Sender(SystemIds().incarnation(), memory, Ledger(SystemClock()), SystemClock(), options=options).start()


@dataclass
class PrefillSide:
    sender: Sender
    pool: Pool

    def send(self, target: TransferTarget, table: list[int]) -> "Sending":
        outcomes: queue.SimpleQueue[TransferOutcome] = queue.SimpleQueue()
        return Sending(self.sender.open(target, table, outcomes.put), outcomes)


@dataclass
class Sending:
    transfer: OutgoingTransfer
    outcomes: "queue.SimpleQueue[TransferOutcome]"

    def all_rows(self, num_tokens: int, step: int = 64) -> "Sending":
        """Layer after layer, tile after tile, as a prefill pass makes them."""
        for first in range(0, num_tokens, step):
            for plane, layer in PLACES:
                self.transfer.rows_ready(plane, layer, first, min(step, num_tokens - first))
        return self

    def commit(self) -> "Sending":
        self.transfer.commit(Token(7, -0.25, ((7, -0.25), (3, -2.0))))
        return self

    def outcome(self, timeout_s: float = 10.0) -> TransferOutcome:
        outcome = self.outcomes.get(timeout=timeout_s)
        assert self.outcomes.empty(), "on_done was called twice"
        return outcome


def shuffled(seed: int, num: int) -> list[int]:
    return [int(block) for block in np.random.default_rng(seed).permutation(NUM_BLOCKS)[:num]]


def wait_until(condition: Any, timeout_s: float = 5.0) -> None:
    """For counters and threads, which announce nothing."""
    deadline, pause = time.monotonic() + timeout_s, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        pause.wait(0.002)


class SettableClock:
    """Time is what the test says."""

    def __init__(self, now: float = 100.0):
        self.time = now

    def now_ns(self) -> int:
        return round(self.time * 1e9)

    def now(self) -> float:
        return self.time
