"""Moving a stream to another decode worker: its blocks and tokens leave, nothing is computed again.

The step loop gives the stream up after a step. While it is MOVING its blocks are draining and nothing is computed. When
the other worker has claimed it, nothing of it stays here; otherwise it goes on here as if nothing had been.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from decode_service import messages
from decode_service.reader import AttachKey
from decode_service.step_messages import HandedOver, HandOver
from decode_service.stream import Phase, ServedStream
from decode_service.stream_run import StreamRun
from decode_service.streams import Streams
from isthmus.errors import IsthmusError
from isthmus.types import TransferTarget
from kv_transfer.coverage import clipped, extents
from kv_transfer.outgoing import TransferOutcome


@dataclass(frozen=True, slots=True)
class MoveOrder:
    """A router asked for this move."""

    stream: ServedStream
    target: TransferTarget
    attach: AttachKey  # of that router


@dataclass(eq=False, slots=True)
class Mover:
    """Called in the event loop alone."""

    streams: Streams
    _orders: dict[int, MoveOrder] = field(default_factory=dict[int, MoveOrder], init=False)  # wait for the step loop
    _tickets: Iterator[int] = field(default_factory=partial(itertools.count, 1), init=False)

    def move(self, stream: ServedStream, target: TransferTarget) -> None:
        """`Moved` follows, to whoever reads the stream then."""
        order = MoveOrder(stream, target, stream.reader.attach)
        if stream.phase is not Phase.RUNNING:
            self._answer(order, f"it is {stream.phase.value}")
            return
        ticket = next(self._tickets)
        self._orders[ticket] = order
        self.streams.ports.post(HandOver(stream.transfer_id, ticket))

    def handed_over(self, handed_over: HandedOver, now: float) -> None:
        """The step loop's answer; every token it computed was delivered before."""
        order = self._orders.pop(handed_over.ticket)
        if handed_over.run is None:
            self._answer(order, "it is not running any more")
            return
        stream = order.stream
        stream.take_back(handed_over.run)
        if stream.ending is not None:  # the step loop had given it up before it heard of the end
            self.streams.end(stream, stream.ending, now)
        elif stream.reader.attach != order.attach:
            self._go_on(order, "attached by another router", now)
        else:
            self.streams.instruments.failpoints.hit("decode.move_frozen")
            self._send(order, handed_over.run, now)

    def _send(self, order: MoveOrder, run: StreamRun, now: float) -> None:
        stream = order.stream
        pool = self.streams.engine.pool
        num_rows = stream.num_prompt_tokens + len(stream.tokens) - 1
        wanted = replace(order.target, missing=clipped(order.target.missing, num_rows))
        blocks = list(run.block_table)
        pool.begin_drain(blocks)  # its sends may read them after the stream has ended

        def on_done(outcome: TransferOutcome, done_at: float) -> None:
            pool.end_drain(blocks)
            self._sent(order, outcome, done_at)

        try:
            outgoing = self.streams.ports.sender.open(wanted, blocks, on_done, request_id=stream.request_id)
        except (IsthmusError, ValueError) as error:
            pool.end_drain(blocks)
            self._go_on(order, str(error), now)
            return
        stream.send_by(outgoing)
        for rows in extents(self.streams.engine.layout, 0, num_rows):
            outgoing.rows_ready(rows.plane, rows.layer, rows.first_token, rows.num_tokens)
        outgoing.commit(*stream.tokens)

    def _sent(self, order: MoveOrder, outcome: TransferOutcome, now: float) -> None:
        stream = order.stream
        stream.send_by(None)
        if stream.phase is not Phase.MOVING:
            return  # it ended meanwhile
        if not outcome.acked:
            self._go_on(order, outcome.failure, now)
            return
        self.streams.instruments.failpoints.hit("decode.before_release")
        self.streams.moved(stream, now)
        self._answer(order, "")

    def _go_on(self, order: MoveOrder, failure: str, now: float) -> None:
        self.streams.give_to_step_loop(order.stream, now)
        self._answer(order, failure)

    def _answer(self, order: MoveOrder, failure: str) -> None:
        answer = messages.moved(order.stream.request_id, order.target.transfer_id, failure)
        order.stream.reader.tell(answer)
