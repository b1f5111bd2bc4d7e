"""One request's stream on a decode worker, as this router holds it."""

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import Message

from isthmus.errors import AttachedElsewhere, IsthmusError, WorkersUnavailable
from isthmus.process.rpc_errors import typed_error
from isthmus.types import FinishReason
from isthmus.v1 import decode_pb2
from router.inbox import Event, Failed, Source

if TYPE_CHECKING:
    from router.session import Session

Answer = TypeVar("Answer")


@dataclass(eq=False, slots=True)
class DecodeStream:
    """Reserved or attached. Its messages reach `source` until `close`."""

    session: "Session"
    request_id: str
    counter: int  # of the attach: fences what an earlier attempt or router still says
    source: Source
    answer: asyncio.Future[decode_pb2.Reserved | decode_pb2.Attached]
    rearmed: asyncio.Future[decode_pb2.Rearmed] | None = None
    next_index: int = 0  # of the tokens heard
    is_claimed: bool = False  # decode has spoken: it has every block it needs
    is_cancelled: bool = False
    is_ended: bool = False  # nothing of it is left on the worker, or it is not this router's to end

    @property
    def reserved(self) -> decode_pb2.Reserved:
        answer = self.answer.result()
        assert isinstance(answer, decode_pb2.Reserved), "this stream was attached"
        return answer

    @property
    def attached(self) -> decode_pb2.Attached:
        answer = self.answer.result()
        assert isinstance(answer, decode_pb2.Attached), "this stream was reserved"
        return answer

    def end(self, finish_reason: FinishReason) -> None:
        """Tells the worker to free everything, once, unless it has done so. Never waits."""
        if not self.is_ended and not self.is_cancelled:
            self.is_cancelled = True
            self.session.send_cancel(self, finish_reason)

    def let_go(self) -> None:
        """The stream is not this router's to end: it ends by itself, or somebody else takes it up."""
        self.is_ended = True

    def close(self) -> None:
        self.source.close()
        self.session.forget(self)

    def take(self, said: Message) -> None:
        """The worker's word on this stream alone."""
        match said:
            case decode_pb2.Reserved() | decode_pb2.Attached():
                self.counter = said.attach.counter if isinstance(said, decode_pb2.Attached) else self.counter
                _answer(self.answer, said)
            case decode_pb2.Rearmed():
                _answer(self.rearmed, said)
            case decode_pb2.Refused():
                self.refuse(typed_error(said.reason, said.detail, retry_after_s=said.retry_after_ms / 1000 or None))
            case decode_pb2.StreamEnded():
                self.finish(said)
            case decode_pb2.Detached():
                if said.attach.router_incarnation != self.session.peer.router_incarnation:
                    self.finish(Failed(AttachedElsewhere("another call took the stream over")))
            case _:  # a failed transfer's reservation stays until its fill deadline: it can be rearmed
                if isinstance(said, decode_pb2.Moved) and said.acked:
                    self.is_ended = True
                self.source.put(said)

    def hear(self, tokens: decode_pb2.StreamTokens) -> None:
        self.is_claimed = True
        self.next_index = max(self.next_index, tokens.index + len(tokens.tokens))
        self.source.put(tokens)

    def finish(self, event: Event) -> None:
        """The worker holds nothing of it any more: as the answer when it was still asked, else as an event."""
        self.is_ended = True
        self.is_claimed = False
        if self.rearmed is not None and not self.rearmed.done():
            self.rearmed.set_exception(_error_of(event))
        if self.answer.done():
            self.source.put(event)
        else:
            self.answer.set_exception(_error_of(event))

    def refuse(self, error: IsthmusError) -> None:
        """What was asked last is refused: a rearm leaves the stream as it was, anything else ends it."""
        if self.rearmed is not None and not self.rearmed.done():
            self.rearmed.set_exception(error)
        else:
            self.finish(Failed(error))


def _answer(asked: asyncio.Future[Answer] | None, said: Answer) -> None:
    if asked is not None and not asked.done():
        asked.set_result(said)


def _error_of(event: Event) -> IsthmusError:
    return event.error if isinstance(event, Failed) else WorkersUnavailable("the stream ended before it was answered")
