"""Simulated routers: the real cores, with sessions and Prefill calls carried by the simulated network."""

from collections.abc import Callable
from typing import Any

from decode_service.session import RouterSession
from isthmus.errors import IsthmusError, WorkerLost
from isthmus.ledger import Ledger
from isthmus.routine import Answer
from isthmus.testing.hash_model import VOCAB_SIZE
from isthmus.testing.virtual_time import SeededIds, VirtualTime
from isthmus.text.detokenizer import Detokenizer
from isthmus.text.vocabulary import Vocabulary
from isthmus.v1 import decode_pb2, prefill_pb2
from kv_transfer.ownership.memory import MemoryOwnership
from kv_transfer.ownership.store import WorkerRecord
from prefill_service.prompt import Event
from router.client.opened_request import RequestOpener
from router.client.validate import ModelFacts
from router.life.locate import Locator
from router.life.parts import LifeParts
from router.life.request_life import Lives
from router.pool.admission import Admission
from router.pool.decode_stream import Failed
from router.pool.drivers import WATCH_INTERVAL_S
from router.pool.placement import Placement
from router.pool.session import Session
from router.pool.worker_pool import PrefillListener, WorkerPool
from tests.sim.network import Connection
from tests.sim.running import answer_of
from tests.sim.workers import SimDecode, SimPrefill

Find = Callable[[str], Any]  # the process that lives at an address now, or None
NO_VOCABULARY = Vocabulary((b"",) * VOCAB_SIZE, False)


class SimRouter:
    """One router process. Dead, it hears and says nothing more."""

    def __init__(self, time: VirtualTime, store: MemoryOwnership, find: Find, name: str, model_digest: str):
        self.time = time
        self.name = name
        self.is_alive = True
        self.connections: list[Any] = []  # ended when the process dies
        self.ids = SeededIds(time)
        self.ledger = Ledger(time)
        self._store = store
        self._find = find
        admission = Admission(max_streams=64, max_queue=64)
        self.pool = WorkerPool(self.ids.incarnation(), model_digest, self, self.ledger)
        parts = LifeParts(Placement(self.pool, admission), self.ledger, name, queue_timeout_s=20.0)
        model = ModelFacts("hash", "deepseek_v3", model_digest, VOCAB_SIZE, 4096, ())

        def detokenizer(stop: Any = (), *, include_stop: bool = False) -> Detokenizer:
            return Detokenizer(NO_VOCABULARY, stop, include_stop=include_stop)

        opener = RequestOpener(model, detokenizer, self.ids)
        self.admission = admission
        self.lives = Lives(parts, admission, Locator(self.pool, self), opener, time.drive, lambda *_: None)
        self._watch()

    def later(self, seconds: float, function: Callable[[], object]) -> None:
        self.time.after(seconds, lambda: function() if self.is_alive else None)

    def die(self) -> None:
        self.is_alive = False

    def open_decode(self, record: WorkerRecord, session: Session) -> "SimSessionLink":
        link = SimSessionLink(self, record, session, self._find)
        link.connect()
        return link

    def open_prefill(self, record: WorkerRecord) -> "SimPrefillLink":
        return SimPrefillLink(self, record, self._find)

    def find_stream(self, request_id: str, answer: Answer[str | None]) -> None:
        self.later(0.001, lambda: answer.put(answer_of(self._store.streams.find(request_id))))

    def _watch(self) -> None:
        self.pool.take_view(answer_of(self._store.list_workers()), self.time.now())
        self.later(WATCH_INTERVAL_S, self._watch)


