"""Simulated prefill and decode workers: the real cores over fake engines, each with a lease in the in-memory store."""

from collections.abc import Callable, Sequence
from typing import Any

from decode_service.core import DecodeCore
from decode_service.ownership_report import OwnershipReport
from decode_service.ports import DecodePorts, OnMoved
from decode_service.session_requests import DecodeAddress
from decode_service.step_loop import DecodeLoop
from decode_service.step_messages import Emission, HandedOver, StepCommand
from isthmus.convert import block_counts_to_proto, request_from_proto, target_from_proto
from isthmus.errors import IsthmusError
from isthmus.failpoints import Failpoints
from isthmus.ledger import Ledger
from isthmus.process.admin import Identity
from isthmus.process.health import HealthState, ProgressWatch
from isthmus.testing.fake_decode_engine import FakeDecodeEngine
from isthmus.testing.fake_prefill_engine import FakePrefillEngine
from isthmus.testing.virtual_time import SeededIds, VirtualTime
from isthmus.types import TransferTarget
from isthmus.v1 import admin_pb2, prefill_pb2
from isthmus.worker.instruments import Instruments
from kv_transfer.counters import Counters
from kv_transfer.outgoing import OutgoingTransfer, TransferOutcome
from kv_transfer.ownership.changes import MirroredChange, Restate, apply
from kv_transfer.ownership.leases import Lease, LeaseTerms
from kv_transfer.ownership.membership import Joining, WorkerFacts, newest_blocks, worker_record
from kv_transfer.ownership.memory import MemoryOwnership
from kv_transfer.ownership.mirror import Mirror
from kv_transfer.receiver_events import ClaimedTransfer, FailedTransfer, TransferEvents
from prefill_service.ports import LoopPorts
from prefill_service.prefill_loop import PrefillLoop
from prefill_service.prompt import Event, Prompt
from prefill_service.submissions import Submissions
from tests.kv_transfer.timed_transfers import TimedReceiver, TimedSender
from tests.sim.hash_memory import HashMemory
from tests.sim.running import answer_of

NUM_BLOCKS = 64
STEP_S = 0.003
SWEEP_S = 0.1
FILL_TIMEOUT_S = 10.0
TERMS = LeaseTerms(heartbeat_s=0.5, ttl_s=3.0)


class SimWorker:
    """What both kinds share: identity, lease, step loop in virtual time. Dead, it does nothing more."""

    def __init__(self, time: VirtualTime, store: MemoryOwnership, network: Any, name: str, role: str):
        self.time = time
        self.store = store
        self.network = network
        self.is_alive = True
        self.connections: list[Any] = []  # ended when the process dies
        self.ids = SeededIds(time)
        self.ledger = Ledger(time)
        self.identity = Identity(name, role, self.ids.incarnation(), grpc_address=f"{name}:1", http_address=f"{name}:2")
        self.health = HealthState(ProgressWatch(time))
        self.instruments = Instruments(self.ledger, Failpoints(), self.health.watch)
        self._lease = Lease(TERMS, Counters())
        self._mirror = Mirror(Counters())
        self._turn: Callable[[float], float | None] = lambda _: None
        self._is_turn_due = False

    def every(self, seconds: float, function: Callable[[], object]) -> None:
        self.later(seconds, lambda: (function(), self.every(seconds, function)))

    def later(self, seconds: float, function: Callable[[], object]) -> None:
        """Unless the process dies before."""
        self.time.after(seconds, lambda: function() if self.is_alive else None)

    def start(self, engine: Any) -> None:
        """Registers, then serves."""
        self._joining = Joining(engine.layout, self.identity.incarnation)
        self._engine = engine
        self._beat()
        self._look()

    def step_soon(self) -> None:
        if not self._is_turn_due:
            self._is_turn_due = True
            self.later(STEP_S * self.time.random.uniform(0.5, 2.0), self._step)

    def report(self, change: MirroredChange) -> None:
        self._mirror.report(change)
        self.later(0.001, self._write_changes)

    def restate(self) -> None:
        """What this worker has in the store is said again."""

    def num_streams(self) -> int:
        return 0

    def _step(self) -> None:
        self._is_turn_due = False
        if self._turn(self.time.now()) is not None:
            self.step_soon()

    def _write_changes(self) -> None:
        while (change := self._mirror.take(self.time.now())) is not None:
            if isinstance(change, Restate):
                self.restate()
                self._mirror.settle(None)
            else:
                self._mirror.settle(answer_of(apply(change, self.store)))

    def _beat(self) -> None:
        record = self._lease.begin(worker_record(self._facts()))
        found = answer_of(self.store.put_worker(record, TERMS.ttl_s))
        if self._lease.renewed(found, self.time.now()):
            self.restate()
        snapshot = newest_blocks(*self._engine.pool.published())
        if self._lease.must_publish(snapshot):
            answer_of(self.store.blocks.publish(record.incarnation, snapshot, TERMS.ttl_s))
            self._lease.published(snapshot)
        self._lease.rest(self.time.now())
        self.later(self._lease.call_at - self.time.now(), self._beat)

    def _look(self) -> None:
        others = answer_of(self.store.list_workers())
        is_registered = self._lease.last_ok is not None
        if self._joining.judge(others, is_registered=is_registered, now=self.time.now()).waits_for is None:
            self.health.ready()
            self._beat()
        elif self._joining.call_at is not None:
            self.later(self._joining.call_at - self.time.now(), self._look)

    def _facts(self) -> WorkerFacts:
        status = admin_pb2.GetStatusResponse(
            numerics_digest=self._engine.numerics_digest,
            blocks=block_counts_to_proto(self._engine.pool.counts()),
            num_streams=self.num_streams(),
        )
        watch = self.health.watch
        health = self.health.snapshot()
        return WorkerFacts(self.identity, 1, self._engine.layout, status, health, watch.seconds_since_progress)


