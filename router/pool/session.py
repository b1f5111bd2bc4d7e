"""One session with one decode worker, as a core: what every stream this router has there was told and has said.

    AWAY --hello--> ALIVE --connection breaks, both ends alive--> AWAY, streams wait for the next hello (a blip)
                      +------ silent, given up, hello refused ---> AWAY, streams are lost

A connection that breaks is made again at once: the same incarnation goes on with the streams where this router heard
them last. Otherwise they are lost here, and the next hello tells the worker so by not naming them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from google.protobuf.message import Message

from isthmus.convert import finish_reason_to_proto
from isthmus.errors import AttachedElsewhere, WorkerLost, WorkersUnavailable
from isthmus.log import get_logger
from isthmus.routine import Answer
from isthmus.types import FinishReason
from isthmus.v1 import decode_pb2
from router.pool.decode_stream import DecodeStream, Failed, Source
from router.pool.policy import NO_NEW_WORK_S

HELLO_TIMEOUT_S = 2.0
BLIP_TIMEOUT_S = 0.5  # to come back to the streams of a lost connection: a worker keeps them a little longer
ANSWER_TIMEOUT_S = 2.0  # to a reservation, an attach or a rearm
FIRST_BACKOFF_S = 0.05
LAST_BACKOFF_S = 1.0
_log = get_logger("router.session")


@dataclass(frozen=True, slots=True)
class SessionPeer:
    """Both ends of a session."""

    router_incarnation: str
    decode_incarnation: str
    decode_name: str


class SessionLink(Protocol):
    """The connection that carries a session; its driver calls the session back. Nothing here waits."""

    def send(self, message: decode_pb2.SessionRequest) -> bool:
        """False when the worker does not read: its bound of unsent messages is reached."""
        ...

    def find(self, request_id: str, answer: "Answer[int | None]") -> None:
        """Asks how many tokens the worker has of a stream; None: it does not hold it, or does not answer."""
        ...

    def hang_up(self) -> None:
        """Ends the present connection; another one is tried."""
        ...

    def close(self) -> None:
        """For good."""
        ...


class Opening(NamedTuple):
    """How to begin a connection."""

    hello: decode_pb2.RouterHello
    timeout_s: float  # for the worker's hello


@dataclass(eq=False, slots=True)
class Session:
    """Written by its own methods: the first ones are for requests, the last five for the driver of the connection."""

    peer: SessionPeer
    on_change: Callable[[], None]
    link: SessionLink | None = field(default=None, init=False)  # given once, by whoever opens it
    hello: decode_pb2.DecodeHello | None = field(default=None, init=False)  # while the session is alive
    is_leaving: bool = field(default=False, init=False)  # the worker drains
    has_met: bool = field(default=False, init=False)  # the first try to connect is over
    _streams: dict[str, DecodeStream] = field(default_factory=dict[str, DecodeStream], init=False)
    # Asked for and not yet answered. Whoever has such a stream here keeps it until the worker agrees.
    _attaching: dict[str, DecodeStream] = field(default_factory=dict[str, DecodeStream], init=False)
    _heard_at: float = field(default=0.0, init=False)  # of the present connection
    _backoff_s: float = field(default=FIRST_BACKOFF_S, init=False)

    @property
    def router_incarnation(self) -> str:
        return self.peer.router_incarnation

    @property
    def is_alive(self) -> bool:
        return self.hello is not None

    @property
    def num_streams(self) -> int:
        return len(self._streams) + len(self._attaching)

    def is_silent(self, now: float) -> bool:
        """Running streams here and no message for a while: the worker's step hangs, whatever its heartbeats say."""
        is_owed = any(stream.is_claimed for stream in self._streams.values())
        return is_owed and now - self._heard_at >= NO_NEW_WORK_S

    def attach_id(self, counter: int) -> decode_pb2.AttachId:
        """A later attempt's messages outrank an earlier one's."""
        return decode_pb2.AttachId(router_incarnation=self.peer.router_incarnation, counter=counter)

    def reserve(self, reserve: decode_pb2.Reserve, source: Source, now: float) -> DecodeStream:
        """Asks for blocks; the stream's `answer` follows. Raises WorkersUnavailable without a session."""
        self._check_alive()
        request_id = reserve.request.request_id
        stream = DecodeStream(self, request_id, reserve.attach.counter, source, Answer(source.wake))
        self._take_over(stream, now)
        self._send(decode_pb2.SessionRequest(reserve=reserve), now)
        return stream

    def attach(self, request_id: str, next_index: int, source: Source, now: float) -> DecodeStream:
        """Takes over a stream, whoever has it; its `answer` follows. Raises WorkersUnavailable without a session."""
        self._check_alive()
        stream = DecodeStream(self, request_id, 0, source, Answer(source.wake), next_index=next_index)
        if (earlier := self._attaching.get(request_id)) is not None:
            earlier.finish(Failed(AttachedElsewhere("another call took the stream over")), now)
        self._attaching[request_id] = stream
        attach = decode_pb2.Attach(request_id=request_id, attach=self.attach_id(0), next_index=next_index)
        self._send(decode_pb2.SessionRequest(attach=attach), now)
        return stream

    def rearm(self, stream: DecodeStream, attempt: int, fill_timeout_s: float, now: float) -> None:
        """Has the worker refuse the transfer's writers so far and say what is missing, as `stream.rearmed`."""
        stream.ask_to_rearm()
        rearm = decode_pb2.Rearm(
            request_id=stream.request_id,
            transfer_id=stream.reserved.transfer_id,
            attempt=attempt,
            attach=self.attach_id(stream.counter),
            fill_timeout_ms=int(fill_timeout_s * 1000),
        )
        self._send(decode_pb2.SessionRequest(rearm=rearm), now)

    def send_move(self, stream: DecodeStream, target: decode_pb2.Reserved, now: float) -> None:
        """The worker's Moved follows."""
        move = decode_pb2.Move(request_id=stream.request_id, attach=self.attach_id(stream.counter), target=target)
        self._send(decode_pb2.SessionRequest(move=move), now)

    def send_cancel(self, stream: DecodeStream, finish_reason: FinishReason) -> None:
        if self._streams.get(stream.request_id) is not stream or not self.is_alive:
            return
        cancel = decode_pb2.CancelStream(
            request_id=stream.request_id,
            attach=self.attach_id(stream.counter),
            finish_reason=finish_reason_to_proto(finish_reason),
        )
        self._send(decode_pb2.SessionRequest(cancel=cancel), self._heard_at)

    def forget(self, stream: DecodeStream) -> None:
        """No message of this stream is delivered any more."""
        for streams in (self._streams, self._attaching):
            if streams.get(stream.request_id) is stream:
                del streams[stream.request_id]
        self.on_change()

    def opening(self) -> Opening:
        """The first message of a connection names the streams to go on with; what the worker lacks of them is lost."""
        kept = [s for s in self._streams.values() if not (s.is_ended or s.is_cancelled)]
        cursors = [decode_pb2.StreamCursor(request_id=s.request_id, next_index=s.next_index) for s in kept]
        hello = decode_pb2.RouterHello(router_incarnation=self.peer.router_incarnation, streams=cursors)
        return Opening(hello, BLIP_TIMEOUT_S if kept else HELLO_TIMEOUT_S)

    def connected(self, first: decode_pb2.SessionResponse | None, now: float) -> None:
        """The worker's first message. Raises WorkerLost when it is no hello, or of another incarnation."""
        if first is None or first.WhichOneof("message") != "hello":
            raise WorkerLost("the decode worker did not say hello")
        if first.hello.incarnation != self.peer.decode_incarnation:
            raise WorkerLost("another incarnation answers at the decode worker's address")
        self._heard_at = now
        self.hello = first.hello
        self.has_met = True
        for request_id in first.hello.unknown_streams:
            if stream := self._streams.get(request_id):
                stream.finish(Failed(WorkerLost("the decode worker no longer has the stream")), now)
        _log.info("session.alive", worker=self.peer.decode_name, num_streams=len(self._streams))
        self.on_change()

    def hear(self, message: decode_pb2.SessionResponse, now: float) -> None:
        """Any later message."""
        self._heard_at = now
        match message.WhichOneof("message"):
            case "step":
                for tokens in message.step.streams:
                    stream = self._streams.get(tokens.request_id)
                    if stream is not None and stream.counter == tokens.counter:
                        stream.hear(tokens, now)
            case "leaving":
                self.is_leaving = True
                for stream in self._streams.values():
                    if stream.answer.has_come and not stream.is_ended:  # else it may be placed elsewhere yet
                        stream.source.put(message.leaving, now)
                self.on_change()
            case "attached":
                self._take_attached(message.attached, now)
            case "refused":
                self._take_refused(message.refused, now)
            case "reserved" | "ended" | "transfer_failed" | "rearmed" | "detached" | "moved" as kind:
                said = getattr(message, kind)
                self._tell(said.request_id, said, now)
            case other:
                _log.warning("session.unexpected", worker=self.peer.decode_name, message=other)

    def broke(self, problem: str, now: float) -> float:
        """The connection ended, or could not be made; seconds to wait before the next one."""
        self.has_met = True
        is_blip = self.is_alive and not self.is_silent(now)  # a peer that froze will not shake hands either
        if is_blip:
            self.hello = None
            for stream in [s for s in self._all_streams() if not s.answer.has_come or s.rearmed is not None]:
                stream.refuse(WorkersUnavailable("the session broke off"), now)  # whether it was heard, nobody knows
        else:
            self.abandon(f"the decode worker was lost: {problem}", now)
        _log.debug("session.lost", worker=self.peer.decode_name, problem=problem, is_blip=is_blip)
        self.on_change()
        if is_blip:
            self._backoff_s = FIRST_BACKOFF_S
            return 0.0
        waited_s = self._backoff_s
        self._backoff_s = min(self._backoff_s * 2, LAST_BACKOFF_S)
        return waited_s

    def abandon(self, why: str, now: float) -> None:
        """Gives the connection up; every stream is told at once, and the next hello does not name them."""
        if self.link is not None:
            self.link.hang_up()
        was_alive = self.is_alive
        self.hello = None
        lost = [stream for stream in self._all_streams() if not stream.is_ended]
        for stream in lost:
            stream.finish(Failed(WorkerLost(why), has_others=len(lost) > 1), now)
        if was_alive:
            _log.info("session.given_up", worker=self.peer.decode_name, why=why)
            self.on_change()

    def _take_attached(self, attached: decode_pb2.Attached, now: float) -> None:
        request_id = attached.request.request_id
        if (asked := self._attaching.pop(request_id, None)) is not None:
            self._take_over(asked, now)  # else nobody waits any more: who has the stream here goes on with it
        self._tell(request_id, attached, now)

    def _take_refused(self, refused: decode_pb2.Refused, now: float) -> None:
        """An attach is asked for with counter 0, everything else with the counter of a stream."""
        if refused.counter == 0 and (asked := self._attaching.pop(refused.request_id, None)) is not None:
            asked.take(refused, now)
        else:
            self._tell(refused.request_id, refused, now)

    def _check_alive(self) -> None:
        if not self.is_alive:
            raise WorkersUnavailable("no session with the decode worker")

    def _all_streams(self) -> list[DecodeStream]:
        return [*self._streams.values(), *self._attaching.values()]

    def _take_over(self, stream: DecodeStream, now: float) -> None:
        """The request's stream from now on. Who had it at this router before is told so."""
        if (other := self._streams.get(stream.request_id)) is not None:
            other.let_go()
            other.source.put(Failed(AttachedElsewhere("another call took the stream over")), now)
        self._streams[stream.request_id] = stream

    def _send(self, message: decode_pb2.SessionRequest, now: float) -> None:
        assert self.link is not None, "a session has its link before anybody knows it"
        if not self.link.send(message):
            self.abandon("the decode worker does not read its session", now)

    def _tell(self, request_id: str, said: Message, now: float) -> None:
        """What is said of an earlier reservation of the request is passed over."""
        stream = self._streams.get(request_id)
        if stream is not None and getattr(said, "counter", stream.counter) == stream.counter:
            stream.take(said, now)
