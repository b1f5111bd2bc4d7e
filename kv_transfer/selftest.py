"""One real transfer over ZeroMQ through a sender and a receiver, into scratch memory: what readiness rests on."""

import queue
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from isthmus.errors import TransferIncomplete
from isthmus.ids import new_incarnation, new_transfer_id
from isthmus.kv_layout import KvLayout
from isthmus.ledger import Ledger
from isthmus.types import Extent, Token, TransferTarget
from kv_transfer.courier import SenderOptions
from kv_transfer.events import ClaimedTransfer, FailedTransfer, ReceiverOptions, TransferEvents
from kv_transfer.outgoing import TransferOutcome
from kv_transfer.pool_memory import PoolMemory
from kv_transfer.receiver import Receiver
from kv_transfer.sender import Sender
from kv_transfer.transfers import Reservation

_NUM_BLOCKS = 2
_STAGING_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class RoundTrip:
    seconds: float
    num_bytes: int


def round_trip(layout: KvLayout, *, host: str = "127.0.0.1", timeout_s: float = 5.0) -> RoundTrip:
    """Two blocks of every plane and layer, sent and compared. Blocks the caller. Raises TransferIncomplete."""
    rng = np.random.default_rng()
    sizes = {
        (number, layer): _NUM_BLOCKS * layout.block_size * plane.row_bytes
        for number, plane in enumerate(layout.planes)
        for layer in range(plane.num_layers)
    }
    source = {place: rng.integers(0, 256, size, dtype=np.uint8) for place, size in sizes.items()}
    landing = {place: np.zeros(size, dtype=np.uint8) for place, size in sizes.items()}
    begin = time.perf_counter()
    _transfer(layout, _memory(layout, source), _memory(layout, landing), host, timeout_s)
    seconds = time.perf_counter() - begin
    wrong = [place for place in sizes if not np.array_equal(source[place], landing[place])]
    if wrong:
        raise TransferIncomplete(f"self-test: other bytes arrived in (plane, layer) {wrong[:4]}")
    return RoundTrip(seconds, sum(sizes.values()))


def _transfer(layout: KvLayout, source: PoolMemory, landing: PoolMemory, host: str, timeout_s: float) -> None:
    news: queue.SimpleQueue[ClaimedTransfer | FailedTransfer | TransferOutcome] = queue.SimpleQueue()
    extents = tuple(
        Extent(number, layer, 0, _NUM_BLOCKS * layout.block_size)
        for number, plane in enumerate(layout.planes)
        for layer in range(plane.num_layers)
    )
    table, transfer_id, receiver_incarnation = tuple(range(_NUM_BLOCKS)), new_transfer_id(), new_incarnation()
    events = TransferEvents(on_ready=news.put, on_failed=news.put)
    receiving = Receiver(receiver_incarnation, landing, Ledger(16), events, options=ReceiverOptions(host=host))
    sending = Sender(new_incarnation(), source, Ledger(16), options=SenderOptions(staging_bytes=_STAGING_BYTES))
    with receiving as receiver, sending as sender:
        receiver.reserve(Reservation(transfer_id, 1, "self-test", table, extents, time.monotonic() + timeout_s))
        target = TransferTarget(transfer_id, 1, receiver.endpoint, receiver_incarnation, layout.fingerprint, extents)
        transfer = sender.open(target, table, news.put)
        for extent in extents:
            transfer.rows_ready(extent.plane, extent.layer, extent.first_token, extent.num_tokens)
        transfer.commit(Token(0))
        _expect_claim_and_ack(news, timeout_s)


def _expect_claim_and_ack(
    news: "queue.SimpleQueue[ClaimedTransfer | FailedTransfer | TransferOutcome]", timeout_s: float
) -> None:
    for _ in ("claimed by the receiver", "acknowledged to the sender"):
        try:
            what = news.get(timeout=timeout_s)
        except queue.Empty as error:
            raise TransferIncomplete(f"self-test: nothing came within {timeout_s} s") from error
        if isinstance(what, FailedTransfer):
            raise TransferIncomplete(f"self-test: {what.reason}")
        if isinstance(what, TransferOutcome) and not what.acked:
            raise TransferIncomplete(f"self-test: {what.failure}")


def _memory(layout: KvLayout, rows: Mapping[tuple[int, int], npt.NDArray[np.uint8]]) -> PoolMemory:
    return PoolMemory(layout, {place: array.data for place, array in rows.items()})
