"""What reaches one request from its workers: events in order of arrival, from sources that can be closed; its stream.

A core: nothing here waits. A routine is woken when something has come for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from google.protobuf.message import Message

from isthmus.errors import AttachedElsewhere, IsthmusError, WorkersUnavailable
from isthmus.process.rpc_errors import typed_error
from isthmus.routine import Answer, Routine
from isthmus.types import FinishReason
from isthmus.v1 import decode_pb2

MAX_BUFFERED_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Failed:
    """The source can do no more for this attempt."""

    error: IsthmusError
    has_others: bool = False  # a worker was lost, and other requests with it


# The workers' own messages, passed on as they came.
WorkerEvent = Message | Failed


class Arrival(NamedTuple):
    at: float  # on the router's clock
    source: "Source"
    event: WorkerEvent


class Inbox:
    """Events in order of arrival. One routine takes them, and is woken; anybody puts them, through a source.

    Bounded by tokens (other events are a handful a request): a put beyond the bound drops the tokens and calls
    `on_overflow`, because a request whose client does not read must not grow, nor slow down its neighbours.
    """

    def __init__(self, wake: Callable[[], None], on_overflow: Callable[[], None], *, max_tokens: int):
        self.wake = wake
        self._on_overflow = on_overflow
        self._max_tokens = max_tokens
        self._arrivals: list[Arrival] = []
        self._num_tokens = 0

    @property
    def has_any(self) -> bool:
        return bool(self._arrivals)

    def put(self, arrival: Arrival) -> None:
        if isinstance(arrival.event, decode_pb2.StreamTokens):
            self._num_tokens += len(arrival.event.tokens)
            if self._num_tokens > self._max_tokens:
                self._on_overflow()
                return
        self._arrivals.append(arrival)
        self.wake()

    def take(self) -> list[Arrival]:
        """Everything that has arrived; events of a source closed meanwhile are left out."""
        arrivals = self._arrivals
        self._arrivals = []
        self._num_tokens = 0
        return [arrival for arrival in arrivals if arrival.source.is_open]


@dataclass(eq=False, slots=True)
class Source:
    """One worker's way into an inbox: its events are known by it, and end with it."""

    inbox: Inbox
    is_open: bool = True

    def put(self, event: WorkerEvent, at: float) -> None:
        if self.is_open:
            self.inbox.put(Arrival(at, self, event))

    def wake(self) -> None:
        """Something of this worker's has come that is no event: an answer."""
        self.inbox.wake()

    def close(self) -> None:
        """Nothing of this source is heard any more, what waits in the inbox included."""
        self.is_open = False


StreamAnswer = decode_pb2.Reserved | decode_pb2.Attached | IsthmusError


class StreamSession(Protocol):
    """The session that a stream belongs to, as the stream needs it."""

    @property
    def router_incarnation(self) -> str: ...

    def send_cancel(self, stream: "DecodeStream", finish_reason: FinishReason) -> None: ...

    def rearm(self, stream: "DecodeStream", attempt: int, fill_timeout_s: float, now: float) -> None: ...

    def send_move(self, stream: "DecodeStream", target: decode_pb2.Reserved, now: float) -> None: ...

    def forget(self, stream: "DecodeStream") -> None: ...


@dataclass(eq=False, slots=True)
class DecodeStream:
    """One request's stream on a decode worker, as this router holds it: reserved or attached.

    Written by its own methods, which its session and its request's routine call. Its messages reach `source` until
    `close`.
    """

    session: StreamSession
    request_id: str
    counter: int  # of the attach: fences what an earlier attempt or router still says
    source: Source
    answer: Answer[StreamAnswer]
    rearmed: Answer[decode_pb2.Rearmed | IsthmusError] | None = None
    next_index: int = 0  # of the tokens heard
    is_claimed: bool = False  # decode has spoken: it has every block it needs
    is_cancelled: bool = False
    is_ended: bool = False  # nothing of it is left on the worker, or it is not this router's to end

    def ask_to_rearm(self) -> None:
        """The answer, Rearmed or a refusal, is awaited from now on."""
        self.rearmed = Answer(self.source.wake)

    def stop_asking(self) -> None:
        """Nobody waits for the answer to a rearm."""
        self.rearmed = None

    @property
    def reserved(self) -> decode_pb2.Reserved:
        assert isinstance(self.answer.value, decode_pb2.Reserved), "this stream was attached"
        return self.answer.value

    @property
    def attached(self) -> decode_pb2.Attached:
        assert isinstance(self.answer.value, decode_pb2.Attached), "this stream was reserved"
        return self.answer.value

    async def refusal(self, routine: Routine, until: float) -> IsthmusError | None:
        """Waits for the answer; None: the worker holds the stream for this router."""
        if not await routine.wait_for(lambda: self.answer.has_come, until):
            return WorkersUnavailable("the decode worker did not answer in time")
        return self.answer.value if isinstance(self.answer.value, IsthmusError) else None

    def end(self, finish_reason: FinishReason, *, forgets_kept: bool = False) -> None:
        """Tells the worker to free everything, once, unless it has done so. Never waits.

        What the worker keeps of an ended stream, for whoever resumes it, stays there unless `forgets_kept`.
        """
        if not self.is_cancelled and (forgets_kept or not self.is_ended):
            self.is_cancelled = True
            self.session.send_cancel(self, finish_reason)

    def let_go(self) -> None:
        """The stream is not this router's to end: it ends by itself, or somebody else takes it up."""
        self.is_ended = True

    def take(self, said: Message, now: float) -> None:
        """The worker's word on this stream alone."""
        match said:
            case decode_pb2.Reserved() | decode_pb2.Attached():
                self.counter = said.attach.counter if isinstance(said, decode_pb2.Attached) else self.counter
                self.answer.put(said)
            case decode_pb2.Rearmed():
                if self.rearmed is not None:
                    self.rearmed.put(said)
            case decode_pb2.Refused():
                self.refuse(
                    typed_error(said.reason, said.detail, retry_after_s=said.retry_after_ms / 1000 or None), now
                )
            case decode_pb2.StreamEnded():
                self.finish(said, now)
            case decode_pb2.Detached():
                if said.attach.router_incarnation != self.session.router_incarnation:
                    self.finish(Failed(AttachedElsewhere("another call took the stream over")), now)
            case _:  # a failed transfer's reservation stays until its fill deadline: it can be rearmed
                if isinstance(said, decode_pb2.Moved) and said.acked:
                    self.is_ended = True
                self.source.put(said, now)

    def hear(self, tokens: decode_pb2.StreamTokens, now: float) -> None:
        self.is_claimed = True
        self.next_index = max(self.next_index, tokens.index + len(tokens.tokens))
        self.source.put(tokens, now)

    def finish(self, event: WorkerEvent, now: float) -> None:
        """The worker holds nothing of it any more: as the answer when it was still asked, else as an event."""
        self.is_ended = True
        self.is_claimed = False
        if self.rearmed is not None:
            self.rearmed.put(_error_of(event))
        if self.answer.has_come:
            self.source.put(event, now)
        else:
            self.answer.put(_error_of(event))

    def refuse(self, error: IsthmusError, now: float) -> None:
        """What was asked last is refused: a rearm leaves the stream as it was, anything else ends it."""
        if self.rearmed is not None and not self.rearmed.has_come:
            self.rearmed.put(error)
        else:
            self.finish(Failed(error), now)


def _error_of(event: WorkerEvent) -> IsthmusError:
    return event.error if isinstance(event, Failed) else WorkersUnavailable("the stream ended before it was answered")
