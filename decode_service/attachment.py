"""Which router reads which stream, and what a router may say about it.

    ATTACHED --session lost--> WAITING --Hello of the same router, or Attach of any--> ATTACHED
                                  +-- grace (abort) or retention (retain) is over --> the stream ends as cancelled

A waiting stream runs on; its tokens are recorded and sent again from where the router says. A stream that finished is
kept for its retention, or while its router has a right to come back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from decode_service import messages
from decode_service.session import NOBODY, RouterSession
from decode_service.stream import AttachKey, Ended, Phase, Stream
from decode_service.streams import Streams
from isthmus.errors import IndexOutOfRange, StreamGone
from isthmus.process.serving import until_none_left
from isthmus.types import FinishReason
from isthmus.v1 import decode_pb2

SESSION_GRACE_S = 0.7  # for a session that broke with both ends alive


@dataclass(eq=False, slots=True)
class Attachments:
    """Event loop only. At most one session a router incarnation."""

    streams: Streams
    _sessions: dict[str, RouterSession] = field(default_factory=dict[str, RouterSession], init=False)  # by router

    def open(self, session: RouterSession, next_index: Mapping[str, int], hello: decode_pb2.DecodeHello) -> None:
        """Says hello and takes up every stream that the router names, from its next index; its others end."""
        router = session.router_incarnation
        if (before := self._sessions.get(router)) is not None:
            before.close()
        self._sessions[router] = session
        hello.unknown_streams.extend(name for name in next_index if self.streams.get(name) is None)
        session.send(hello)
        for stream in self.streams:
            if stream.attach.router_incarnation == router and stream.request_id not in next_index:
                self.streams.end(stream, Ended(FinishReason.CANCELLED, detail="its router does not know it"))
        for request_id, index in next_index.items():
            stream = self.streams.get(request_id)
            if stream is not None and stream.attach.router_incarnation == router:
                self._bind(stream, session, index)
            elif stream is not None:
                session.send(messages.detached(stream, stream.attach))
        if self.streams.is_draining:
            session.send(decode_pb2.Leaving())

    def lost(self, session: RouterSession) -> None:
        """The connection ended: its streams wait for another one."""
        if self._sessions.get(session.router_incarnation) is session:
            del self._sessions[session.router_incarnation]
        now, ledger = self.streams.context.clock.now(), self.streams.context.ledger
        for stream in self.streams:
            if stream.sink is session:
                stream.keep_until = now + (SESSION_GRACE_S if stream.retention_s is None else stream.retention_s)
                stream.note(ledger, "stream.orphaned", session.router_incarnation)

    def attach(self, request_id: str, next_index: int, session: RouterSession) -> None:
        """The stream is this session's from now on. Raises StreamGone or IndexOutOfRange."""
        stream, ledger = self.streams.get(request_id), self.streams.context.ledger
        if stream is None:
            raise StreamGone("this worker does not hold the stream")
        if next_index > stream.num_known:
            raise IndexOutOfRange(f"next_index {next_index}: the stream has {stream.num_known} tokens")
        stream.attach = AttachKey(session.router_incarnation, stream.attach.counter + 1)
        if stream.sink is not session:
            stream.sink.send(messages.detached(stream, stream.attach))
            stream.note(ledger, "stream.detached", session.router_incarnation)
        if stream.outgoing is not None:  # the router that moves it has no say any more
            stream.outgoing.abort("attached by another router")
        session.send(messages.attached(stream, next_index))
        self._bind(stream, session, next_index)
        stream.note(ledger, "stream.attached", session.router_incarnation)

    def held(self, request_id: str, key: AttachKey) -> Stream | None:
        """The stream, for a router that has it. None when it is not here, or for a stale router, which is noted."""
        stream = self.streams.get(request_id)
        if stream is None or not key.is_stale(stream.attach):
            return stream
        stream.note(self.streams.context.ledger, "cancel.stale", key.router_incarnation)
        return None

    def cancel(self, request_id: str, key: AttachKey, finish_reason: FinishReason) -> None:
        """Ends the stream in any phase; one not here yet is refused when it comes."""
        if self.streams.get(request_id) is None:
            self.streams.tombstones.add(request_id, key.counter)
        elif stream := self.held(request_id, key):
            self.streams.end(stream, Ended(finish_reason))

    def release(self, request_id: str, key: AttachKey) -> None:
        """The client has everything of a stream that finished."""
        stream = self.held(request_id, key)
        if stream is not None and stream.ended is not None:
            self.streams.end(stream, stream.ended)

    def sweep(self) -> None:
        """Ends what nobody came back for; to be called several times a second."""
        now = self.streams.context.clock.now()
        for stream in [*self.streams, *self.streams.kept.values()]:
            if stream.keep_until is not None and stream.keep_until <= now:
                stream.keep_until = None
                self.streams.end(stream, Ended(FinishReason.CANCELLED, detail="no router came back for it"))

    async def drain(self, timeout_s: float) -> int:
        """Refuses new streams and asks the routers to move theirs; how many are left when the time is over."""
        self.streams.is_draining = True
        for session in self._sessions.values():
            session.send(decode_pb2.Leaving())
        return await until_none_left(self.streams.__len__, timeout_s)

    def abandon_all(self) -> None:
        """The worker stops. Nobody is told that streams ended: their routers see a lost session and go on elsewhere."""
        for stream in self.streams:
            stream.sink = NOBODY
            self.streams.end(stream, Ended(FinishReason.CANCELLED, detail="the decode worker stops"))

    def _bind(self, stream: Stream, session: RouterSession, next_index: int) -> None:
        stream.sink, stream.num_sent = session, next_index
        if stream.phase is not Phase.FILLING:
            self.streams.catch_up(stream)
        stream.keep_until = None
        if stream.ended is not None:
            session.send(messages.stream_ended(stream, stream.ended))
            stream.keep_until = self.streams.context.clock.now() + (stream.retention_s or SESSION_GRACE_S)
