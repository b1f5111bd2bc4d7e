"""Which router reads which stream, and what a router may say about it.

    ATTACHED --session lost--> WAITING --Hello of the same router, or Attach of any--> ATTACHED
                                  +-- grace (abort) or retention (retain) is over --> the stream ends as cancelled

A waiting stream runs on; its tokens are recorded and sent again from where the router says. A stream that finished is
kept for its retention, or while its router has a right to come back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from decode_service import messages
from decode_service.reader import AttachKey
from decode_service.reservations import Reservations
from decode_service.session import RouterSession
from decode_service.stream import Phase, ServedStream
from decode_service.stream_run import Ended
from decode_service.streams import Streams
from isthmus.errors import IndexOutOfRange, StreamGone
from isthmus.types import FinishReason
from isthmus.v1 import decode_pb2

SESSION_GRACE_S = 0.7  # for a session that broke with both ends alive


@dataclass(eq=False, slots=True)
class Attachments:
    """Called in the event loop alone. At most one session a router incarnation."""

    streams: Streams
    reservations: Reservations
    _sessions: dict[str, RouterSession] = field(default_factory=dict[str, RouterSession], init=False)  # by router

    def open(
        self, session: RouterSession, next_index: Mapping[str, int], hello: decode_pb2.DecodeHello, now: float
    ) -> None:
        """Says hello and takes up every stream that the router names, from its next index; its others end."""
        router = session.router_incarnation
        before = self._sessions.get(router)
        if before is not None:
            before.close()
        self._sessions[router] = session
        table = self.streams.table
        hello.unknown_streams.extend(name for name in next_index if table.get(name) is None)
        session.send(hello)
        for stream in table:
            if stream.reader.attach.router_incarnation == router and stream.request_id not in next_index:
                self.streams.end(stream, Ended(FinishReason.CANCELLED, detail="its router does not know it"), now)
        for request_id, index in next_index.items():
            stream = table.get(request_id)
            if stream is not None and stream.reader.attach.router_incarnation == router:
                self._bind(stream, session, index, now)
            elif stream is not None:
                session.send(messages.detached(stream, stream.reader.attach))
        if self.reservations.is_draining:
            session.send(decode_pb2.Leaving())

    def lost(self, session: RouterSession, now: float) -> None:
        """The connection ended: its streams wait for another one."""
        router = session.router_incarnation
        if self._sessions.get(router) is session:
            del self._sessions[router]
        for stream in self.streams.table:
            reader = stream.reader
            if reader.sink is session:
                reader.keep(now + (SESSION_GRACE_S if reader.retention_s is None else reader.retention_s))
                self._note(stream, "stream.orphaned", router)

    def attach(self, request_id: str, next_index: int, session: RouterSession, now: float) -> None:
        """The stream is this session's from now on. Raises StreamGone or IndexOutOfRange."""
        stream = self.streams.table.get(request_id)
        if stream is None:
            raise StreamGone("this worker does not hold the stream")
        if next_index > stream.num_known:
            raise IndexOutOfRange(f"next_index {next_index}: the stream has {stream.num_known} tokens")
        router = session.router_incarnation
        reader = stream.reader
        reader.take_over(router)
        if reader.sink is not session:
            reader.tell(messages.detached(stream, reader.attach))
            self._note(stream, "stream.detached", router)
        if stream.outgoing is not None:  # the router that moves it has no say any more
            stream.outgoing.abort("attached by another router")
        session.send(messages.attached(stream, next_index))
        self._bind(stream, session, next_index, now)
        self._note(stream, "stream.attached", router)

    def held(self, request_id: str, key: AttachKey) -> ServedStream | None:
        """The stream, for a router that has it. None when it is not here, or for a stale router, which is noted."""
        stream = self.streams.table.get(request_id)
        if stream is None or not key.is_stale(stream.reader.attach):
            return stream
        self._note(stream, "cancel.stale", key.router_incarnation)
        return None

    def cancel(self, request_id: str, key: AttachKey, finish_reason: FinishReason, now: float) -> None:
        """Ends the stream in any phase; one not here yet is refused when it comes."""
        if self.streams.table.get(request_id) is None:
            self.streams.tombstones.add(request_id, key.counter, now)
            return
        stream = self.held(request_id, key)
        if stream is not None:
            self.streams.end(stream, Ended(finish_reason), now)

    def release(self, request_id: str, key: AttachKey, now: float) -> None:
        """The client has everything of a stream that finished."""
        stream = self.held(request_id, key)
        if stream is not None and stream.ended is not None:
            self.streams.end(stream, stream.ended, now)

    def sweep(self, now: float) -> None:
        """Ends what nobody came back for; to be called several times a second."""
        table = self.streams.table
        for stream in [*table, *table.kept()]:
            keep_until = stream.reader.keep_until
            if keep_until is not None and keep_until <= now:
                stream.reader.keep(None)
                self.streams.end(stream, Ended(FinishReason.CANCELLED, detail="no router came back for it"), now)

    def begin_drain(self) -> None:
        """Refuses new streams and asks the routers to move theirs."""
        self.reservations.stop()
        for session in self._sessions.values():
            session.send(decode_pb2.Leaving())

    def abandon_all(self, now: float) -> None:
        """The worker stops. Nobody is told that streams ended: their routers see a lost session and go on elsewhere."""
        for stream in self.streams.table:
            stream.reader.silence()
            self.streams.end(stream, Ended(FinishReason.CANCELLED, detail="the decode worker stops"), now)

    def _bind(self, stream: ServedStream, session: RouterSession, next_index: int, now: float) -> None:
        reader = stream.reader
        reader.bind(session, next_index)
        if stream.phase is not Phase.FILLING:
            self.streams.catch_up(stream)
        if stream.ended is not None:
            session.send(messages.stream_ended(stream, stream.ended))
            reader.keep(now + (reader.retention_s or SESSION_GRACE_S))

    def _note(self, stream: ServedStream, event: str, router: str) -> None:
        stream.note(self.streams.instruments.ledger, event, router)
