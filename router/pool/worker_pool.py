"""The workers: who is registered, who answers, and what this router has given each to do. A core.

The registry's view comes from outside, beside the token path; while it does not come, the last view and the sessions
count.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from isthmus.convert import block_counts_to_proto
from isthmus.errors import WorkerLost
from isthmus.ledger import Ledger
from isthmus.log import get_logger
from isthmus.routine import Routine
from isthmus.v1 import admin_pb2, prefill_pb2
from kv_transfer.ownership.store import WorkerRecord
from router.pool.decode_stream import Failed, Source
from router.pool.policy import LOST_S, NO_NEW_WORK_S, DecodeView, NumericsClass, PrefillView
from router.pool.session import Session, SessionLink, SessionPeer

UNLISTED_S = 2.0  # a registry that lost its data hears of every worker again within a heartbeat or two
SUSPECT_S = 1.0  # after a failed call
MAX_WORKERS = 4096
# Fields of a worker's record that the status shows as they are.
_SHOWN = (
    *("name", "role", "incarnation", "pid", "grpc_address", "zmq_endpoint", "http_address"),
    *("state", "numerics_digest", "seconds_since_progress"),
)
_log = get_logger("router.pool")


class PrefillListener(Protocol):
    """Who hears a Prefill call."""

    def take(self, response: prefill_pb2.PrefillResponse, at: float) -> None: ...

    def failed(self, failure: Failed, at: float) -> None:
        """The call is over without a Done."""
        ...


class PrefillLink(Protocol):
    """The connection to a prefill worker."""

    def call(
        self, request: prefill_pb2.PrefillRequest, listener: PrefillListener, timeout_s: float
    ) -> Callable[[], None]:
        """Begins a call; what it returns drops it, which cancels the work there."""
        ...

    def close(self) -> None: ...


class WorkerLinks(Protocol):
    """Makes connections to workers. The session is driven from then on."""

    def open_decode(self, record: WorkerRecord, session: Session) -> SessionLink: ...

    def open_prefill(self, record: WorkerRecord) -> PrefillLink: ...


@dataclass(eq=False, slots=True)
class DecodeWorker:
    """Written by the pool; `reserved_blocks` by the places at it (`placement.DecodePlace`)."""

    record: WorkerRecord
    numerics: NumericsClass  # of the record; the fingerprint in it is a hash, so it is computed once
    session: Session
    link: SessionLink
    listed_at: float  # on the router's clock
    has_lease: bool = True
    reserved_blocks: int = 0

    def takes_work(self, now: float) -> bool:
        """Its session is alive and says what the registry says; it neither drains nor hangs.

        Its lease is fresh too; while Redis is away the last view of it counts.
        """
        hello = self.session.hello
        is_away = not self.has_lease or self.session.is_leaving or self.session.is_silent(now)
        if is_away or hello is None or not _is_well(self.record):
            return False
        said = (hello.layout.fingerprint, hello.numerics_digest)
        return said == (self.numerics.layout_fingerprint, self.numerics.numerics_digest)

    def view(self, num_prefix_tokens: int) -> DecodeView:
        blocks = self.record.load.blocks
        return DecodeView(
            incarnation=self.record.incarnation,
            numerics=self.numerics,
            block_size=self.record.layout.block_size,
            total_blocks=blocks.total,
            reported_free_blocks=blocks.free,
            reserved_blocks=self.reserved_blocks,
            num_prefix_tokens=num_prefix_tokens,
        )

    @property
    def is_busy(self) -> bool:
        return self.session.is_alive

    def leave(self, now: float) -> None:
        """The worker is gone for good; streams that waited for its session are told."""
        self.session.abandon("the session was closed", now)
        self.link.close()

    def lose(self, why: str, now: float) -> None:
        if self.session.num_streams:  # an idle session may stay: it costs nothing and shows when the worker is back
            self.session.abandon(why, now)


@dataclass(eq=False, slots=True)
class PrefillWorker:
    """Written by the pool; `num_tokens_ahead` and `calls` by the places at it (`placement.PrefillPlace`)."""

    record: WorkerRecord
    numerics: NumericsClass
    link: PrefillLink
    listed_at: float
    has_lease: bool = True
    num_tokens_ahead: int = 0  # prompts given to it and not yet computed
    suspect_until: float = 0.0
    calls: set[Source] = field(default_factory=set[Source])

    def takes_work(self, now: float) -> bool:
        return self.has_lease and now >= self.suspect_until and _is_well(self.record)

    def suspect(self, now: float) -> None:
        """A call failed: for a moment requests go elsewhere, if there is an elsewhere."""
        self.suspect_until = now + SUSPECT_S

    def view(self, num_prefix_tokens: int) -> PrefillView:
        return PrefillView(
            incarnation=self.record.incarnation,
            numerics=self.numerics,
            num_tokens_ahead=self.num_tokens_ahead,
            num_queued=self.record.load.num_queued,
            num_prefix_tokens=num_prefix_tokens,
        )

    @property
    def is_busy(self) -> bool:
        return bool(self.calls)

    def leave(self, now: float) -> None:
        """The worker is gone for good."""
        self.link.close()

    def lose(self, why: str, now: float) -> None:
        lost = list(self.calls)
        for source in lost:
            source.put(Failed(WorkerLost(why), has_others=len(lost) > 1), now)


@dataclass(eq=False, slots=True)
class WorkerPool:
    """Written by itself alone: it is told what the registry says and when sessions change."""

    incarnation: str  # this router's
    model_digest: str  # workers of another model are passed over
    links: WorkerLinks
    ledger: Ledger
    decode: dict[str, DecodeWorker] = field(default_factory=dict[str, DecodeWorker], init=False)
    prefill: dict[str, PrefillWorker] = field(default_factory=dict[str, PrefillWorker], init=False)
    is_degraded: bool = field(default=False, init=False)  # the registry does not answer: its last view is kept
    has_view: bool = field(default=False, init=False)  # the registry has answered once
    _num_changes: int = field(default=0, init=False)
    _waiting: set[Routine] = field(default_factory=set[Routine], init=False)  # for a change

    def usable_decode(self, now: float) -> list[DecodeWorker]:
        return [worker for worker in self.decode.values() if worker.takes_work(now)]

    def usable_prefill(self, now: float) -> list[PrefillWorker]:
        return [worker for worker in self.prefill.values() if worker.takes_work(now)]

    @property
    def has_unmet(self) -> bool:
        """Workers that this router has not spoken to yet: it has just started, or they have."""
        return not self.has_view or any(not worker.session.has_met for worker in self.decode.values())

    def note_change(self) -> None:
        """Something waiting requests may have waited for: room, a worker, a session."""
        self._num_changes += 1
        for routine in self._waiting:
            routine.wake()

    async def change(self, routine: Routine, until: float) -> None:
        """Returns after a change, or at `until`: room may also come where this router cannot see it."""
        before = self._num_changes
        with self._woken(routine):
            await routine.wait_for(lambda: self._num_changes != before, until)

    def take_view(self, records: list[WorkerRecord], now: float) -> None:
        """Who is registered, as the registry says now."""
        if self.is_degraded:
            _log.info("registry.back")
        self.is_degraded = False
        self.has_view = True
        listed = {r.incarnation: r for r in records[:MAX_WORKERS] if r.model_digest == self.model_digest}
        self._note_listed(listed, now)
        for incarnation, record in listed.items():
            if known := self.decode.get(incarnation) or self.prefill.get(incarnation):
                known.record = record
                known.numerics = numerics_class(record)
            else:
                self._join(record, now)
        self._lose_hung(now)
        self.note_change()

    def miss_view(self, problem: str, now: float) -> None:
        """The registry does not answer: the last view counts, and must not age. Sessions go on without it."""
        if not self.is_degraded:
            _log.warning("registry.unreachable", error=problem)
            for worker in [*self.decode.values(), *self.prefill.values()]:
                worker.record = replace(worker.record, seconds_since_progress=0.0)
        self.is_degraded = True
        self._lose_hung(now)
        self.note_change()

    def close(self, now: float) -> None:
        """Every stream is told that its session is closed."""
        for worker in [*self.decode.values(), *self.prefill.values()]:
            worker.leave(now)
        self.decode.clear()
        self.prefill.clear()

    def status(self, now: float) -> list[admin_pb2.WorkerStatus]:
        """This router's view; `serving` means that it would give the worker something to do."""
        workers = [*self.prefill.values(), *self.decode.values()]
        return [_status(worker.record, serving=worker.takes_work(now)) for worker in workers]

    @contextmanager
    def _woken(self, routine: Routine) -> Iterator[None]:
        self._waiting.add(routine)
        try:
            yield
        finally:
            self._waiting.discard(routine)

    def _note_listed(self, listed: dict[str, WorkerRecord], now: float) -> None:
        for workers in (self.decode, self.prefill):
            for incarnation, worker in list(workers.items()):
                worker.listed_at = now if incarnation in listed else worker.listed_at
                worker.has_lease = now - worker.listed_at < UNLISTED_S
                if not worker.has_lease and not worker.is_busy:
                    del workers[incarnation]
                    self.ledger.record("worker.left", cause=worker.record.role, worker=worker.record.name)
                    worker.leave(now)

    def _join(self, record: WorkerRecord, now: float) -> None:
        numerics = numerics_class(record)
        if record.role == "decode":
            peer = SessionPeer(self.incarnation, record.incarnation, record.name)
            session = Session(peer, on_change=self.note_change)
            session.link = self.links.open_decode(record, session)
            self.decode[record.incarnation] = DecodeWorker(record, numerics, session, session.link, now)
        else:
            link = self.links.open_prefill(record)
            self.prefill[record.incarnation] = PrefillWorker(record, numerics, link, now)
        self.ledger.record("worker.joined", cause=record.role, worker=record.name, incarnation=record.incarnation)

    def _lose_hung(self, now: float) -> None:
        """A worker whose step does not end has lost its requests, although its connection lives."""
        for worker in [*self.decode.values(), *self.prefill.values()]:
            if worker.has_lease and is_hung(worker.record):
                worker.lose("the worker makes no progress", now)


def numerics_class(record: WorkerRecord) -> NumericsClass:
    return NumericsClass(record.model_digest, record.layout.fingerprint, record.numerics_digest)


def is_hung(record: WorkerRecord) -> bool:
    return record.state == "stalled" or record.seconds_since_progress >= LOST_S


def _is_well(record: WorkerRecord) -> bool:
    return record.serving and record.seconds_since_progress < NO_NEW_WORK_S


def _status(record: WorkerRecord, *, serving: bool) -> admin_pb2.WorkerStatus:
    return admin_pb2.WorkerStatus(
        **{name: getattr(record, name) for name in _SHOWN},
        serving=serving,
        blocks=block_counts_to_proto(record.load.blocks),
        num_streams=record.load.num_streams,
        num_queued=record.load.num_queued,
        layout_fingerprint=record.layout.fingerprint,
    )
