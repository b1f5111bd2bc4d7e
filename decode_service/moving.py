"""Moving a stream to another decode worker: its blocks and tokens leave, nothing is computed again.

The step loop gives the stream up after a step. While it is MOVING its blocks are draining and nothing is computed; when
the other worker has claimed it, nothing of it stays here, otherwise it goes on here as if nothing had been.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from decode_service import messages
from decode_service.stream import AttachKey, Phase, Stream
from decode_service.streams import Streams
from isthmus.errors import IsthmusError
from isthmus.types import TransferTarget
from kv_transfer.coverage import clipped, extents
from kv_transfer.outgoing import TransferOutcome
from kv_transfer.sender import Sender


@dataclass(eq=False, slots=True)
class Mover:
    """Event loop only; `post` brings a call there from any thread. The sender starts with the first move."""

    streams: Streams
    open_sender: Callable[[], Sender]
    post: Callable[[Callable[[], None]], None]
    _sender: Sender | None = field(default=None, init=False)

    def move(self, stream: Stream, target: TransferTarget) -> None:
        """`Moved` follows, to whoever reads the stream then."""
        if stream.phase is not Phase.RUNNING:
            self._answer(stream, target, f"it is {stream.phase.value}")
            return

        handed_over = partial(self._send, stream, target, stream.attach)
        ended = partial(self._answer, stream, target, "it is not running any more")
        self.streams.step_loop.hand_over(stream, lambda was_here: self.post(handed_over if was_here else ended))

    def close(self) -> None:
        """What moves stays."""
        if self._sender is not None:
            self._sender.close()

    def _send(self, stream: Stream, target: TransferTarget, attach: AttachKey) -> None:
        stream.phase = Phase.MOVING
        if stream.ending is not None:  # the step loop had given it up before it heard of the end
            self.streams.end(stream, stream.ending)
            return
        if stream.attach != attach:
            self._go_on(stream, target, "attached by another router")
            return
        self.streams.context.failpoints.hit("decode.move_frozen")
        pool, layout = self.streams.engine.pool, self.streams.engine.layout
        num_rows = stream.num_prompt_tokens + len(stream.tokens) - 1
        blocks = list(stream.block_table)
        pool.begin_drain(blocks)  # its sends may read them after the stream has ended

        def on_done(outcome: TransferOutcome) -> None:
            pool.end_drain(blocks)
            self.post(partial(self._sent, stream, target, outcome))

        try:
            self._sender = self._sender or self.open_sender()
            wanted = replace(target, missing=clipped(target.missing, num_rows))
            stream.outgoing = self._sender.open(wanted, blocks, on_done, request_id=stream.request_id)
        except (IsthmusError, ValueError) as error:
            pool.end_drain(blocks)
            self._go_on(stream, target, str(error))
            return
        for rows in extents(layout, 0, num_rows):
            stream.outgoing.rows_ready(rows.plane, rows.layer, rows.first_token, rows.num_tokens)
        stream.outgoing.commit(*stream.tokens)

    def _sent(self, stream: Stream, target: TransferTarget, outcome: TransferOutcome) -> None:
        stream.outgoing = None
        if stream.phase is not Phase.MOVING:
            return  # it ended meanwhile
        if not outcome.acked:
            self._go_on(stream, target, outcome.failure)
            return
        self.streams.context.failpoints.hit("decode.before_release")
        self.streams.moved(stream)
        self._answer(stream, target, "")

    def _go_on(self, stream: Stream, target: TransferTarget, failure: str) -> None:
        stream.phase = Phase.RUNNING
        self.streams.step_loop.join(stream)
        self._answer(stream, target, failure)

    def _answer(self, stream: Stream, target: TransferTarget, failure: str) -> None:
        stream.sink.send(messages.moved(stream.request_id, target.transfer_id, failure))