class SimSessionLink:
    """Connects again and again, as the gRPC driver does."""

    def __init__(self, router: SimRouter, record: WorkerRecord, session: Session, find: Find):
        self._router = router
        self._record = record
        self._session = session
        self._find = find
        self._connection: Connection | None = None
        self._theirs: RouterSession | None = None
        self._is_closed = False

    def connect(self) -> None:
        """Whoever lives at the address now is greeted."""
        worker: SimDecode | None = self._find(self._record.grpc_address)
        if self._is_closed or not self._router.is_alive:
            return
        if worker is None:
            self._router.later(0.002, lambda: self._broke(None, "connection refused"))
            return
        opening = self._session.opening()
        connection = Connection(self._router.time, self._router, worker)
        self._connection = connection
        connection.on_lost(lambda: self._broke(connection, "connection reset"))
        worker.connections.append(connection)
        self._router.connections.append(connection)
        hello = decode_pb2.SessionRequest(hello=opening.hello)
        connection.to.send(lambda: self._greet(worker, connection, hello))
        self._router.later(opening.timeout_s, lambda: self._check_hello(connection))

    def send(self, message: decode_pb2.SessionRequest) -> bool:
        connection, theirs = self._connection, self._theirs
        if connection is not None and theirs is not None:
            worker = self._find(self._record.grpc_address)
            connection.to.send(lambda: worker.core.requests.follow(message, theirs, worker.time.now()))
        return True

    def find(self, request_id: str, answer: Answer[int | None]) -> None:
        worker: SimDecode | None = self._find(self._record.grpc_address)
        if worker is None:
            self._router.later(0.002, lambda: answer.put(None))
            return
        request = decode_pb2.FindRequest(request_id=request_id)

        def ask() -> None:
            found = worker.core.requests.find(request)
            self._router.later(0.001, lambda: answer.put(found.next_index if found.found else None))

        worker.later(0.001, ask)

    def hang_up(self) -> None:
        if self._connection is not None:
            self._connection.end()

    def close(self) -> None:
        self._is_closed = True
        self.hang_up()

    def _greet(self, worker: SimDecode, connection: Connection, hello: decode_pb2.SessionRequest) -> None:
        def bring() -> None:
            while (message := theirs.next_message()) is not None:
                connection.back.send(lambda message=message: self._hear(connection, message))
            if theirs.is_over:
                connection.end()

        theirs = RouterSession(hello.hello.router_incarnation, lambda: worker.later(0.0, bring))
        connection.on_lost(lambda: worker.core.attachments.lost(theirs, worker.time.now()) if worker.is_alive else None)
        self._theirs = theirs
        worker.core.requests.greet(hello, theirs, worker.time.now())

    def _hear(self, connection: Connection, message: decode_pb2.SessionResponse) -> None:
        if connection is not self._connection:
            return
        now = self._router.time.now()
        if not self._session.is_alive:
            try:
                self._session.connected(message, now)
            except WorkerLost as lost:
                self._broke(connection, str(lost))
        else:
            self._session.hear(message, now)

    def _check_hello(self, connection: Connection) -> None:
        if connection is self._connection and not self._session.is_alive:
            self._broke(connection, "no hello in time")

    def _broke(self, connection: Connection | None, problem: str) -> None:
        if self._is_closed or connection is not self._connection or not self._router.is_alive:
            return
        if connection is not None:
            connection.to.is_open = connection.back.is_open = False
        self._connection = None
        self._theirs = None
        self._router.later(self._session.broke(problem, self._router.time.now()), self.connect)


class SimPrefillLink:
    def __init__(self, router: SimRouter, record: WorkerRecord, find: Find):
        self._router = router
        self._record = record
        self._find = find

    def call(
        self, request: prefill_pb2.PrefillRequest, listener: PrefillListener, timeout_s: float
    ) -> Callable[[], None]:
        worker: SimPrefill | None = self._find(self._record.grpc_address)
        if worker is None or worker.identity.incarnation != self._record.incarnation:
            gone = Failed(WorkerLost("connection refused"))
            self._router.later(0.002, lambda: listener.failed(gone, self._router.time.now()))
            return lambda: None
        call = SimPrefillCall(self._router, worker, listener)
        call.connection.to.send(lambda: call.begin(request))
        return call.drop

    def close(self) -> None:
        """Calls that run end with their places."""


class SimPrefillCall:
    """One Prefill call: events come back in order, until Done, an error, or the worker's death."""

    def __init__(self, router: SimRouter, worker: SimPrefill, listener: PrefillListener):
        self._router = router
        self._listener = listener
        self._worker = worker
        self._cancel: Callable[[], None] = lambda: None
        self._is_over = False
        self.connection = Connection(router.time, router, worker)
        self.connection.on_lost(self._lost)
        worker.connections.append(self.connection)
        router.connections.append(self.connection)

    def begin(self, request: prefill_pb2.PrefillRequest) -> None:
        self._cancel = self._worker.call(request, lambda event: self.connection.back.send(lambda: self._hear(event)))

    def drop(self) -> None:
        self._is_over = True
        self.connection.to.send(lambda: self._cancel())

    def _hear(self, event: Event) -> None:
        if self._is_over:
            return
        now = self._router.time.now()
        if isinstance(event, IsthmusError):
            self._is_over = True
            self._listener.failed(Failed(event), now)
        else:
            self._is_over = event.HasField("done")
            self._listener.take(event, now)

    def _lost(self) -> None:
        if not self._router.is_alive:
            self._cancel()  # the call is dropped with its router
        elif not self._is_over:
            self._is_over = True
            self._listener.failed(Failed(WorkerLost("connection reset")), self._router.time.now())
