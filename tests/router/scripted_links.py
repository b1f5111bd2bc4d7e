"""Ports of the router's cores to scripted workers, in virtual time: messages take a moment, in order, each way."""

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from isthmus.errors import WorkerLost
from isthmus.routine import Answer
from isthmus.v1 import decode_pb2, prefill_pb2
from kv_transfer.ownership.store import WorkerRecord
from router.pool.decode_stream import Failed
from router.pool.session import Session
from router.pool.worker_pool import PrefillListener
from tests.router.scripted_decode import ScriptedDecode, Wires
from tests.router.scripted_prefill import ScriptedPrefill

LATENCY_S = 0.001


class World(Wires, Protocol):
    """Where the workers are."""

    decode: list[ScriptedDecode]
    prefill: list[ScriptedPrefill]


class Wire:
    """One way of one connection: messages arrive in order, each a little later; none once it is cut."""

    def __init__(self, cluster: World):
        self._cluster = cluster
        self._under_way: deque[Callable[[], object]] = deque()
        self.is_cut = False

    def carry(self, deliver: Callable[[], object]) -> None:
        self._under_way.append(deliver)
        self._cluster.time.after(self._cluster.latency_s(), self._arrive)

    def _arrive(self) -> None:
        deliver = self._under_way.popleft()
        if not self.is_cut:
            deliver()


class ScriptedConnection:
    """Both ways of one connection of a session."""

    def __init__(self, cluster: World, worker: ScriptedDecode, on_message: Any, on_break: Any):
        self._worker = worker
        self._on_message = on_message
        self._on_break = on_break
        self._time = cluster.time
        self.to_worker = Wire(cluster)
        self._to_router = Wire(cluster)

    def say(self, **message: Any) -> None:
        response = decode_pb2.SessionResponse(**message)
        self._to_router.carry(lambda: self._on_message(self, response))

    def break_off(self) -> None:
        """By the worker, or between both."""
        self.cut()
        self._time.after(LATENCY_S, lambda: self._on_break(self, "gone"))

    def cut(self) -> None:
        self.to_worker.is_cut = True
        self._to_router.is_cut = True
        self._worker.lost(self)


class ScriptedSessionLink:
    """A SessionLink to a scripted worker: connects again and again, as `GrpcSessionLink` does."""

    def __init__(self, cluster: World, worker: ScriptedDecode, session: Session):
        self._cluster = cluster
        self._time = cluster.time
        self._worker = worker
        self._session = session
        self._connection: ScriptedConnection | None = None  # from its first try until it broke
        self._is_closed = False
        self._time.after(0.0, self._connect)

    def send(self, message: decode_pb2.SessionRequest) -> bool:
        if self._connection is not None:
            connection = self._connection
            connection.to_worker.carry(lambda: self._worker.hear(connection, message))
        return self._worker.reads

    def find(self, request_id: str, answer: Answer[int | None]) -> None:
        def ask() -> None:
            found = self._worker.find(request_id) if self._worker.is_up else None
            self._time.after(self._cluster.latency_s(), lambda: answer.put(found))

        self._time.after(self._cluster.latency_s(), ask)

    def hang_up(self) -> None:
        if (connection := self._connection) is not None:
            connection.cut()
            self._time.after(0.0, lambda: self._broke(connection, "hung up"))

    def close(self) -> None:
        self._is_closed = True
        if self._connection is not None:
            self._connection.cut()

    def _connect(self) -> None:
        if self._is_closed:
            return
        opening = self._session.opening()
        connection = ScriptedConnection(self._cluster, self._worker, self._hear, self._broke)
        self._connection = connection
        if self._worker.is_up:
            connection.to_worker.carry(lambda: self._worker.greet(connection, opening.hello))
            self._time.after(opening.timeout_s, lambda: self._give_up_waiting(connection))
        else:
            self._time.after(LATENCY_S, lambda: self._broke(connection, "connection refused"))

    def _give_up_waiting(self, connection: ScriptedConnection) -> None:
        if self._connection is connection and not self._session.is_alive:
            connection.cut()
            self._broke(connection, "no hello in time")

    def _hear(self, connection: ScriptedConnection, message: decode_pb2.SessionResponse) -> None:
        if message.WhichOneof("message") != "hello":
            self._session.hear(message, self._time.now())
            return
        try:
            self._session.connected(message, self._time.now())
        except WorkerLost as problem:
            connection.cut()
            self._broke(connection, problem.detail)

    def _broke(self, connection: ScriptedConnection, problem: str) -> None:
        if self._connection is connection and not self._is_closed:
            self._connection = None
            self._time.after(self._session.broke(problem, self._time.now()), self._connect)


class ScriptedPrefillLink:
    """A PrefillLink to a scripted worker."""

    def __init__(self, cluster: World, worker: ScriptedPrefill):
        self._cluster = cluster
        self._worker = worker

    def call(
        self, request: prefill_pb2.PrefillRequest, listener: PrefillListener, timeout_s: float
    ) -> Callable[[], None]:
        call = ScriptedPrefillCall(self._cluster, self._worker, listener)
        call.to_worker.carry(lambda: call.arrive(request))
        return call.drop

    def close(self) -> None:
        pass


class ScriptedPrefillCall:
    """One call, both ways: a listener for its worker."""

    def __init__(self, cluster: World, worker: ScriptedPrefill, listener: PrefillListener):
        self._time = cluster.time
        self._worker = worker
        self._listener = listener
        self._run: Any = None
        self.to_worker = Wire(cluster)
        self._to_router = Wire(cluster)

    def arrive(self, request: prefill_pb2.PrefillRequest) -> None:
        self._run = self._worker.begin(request, self)

    def take(self, response: prefill_pb2.PrefillResponse, at: float) -> None:
        self._to_router.carry(lambda: self._listener.take(response, self._time.now()))

    def failed(self, failure: Failed, at: float) -> None:
        self._to_router.carry(lambda: self._listener.failed(failure, self._time.now()))

    def drop(self) -> None:
        self._to_router.is_cut = True
        self.to_worker.carry(lambda: self._worker.drop(self._run))


class ScriptedLinks:
    """WorkerLinks to scripted workers, by their addresses."""

    def __init__(self, cluster: World):
        self._cluster = cluster

    def open_decode(self, record: WorkerRecord, session: Session) -> ScriptedSessionLink:
        (worker,) = (worker for worker in self._cluster.decode if worker.address == record.grpc_address)
        return ScriptedSessionLink(self._cluster, worker, session)

    def open_prefill(self, record: WorkerRecord) -> ScriptedPrefillLink:
        (worker,) = (worker for worker in self._cluster.prefill if worker.address == record.grpc_address)
        return ScriptedPrefillLink(self._cluster, worker)
