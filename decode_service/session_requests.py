"""What routers say in their sessions, followed message by message, and Find."""

from dataclasses import dataclass

from decode_service import messages
from decode_service.attachment import Attachments
from decode_service.moving import Mover
from decode_service.reader import AttachKey
from decode_service.reservations import Reservations, Terms
from decode_service.session import RouterSession
from decode_service.stream import Phase
from decode_service.streams import Streams
from isthmus import convert
from isthmus.errors import InvalidRequest, IsthmusError, StaleOwner
from isthmus.types import FinishReason
from isthmus.v1 import decode_pb2, types_pb2

MAX_RETENTION_S = 120


@dataclass(frozen=True, slots=True)
class DecodeAddress:
    """Who this worker is, and where its blocks are to be sent."""

    incarnation: str
    zmq_endpoint: str


@dataclass(frozen=True, slots=True)
class SessionRequests:
    """Called in the event loop alone."""

    address: DecodeAddress
    streams: Streams
    reservations: Reservations
    attachments: Attachments
    mover: Mover

    def greet(self, first: decode_pb2.SessionRequest, session: RouterSession, now: float) -> None:
        """Opens the session that began with this message. Raises InvalidRequest unless it is a hello."""
        kind = first.WhichOneof("message")
        if kind != "hello":
            raise InvalidRequest.of("message", kind, "hello as the first message of a session")
        engine = self.streams.engine
        hello = decode_pb2.DecodeHello(
            incarnation=self.address.incarnation,
            layout=convert.layout_to_proto(engine.layout),
            numerics_digest=engine.numerics_digest,
        )
        next_index = {cursor.request_id: cursor.next_index for cursor in first.hello.streams}
        self.attachments.open(session, next_index, hello, now)

    def follow(self, message: decode_pb2.SessionRequest, session: RouterSession, now: float) -> None:
        """One message after the hello; what cannot be followed is answered with Refused."""
        request_id = ""
        counter = 0
        try:
            match message.WhichOneof("message"):
                case "reserve":
                    request_id = message.reserve.request.request_id
                    counter = message.reserve.attach.counter
                    self._reserve(message.reserve, session, now)
                case "rearm":
                    request_id = message.rearm.request_id
                    counter = message.rearm.attach.counter
                    self._rearm(message.rearm, session, now)
                case "attach":
                    request_id = message.attach.request_id
                    self.attachments.attach(request_id, message.attach.next_index, session, now)
                case "cancel":
                    self._cancel(message.cancel, now)
                case "release":
                    self.attachments.release(message.release.request_id, _key(message.release.attach), now)
                case "move":
                    self._move(message.move, session)
                case other:
                    raise InvalidRequest.of("message", other, "reserve, rearm, attach, cancel, release, move")
        except IsthmusError as error:
            session.send(messages.refused(request_id, counter, error))

    def find(self, request: decode_pb2.FindRequest) -> decode_pb2.FindResponse:
        stream = self.streams.table.get(request.request_id)
        if stream is None:
            return decode_pb2.FindResponse(found=False)
        return decode_pb2.FindResponse(found=True, next_index=stream.num_known)

    def _reserve(self, reserve: decode_pb2.Reserve, session: RouterSession, now: float) -> None:
        is_retained = reserve.on_disconnect == types_pb2.ON_DISCONNECT_RETAIN
        terms = Terms(
            fill_timeout_s=reserve.fill_timeout_ms / 1000 or None,
            retention_s=min(reserve.retention_s, MAX_RETENTION_S) if is_retained else None,
            moves=reserve.moves,
        )
        request = convert.request_from_proto(reserve.request)
        stream = self.reservations.reserve(request, _key(reserve.attach), session, terms, now)
        layout = self.streams.engine.layout
        reserved = decode_pb2.Reserved(
            request_id=stream.request_id,
            counter=stream.reader.attach.counter,
            transfer_id=stream.transfer_id,
            attempt=stream.attempt,
            zmq_endpoint=self.address.zmq_endpoint,
            incarnation=self.address.incarnation,
            layout_fingerprint=layout.fingerprint,
            num_cached_tokens=stream.num_cached_tokens,
            missing=[convert.extent_to_proto(extent, layout) for extent in stream.missing],
        )
        session.send(reserved)

    def _rearm(self, rearm: decode_pb2.Rearm, session: RouterSession, now: float) -> None:
        stream = self.streams.table.get(rearm.request_id)
        if stream is None or stream.phase is not Phase.FILLING or stream.transfer_id != rearm.transfer_id:
            raise StaleOwner("the transfer is not being filled")
        if self.attachments.held(rearm.request_id, _key(rearm.attach)) is not None:
            self.reservations.rearm(stream, rearm.attempt, rearm.fill_timeout_ms / 1000 or None, now)
            session.send(messages.rearmed(stream, self.streams.engine.layout))

    def _cancel(self, cancel: decode_pb2.CancelStream, now: float) -> None:
        finish_reason = convert.finish_reason_from_proto(cancel.finish_reason) or FinishReason.CANCELLED
        self.attachments.cancel(cancel.request_id, _key(cancel.attach), finish_reason, now)

    def _move(self, move: decode_pb2.Move, session: RouterSession) -> None:
        if self.streams.table.get(move.request_id) is None:
            session.send(messages.moved(move.request_id, move.target.transfer_id, "it is not here"))
            return
        stream = self.attachments.held(move.request_id, _key(move.attach))
        if stream is not None:
            self.mover.move(stream, convert.target_from_proto(move.target, self.streams.engine.layout))


def _key(message: decode_pb2.AttachId) -> AttachKey:
    return AttachKey(message.router_incarnation, message.counter)
