"""Decode workers that follow a script: what a router says to them is kept, what they answer is decided.

They hold no port of their own. A `Connection` carries a session; it is given by whoever brings messages here: in
virtual time `scripted_links`, over gRPC `real_ports`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from isthmus.convert import layout_to_proto
from isthmus.errors import IndexOutOfRange, IsthmusError, StaleOwner, StreamGone
from isthmus.ids import Ids
from isthmus.kv.layout import KvLayout, Plane, PlaneKind
from isthmus.v1 import decode_pb2, types_pb2

MODEL_DIGEST = "d" * 32
NUMERICS = "n" * 32
LAYOUT = KvLayout(MODEL_DIGEST, (Plane("latent", PlaneKind.APPEND_ONLY, 2, 8, "fp32"),), 16)
EOS = 256
SCRIPT = b"The quick brown fox jumps over the lazy dog. "


def script_token(request: types_pb2.EngineRequest, index: int) -> types_pb2.Token:
    """The pure function that both kinds of workers compute."""
    return types_pb2.Token(id=SCRIPT[index % len(SCRIPT)])


class Time(Protocol):
    """Virtual, or an event loop's."""

    def now(self) -> float: ...

    def after(self, seconds: float, function: Callable[[], object]) -> Any:
        """What is returned can be cancelled."""
        ...


class Wires(Protocol):
    """What workers need of the world they are in."""

    time: Time
    ids: Ids

    def latency_s(self) -> float:
        """Of the next message, each way."""
        ...

    def commit(self, transfer_id: str, attempt: int, num_tokens: int = 0) -> bool:
        """The blocks of a transfer have arrived at the worker that awaits them, and so many tokens. False: nobody."""
        ...

    def abort(self, transfer_id: str) -> None:
        """Prefill has finished the request itself."""
        ...


class Connection(Protocol):
    """One connection of a router's session, as the worker sees it."""

    def say(self, **message: Any) -> None:
        """A SessionResponse."""
        ...

    def break_off(self) -> None: ...


@dataclass(eq=False)
class ScriptedStream:
    request: types_pb2.EngineRequest
    counter: int
    transfer_id: str
    router: str  # incarnation
    connection: Connection
    is_kept: bool  # retained without a reader
    attempt: int = 1
    num_sent: int = 0  # also what it was begun or moved with
    is_claimed: bool = False
    step: Any = None  # the next one, while it is due


