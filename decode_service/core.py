"""A decode worker's event-loop cores put together. The step loop is a core of its own, in its own thread."""

from dataclasses import dataclass

from decode_service.attachment import Attachments
from decode_service.moving import Mover
from decode_service.ports import DecodePorts
from decode_service.reservations import Reservations
from decode_service.session_requests import DecodeAddress, SessionRequests
from decode_service.streams import Streams
from decode_service.tombstones import Tombstones
from isthmus.worker.engine_port import DecodeEngine
from isthmus.worker.instruments import Instruments

TOMBSTONE_SLACK_S = 5.0


@dataclass(frozen=True, slots=True)
class DecodeCore:
    """Called in the event loop alone; every time is in seconds on one monotonic clock.

    Its driver brings: the receiver's events to `streams.claimed` and `streams.failed`, the step loop's to
    `streams.deliver` and `mover.handed_over`, the routers' messages to `requests`, a session's end to
    `attachments.lost`, and the time to `attachments.sweep`.
    """

    streams: Streams
    reservations: Reservations
    attachments: Attachments
    mover: Mover
    requests: SessionRequests

    @classmethod
    def build(
        cls,
        engine: DecodeEngine,
        ports: DecodePorts,
        instruments: Instruments,
        address: DecodeAddress,
        fill_timeout_s: float,
    ) -> "DecodeCore":
        """`fill_timeout_s`: how long a reservation waits for its blocks, at most."""
        streams = Streams(engine, ports, instruments, Tombstones(fill_timeout_s + TOMBSTONE_SLACK_S))
        reservations = Reservations(streams, fill_timeout_s)
        attachments = Attachments(streams, reservations)
        mover = Mover(streams)
        requests = SessionRequests(address, streams, reservations, attachments, mover)
        return cls(streams, reservations, attachments, mover, requests)
