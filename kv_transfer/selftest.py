"""One real transfer over ZeroMQ through a sender and a receiver, into scratch memory: what readiness rests on."""

import hashlib
import queue
from contextlib import closing
from dataclasses import dataclass

from isthmus.clock import Clock
from isthmus.errors import TransferIncomplete
from isthmus.ids import Ids
from isthmus.kv.layout import KvLayout
from isthmus.ledger import Ledger
from isthmus.types import Extent, Place, Token, TransferTarget
from kv_transfer.coverage import extents
from kv_transfer.outgoing import TransferOutcome
from kv_transfer.pool_memory import PoolMemory
from kv_transfer.receiver import Receiver
from kv_transfer.receiver_events import ClaimedTransfer, FailedTransfer, TransferEvents
from kv_transfer.sender import Sender
from kv_transfer.sender_options import SenderOptions
from kv_transfer.transfers import Reservation

News = queue.SimpleQueue[ClaimedTransfer | FailedTransfer | TransferOutcome]

_NUM_BLOCKS = 2
_STAGING_BYTES = 8 * 2**20


def round_trip(layout: KvLayout, clock: Clock, ids: Ids, *, timeout_s: float = 5.0) -> None:
    """Two blocks of every plane and layer, sent and compared. Blocks the caller. Raises TransferIncomplete."""
    num_tokens = _NUM_BLOCKS * layout.block_size
    sizes = {place: num_tokens * layout.plane(place[0]).row_bytes for place in layout.places}
    source = {place: memoryview(_content(place, size)) for place, size in sizes.items()}
    landing = {place: memoryview(bytearray(size)) for place, size in sizes.items()}
    between = _Between(PoolMemory(layout, source), PoolMemory(layout, landing), clock, ids)
    _transfer(between, extents(layout, 0, num_tokens), timeout_s)
    if wrong := [place for place in sizes if source[place] != landing[place]]:
        raise TransferIncomplete(f"self-test: other bytes arrived in (plane, layer) {wrong[:4]}")


def _content(place: Place, num_bytes: int) -> bytearray:
    """Bytes without a pattern, of each place its own."""
    return bytearray(hashlib.shake_128(repr(place).encode()).digest(num_bytes))


@dataclass(frozen=True, slots=True)
class _Between:
    source: PoolMemory
    landing: PoolMemory
    clock: Clock
    ids: Ids


def _transfer(between: _Between, missing: tuple[Extent, ...], timeout_s: float) -> None:
    news: News = queue.SimpleQueue()
    clock = between.clock
    ids = between.ids
    table = tuple(range(_NUM_BLOCKS))
    transfer_id = ids.transfer_id()
    receiver_incarnation = ids.incarnation()
    events = TransferEvents(on_ready=news.put, on_failed=news.put)
    options = SenderOptions(staging_bytes=_STAGING_BYTES)
    receiving = Receiver(receiver_incarnation, between.landing, Ledger(clock, 16), events, clock).start()
    sending = Sender(ids.incarnation(), between.source, Ledger(clock, 16), clock, options=options).start()
    with closing(receiving) as receiver, closing(sending) as sender:
        deadline = clock.now() + 2 * timeout_s  # later than the wait below, so that silence has one answer
        receiver.reserve(Reservation(transfer_id, 1, "self-test", table, missing, deadline))
        fingerprint = between.source.layout.fingerprint
        target = TransferTarget(transfer_id, 1, receiver.endpoint, receiver_incarnation, fingerprint, missing)
        transfer = sender.open(target, table, news.put)
        for extent in missing:
            transfer.rows_ready(extent.plane, extent.layer, extent.first_token, extent.num_tokens)
        transfer.commit(Token(0))
        _expect_claim_and_ack(news, timeout_s)


def _expect_claim_and_ack(news: News, timeout_s: float) -> None:
    for _ in ("claimed by the receiver", "acknowledged to the sender"):
        try:
            what = news.get(timeout=timeout_s)
        except queue.Empty as error:
            raise TransferIncomplete(f"self-test: nothing came within {timeout_s} s") from error
        if isinstance(what, FailedTransfer):
            raise TransferIncomplete(f"self-test: {what.reason}")
        if isinstance(what, TransferOutcome) and not what.acked:
            raise TransferIncomplete(f"self-test: {what.failure}")