@dataclass(eq=False)
class ScriptedDecode:
    """Decodes `token` once a prefill worker commits. Written by itself; tests set how it behaves."""

    wires: Wires
    name: str
    incarnation: str
    address: str
    token: Callable[[types_pb2.EngineRequest, int], types_pb2.Token] = script_token
    refuse: Callable[[decode_pb2.Reserve], IsthmusError | None] = lambda reserve: None
    token_interval_s: float = 0.0
    tokens_per_step: int = 1
    max_tokens_sent: int | None = None  # then it falls silent
    answers_reserve: bool = True
    answers_rearm: bool = True
    answer_delays_s: list[float] = field(default_factory=list)  # of reservations, one after the other
    moves_streams: bool = True
    fill_timeout_s: float = 4.0
    is_leaving: bool = False  # says so before it answers a reservation
    keeps_streams: bool = False  # of a lost session
    keeps_ended: bool = False  # what is retained, also after its end
    reads: bool = True  # else its sessions' bound of unsent messages is reached
    is_up: bool = True
    streams: dict[str, ScriptedStream] = field(default_factory=dict)
    connections: dict[Connection, str] = field(default_factory=dict)  # with the router's incarnation
    hellos: list[decode_pb2.RouterHello] = field(default_factory=list)
    reserves: list[decode_pb2.Reserve] = field(default_factory=list)
    cancels: list[decode_pb2.CancelStream] = field(default_factory=list)
    rearms: list[decode_pb2.Rearm] = field(default_factory=list)
    attaches: list[decode_pb2.Attach] = field(default_factory=list)
    moves: list[decode_pb2.Move] = field(default_factory=list)

    def greet(self, connection: Connection, hello: decode_pb2.RouterHello) -> None:
        """A router's first message. Streams of this router that it does not name end."""
        self.hellos.append(hello)
        self.connections[connection] = hello.router_incarnation
        next_index = {cursor.request_id: cursor.next_index for cursor in hello.streams}
        for request_id, stream in list(self.streams.items()):
            if stream.router == hello.router_incarnation and request_id not in next_index:
                self._drop(stream)
        answer = decode_pb2.DecodeHello(
            incarnation=self.incarnation,
            layout=layout_to_proto(LAYOUT),
            numerics_digest=NUMERICS,
            unknown_streams=[request_id for request_id in next_index if request_id not in self.streams],
        )
        connection.say(hello=answer)
        for request_id, index in next_index.items():
            if stream := self.streams.get(request_id):
                stream.connection = connection
                if stream.is_claimed:
                    self._start(stream, index)

    def hear(self, connection: Connection, message: decode_pb2.SessionRequest) -> None:
        match message.WhichOneof("message"):
            case "reserve":
                self._reserve(connection, message.reserve)
            case "cancel":
                self._cancel(message.cancel)
            case "rearm":
                self._rearm(connection, message.rearm)
            case "attach":
                self._attach(connection, message.attach)
            case "move":
                self._move(connection, message.move)
            case _:
                pass

    def lost(self, connection: Connection) -> None:
        """The connection is gone, and with it the streams that are not kept."""
        self.connections.pop(connection, None)
        for stream in [s for s in self.streams.values() if s.connection is connection]:
            if not (self.keeps_streams or (stream.is_kept and stream.is_claimed)):
                self._drop(stream)

    def lose_sessions(self) -> None:
        for connection in list(self.connections):
            connection.break_off()

    def go_down(self) -> None:
        """Nobody answers at its address any more; everything it had is gone."""
        self.is_up = False
        for stream in list(self.streams.values()):
            self._drop(stream)
        self.lose_sessions()

    def leave(self) -> None:
        """Asks every router to move its streams away."""
        for connection in self.connections:
            connection.say(leaving=decode_pb2.Leaving())

    def find(self, request_id: str) -> int | None:
        stream = self.streams.get(request_id)
        return None if stream is None else stream.num_sent

    def commit(self, transfer_id: str, attempt: int, num_tokens: int = 0) -> bool:
        """The blocks have arrived, and token 0 or what another decode worker has."""
        for stream in self.streams.values():
            if stream.transfer_id == transfer_id and stream.attempt <= attempt:
                if not stream.is_claimed:
                    stream.is_claimed = True
                    stream.num_sent = max(stream.num_sent, num_tokens)
                    self._start(stream, len(stream.request.emitted_token_ids))
                return True
        return False

    def fail_transfer(self, transfer_id: str, reason: str = "sender gone") -> None:
        for stream in [s for s in self.streams.values() if s.transfer_id == transfer_id]:
            request_id = stream.request.request_id
            failed = decode_pb2.TransferFailed(
                request_id=request_id, attempt=stream.attempt, reason=reason, counter=stream.counter
            )
            stream.connection.say(transfer_failed=failed)

    def drop_transfer(self, transfer_id: str) -> None:
        for stream in [s for s in self.streams.values() if s.transfer_id == transfer_id]:
            self._drop(stream)

    def _reserve(self, connection: Connection, reserve: decode_pb2.Reserve) -> None:
        self.reserves.append(reserve)
        request_id = reserve.request.request_id
        if not self.answers_reserve:
            return
        if self.is_leaving:
            connection.say(leaving=decode_pb2.Leaving())
        if (error := self.refuse(reserve)) is not None:
            self._refuse(connection, request_id, reserve.attach.counter, error)
            return
        transfer_id = self.wires.ids.transfer_id()
        stream = ScriptedStream(
            request=reserve.request,
            counter=reserve.attach.counter,
            transfer_id=transfer_id,
            router=reserve.attach.router_incarnation,
            connection=connection,
            is_kept=reserve.on_disconnect == types_pb2.ON_DISCONNECT_RETAIN,
            num_sent=len(reserve.request.emitted_token_ids),
        )
        self.streams[request_id] = stream
        self._await_fill(stream)
        reserved = decode_pb2.Reserved(
            request_id=request_id,
            counter=reserve.attach.counter,
            transfer_id=transfer_id,
            attempt=1,
            zmq_endpoint="tcp://127.0.0.1:1",
            incarnation=self.incarnation,
            layout_fingerprint=LAYOUT.fingerprint,
            missing=[
                types_pb2.Extent(plane=0, layer=0, first_token=0, num_tokens=len(reserve.request.prompt_token_ids))
            ],
        )
        if self.answer_delays_s:
            self.wires.time.after(self.answer_delays_s.pop(0), lambda: connection.say(reserved=reserved))
        else:
            connection.say(reserved=reserved)

    def _await_fill(self, stream: ScriptedStream) -> None:
        """What nobody fills in time is freed."""
        attempt = stream.attempt

        def expire() -> None:
            if not stream.is_claimed and stream.attempt == attempt and self._has(stream):
                self.fail_transfer(stream.transfer_id, "fill_deadline")
                self._drop(stream)

        self.wires.time.after(self.fill_timeout_s, expire)

    def _refuse(self, connection: Connection, request_id: str, counter: int, error: IsthmusError) -> None:
        refused = decode_pb2.Refused(request_id=request_id, counter=counter, reason=error.reason, detail=error.detail)
        connection.say(refused=refused)

    def _cancel(self, cancel: decode_pb2.CancelStream) -> None:
        """Of a router that has the stream no longer it is ignored."""
        self.cancels.append(cancel)
        stream = self.streams.get(cancel.request_id)
        is_theirs = stream is not None and stream.router == cancel.attach.router_incarnation
        if stream is not None and is_theirs and cancel.attach.counter >= stream.counter:
            self._end(stream, cancel.finish_reason, 0)

    def _rearm(self, connection: Connection, rearm: decode_pb2.Rearm) -> None:
        self.rearms.append(rearm)
        stream = self.streams.get(rearm.request_id)
        if not self.answers_rearm:
            return
        if stream is None or stream.is_claimed:
            self._refuse(connection, rearm.request_id, rearm.attach.counter, StaleOwner("claimed"))
            return
        stream.attempt = rearm.attempt
        self._await_fill(stream)
        rearmed = decode_pb2.Rearmed(
            request_id=rearm.request_id,
            transfer_id=stream.transfer_id,
            attempt=rearm.attempt,
            missing=[types_pb2.Extent(plane=0, layer=1, first_token=0, num_tokens=1)],
        )
        connection.say(rearmed=rearmed)

    def _attach(self, connection: Connection, attach: decode_pb2.Attach) -> None:
        self.attaches.append(attach)
        stream = self.streams.get(attach.request_id)
        if stream is None:
            self._refuse(connection, attach.request_id, 0, StreamGone("not here"))
            return
        if attach.next_index > stream.num_sent:
            self._refuse(connection, attach.request_id, 0, IndexOutOfRange("beyond its end"))
            return
        stream.counter += 1
        now = decode_pb2.AttachId(router_incarnation=attach.attach.router_incarnation, counter=stream.counter)
        if stream.connection is not connection:
            detached = decode_pb2.Detached(request_id=attach.request_id, attach=now)
            stream.connection.say(detached=detached)
        stream.connection = connection
        stream.router = attach.attach.router_incarnation
        request = types_pb2.EngineRequest()
        request.CopyFrom(stream.request)
        request.emitted_token_ids[:] = [self.token(stream.request, i).id for i in range(stream.num_sent)]
        attached = decode_pb2.Attached(
            request=request,
            attach=now,
            next_index=attach.next_index,
            on_disconnect=types_pb2.ON_DISCONNECT_RETAIN,
            retention_s=30,
        )
        connection.say(attached=attached)
        if stream.is_claimed:
            self._start(stream, attach.next_index)

    def _move(self, connection: Connection, move: decode_pb2.Move) -> None:
        """The target claims at once; nothing is left here."""
        self.moves.append(move)
        stream = self.streams.get(move.request_id)
        if stream is None or not self.moves_streams:
            return
        is_taken = self.wires.commit(move.target.transfer_id, 1, stream.num_sent)
        if is_taken:
            self._drop(stream)
        failure = "" if is_taken else "no such transfer"
        moved = decode_pb2.Moved(
            request_id=move.request_id, transfer_id=move.target.transfer_id, acked=is_taken, failure=failure
        )
        connection.say(moved=moved)

    def _start(self, stream: ScriptedStream, index: int) -> None:
        """Tokens from `index` on; if that is not the first, an empty message says that the stream was claimed."""
        self._stop(stream)
        if index:
            self._say_tokens(stream, index, [])
            stream.step = self.wires.time.after(self.token_interval_s, partial(self._step, stream, index))
        else:
            self._step(stream, index)

    def _step(self, stream: ScriptedStream, index: int) -> None:
        most = stream.request.sampling.max_tokens
        if self.max_tokens_sent is not None and index >= self.max_tokens_sent:
            return
        if index >= most:
            self._end(stream, types_pb2.FINISH_REASON_LENGTH, most)
            return
        last = min(index + self.tokens_per_step, most)
        tokens = [self.token(stream.request, i) for i in range(index, last)]
        if not self._has(stream):
            return  # the token has killed the worker
        self._say_tokens(stream, index, tokens)
        stream.num_sent = max(stream.num_sent, last)
        if EOS in (token.id for token in tokens):
            self._end(stream, types_pb2.FINISH_REASON_STOP, last)
        else:
            stream.step = self.wires.time.after(self.token_interval_s, partial(self._step, stream, last))

    def _say_tokens(self, stream: ScriptedStream, index: int, tokens: list[types_pb2.Token]) -> None:
        request_id = stream.request.request_id
        sent = decode_pb2.StreamTokens(request_id=request_id, index=index, tokens=tokens, counter=stream.counter)
        stream.connection.say(step=decode_pb2.StepTokens(step=index, streams=[sent]))

    def _end(self, stream: ScriptedStream, reason: types_pb2.FinishReason, num_tokens: int) -> None:
        is_cancelled = reason == types_pb2.FINISH_REASON_CANCELLED
        if is_cancelled or not (self.keeps_ended and stream.is_kept):
            self._drop(stream)
        request_id = stream.request.request_id
        ended = decode_pb2.StreamEnded(
            request_id=request_id, finish_reason=reason, num_tokens=num_tokens, counter=stream.counter
        )
        stream.connection.say(ended=ended)

    def _drop(self, stream: ScriptedStream) -> None:
        if self._has(stream):
            del self.streams[stream.request.request_id]
        self._stop(stream)

    def _has(self, stream: ScriptedStream) -> bool:
        return self.streams.get(stream.request.request_id) is stream

    def _stop(self, stream: ScriptedStream) -> None:
        if stream.step is not None:
            stream.step.cancel()
            stream.step = None