class SimDecode(SimWorker):
    """Messages of routers reach `core.requests`, as `tests.sim.routers` brings them."""

    def __init__(self, time: VirtualTime, store: MemoryOwnership, network: Any, name: str):
        super().__init__(time, store, network, name, "decode")
        self.engine = FakeDecodeEngine(NUM_BLOCKS)
        self.memory = HashMemory(self.engine, NUM_BLOCKS)
        self.ownership = OwnershipReport(self.report, self.identity.incarnation)
        events = TransferEvents(self._claimed, self._failed, on_state=self.ownership.handoff_changed)
        incarnation = self.identity.incarnation
        self.receiver = TimedReceiver(incarnation, self.memory, self.ledger, events, network)
        self.identity.zmq_endpoint = self.receiver.endpoint
        self.sender = MoveSender(self, TimedSender(incarnation, self.memory, self.ledger, network))
        self.loop = DecodeLoop(self.engine, 8, self.instruments, self._stepped, self._handed_over)
        self._turn = self.loop.turn
        ports = DecodePorts(self.receiver, self.sender, self.ownership, self._post_step, self.ids)
        address = DecodeAddress(incarnation, self.receiver.endpoint)
        self.core = DecodeCore.build(self.engine, ports, self.instruments, address, FILL_TIMEOUT_S)
        self.every(SWEEP_S, lambda: self.core.attachments.sweep(self.time.now()))
        self.start(self.engine)

    def restate(self) -> None:
        self.core.streams.restate()

    def num_streams(self) -> int:
        return len(self.core.streams.table)

    def die(self) -> None:
        self.is_alive = False
        self.receiver.close()

    def _post_step(self, command: StepCommand) -> None:
        self.loop.take(command)
        self.step_soon()

    def _stepped(self, emissions: Sequence[Emission]) -> None:
        self.later(0.0, lambda: self.core.streams.deliver(emissions, self.time.now()))

    def _handed_over(self, handed_over: HandedOver) -> None:
        self.later(0.0, lambda: self.core.mover.handed_over(handed_over, self.time.now()))

    def _claimed(self, claim: ClaimedTransfer) -> None:
        stream = self.core.streams.table.of_transfer(claim.transfer_id)
        if stream is not None and stream.run is not None:
            self.memory.check_layers(stream.run.block_table, (0, len(stream.request.prompt_token_ids)))
        self.later(0.0, lambda: self.core.streams.claimed(claim, self.time.now()))

    def _failed(self, failure: FailedTransfer) -> None:
        self.later(0.0, lambda: self.core.streams.failed(failure, self.time.now()))


class MoveSender:
    """`decode_service.ports.BlockSender` over a sender in virtual time."""

    def __init__(self, worker: SimDecode, sender: TimedSender):
        self._worker = worker
        self._sender = sender

    def open(
        self, target: TransferTarget, block_table: Sequence[int], on_done: OnMoved, *, request_id: str
    ) -> OutgoingTransfer:
        def done(outcome: TransferOutcome) -> None:
            self._worker.later(0.0, lambda: on_done(outcome, self._worker.time.now()))

        return self._sender.open(target, block_table, done, request_id=request_id)


class SimPrefill(SimWorker):
    def __init__(self, time: VirtualTime, store: MemoryOwnership, network: Any, name: str):
        super().__init__(time, store, network, name, "prefill")
        self.engine = FakePrefillEngine(NUM_BLOCKS)
        memory = HashMemory(self.engine, NUM_BLOCKS)
        self.sender = TimedSender(self.identity.incarnation, memory, self.ledger, network)
        ports = LoopPorts(self.engine, self.sender, time.now, self.instruments)
        self.loop = PrefillLoop(ports, 64)
        self._turn = self.loop.turn
        self.submissions = Submissions(self.engine, self.loop, self._post_step)
        self.start(self.engine)

    def die(self) -> None:
        self.is_alive = False

    def call(self, request: prefill_pb2.PrefillRequest, emit: Callable[[Event], None]) -> Callable[[], None]:
        """As the gRPC server does; what it returns cancels the work."""
        engine_request = request_from_proto(request.request)
        target = target_from_proto(request.target, self.engine.layout)
        try:
            self.submissions.check(engine_request, target)
            deadline = None if engine_request.timeout_s is None else self.time.now() + engine_request.timeout_s
            prompt = Prompt(engine_request, target, emit, deadline)
            emit(prefill_pb2.PrefillResponse(queued=prefill_pb2.Queued(num_ahead=self.submissions.num_queued)))
            self.submissions.submit(prompt)
        except IsthmusError as refusal:
            emit(refusal)
            return lambda: None
        return prompt.cancel

    def _post_step(self, command: Any) -> None:
        self.loop.take(command)
        self.step_soon()
