"""Hundreds of small worlds in which workers die, sessions break, and clients come, go and cancel; one seed, one run."""

import random
from collections.abc import Callable
from functools import partial

import pytest

from isthmus.errors import (
    DataLoss,
    InvalidRequest,
    IsthmusError,
    NoFreeBlocks,
    StaleOwner,
    TransferIncomplete,
    WorkerLost,
)
from isthmus.v1 import decode_pb2, inference_pb2, types_pb2
from router.client.caller import ClientGone
from tests.router.fakes import Cluster, RouterUnderTest, ScriptedCaller, ask
from tests.router.scripted_decode import SCRIPT, ScriptedDecode
from tests.router.scripted_prefill import ScriptedPrefill

NUM_SEEDS = 300
NUM_REQUESTS = 12
FAULTS_S = 3.0  # for so long things go wrong
ENDS = (types_pb2.FINISH_REASON_LENGTH, types_pb2.FINISH_REASON_CANCELLED)


class World:
    """A cluster, two routers, their clients and what befalls them, all drawn from one seed."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.cluster = Cluster(seed)
        self.cluster.most_latency_s = self.rng.choice([0.0, 0.002, 0.02])
        self.num_workers = 0
        self.calls: list[tuple[ScriptedCaller, inference_pb2.GenerateRequest]] = []
        self.is_calm = False
        for _ in range(self.rng.randrange(2, 4)):
            self.add_decode()
            self.add_prefill()
        settings = {"max_streams": self.rng.choice([3, 100]), "max_queue": self.rng.choice([2, 100])}
        most = self.rng.choice([20, 4096])
        self.routers = [RouterUnderTest(self.cluster, max_buffered_tokens=most, **settings) for _ in range(2)]

    def add_decode(self) -> None:
        self.num_workers += 1
        worker = self.cluster.add_decode(f"d{self.num_workers}")
        worker.token_interval_s = self.rng.choice([0.0, 0.005, 0.05])
        worker.tokens_per_step = self.rng.choice([1, 3])
        worker.keeps_streams = self.rng.random() < 0.7
        worker.refuse = self.refuses

    def add_prefill(self) -> None:
        self.num_workers += 1
        worker = self.cluster.add_prefill(f"p{self.num_workers}")
        worker.compute_s = self.rng.choice([0.0, 0.01, 0.1])
        worker.fail = partial(self.fails, 0.1)
        worker.crash = partial(self.fails, 0.1)

    def refuses(self, reserve: decode_pb2.Reserve) -> IsthmusError | None:
        return NoFreeBlocks("full") if not self.is_calm and self.rng.random() < 0.2 else None

    def fails(self, share: float, call: int) -> IsthmusError | None:
        errors = [WorkerLost("crashed"), TransferIncomplete("lost"), StaleOwner("old")]
        return self.rng.choice(errors) if not self.is_calm and self.rng.random() < share else None

    def run(self) -> "World":
        time = self.cluster.time
        for _ in range(NUM_REQUESTS):
            time.after(self.rng.uniform(0, FAULTS_S), self.ask)
        for _ in range(self.rng.randrange(12)):
            time.after(self.rng.uniform(0, FAULTS_S), self.rng.choice(self.faults()))
        time.run_for(FAULTS_S)
        self.is_calm = True
        time.run_until(lambda: all(call.is_over for call, _ in self.calls), "every call ends", 200.0)
        for router in self.routers:
            router.is_quiet()
        return self

    def faults(self) -> list[Callable[[], object]]:
        return [self.lose_sessions, self.kill_decode, self.kill_prefill, self.leave, self.stall, self.lose_transfers]

    def ask(self) -> None:
        request = ask(f"prompt {self.rng.random()}", max_tokens=self.rng.randrange(1, 60), seed=1)
        if self.rng.random() < 0.5:
            request.on_disconnect = types_pb2.ON_DISCONNECT_RETAIN
            request.retention_s = self.rng.randrange(1, 4)
        delay_s = self.rng.choice([0.0, 0.0, 0.003, 0.2])
        timeout_s = self.rng.choice([0.1, 1.0, 60.0, 60.0])
        call = self.rng.choice(self.routers).call(request, timeout_s, delay_s)
        self.calls.append((call, request))
        self.cluster.time.after(self.rng.uniform(0, 1.0), partial(self.turn, call, request))

    def turn(self, call: ScriptedCaller, request: inference_pb2.GenerateRequest) -> None:
        """A client changes its mind, perhaps."""
        if call.is_over:
            return
        draw = self.rng.random()
        if draw < 0.2:
            call.leave()
        elif draw < 0.4 and call.result.accepted is not None:
            self.rng.choice(self.routers).lives.cancel(call.request_id, lambda found: None)
        elif draw < 0.7 and call.result.accepted is not None:
            if self.rng.random() < 0.5:
                call.leave()
            index = len(call.result.token_ids) + (call.result.first_index or 0)
            again = self.rng.choice(self.routers).resume(call.request_id, index)
            self.calls.append((again, request))
            self.cluster.time.after(self.rng.uniform(0, 1.0), partial(self.turn, again, request))

    def lose_sessions(self) -> None:
        self.one_decode().lose_sessions()

    def kill_decode(self) -> None:
        worker = self.one_decode()
        worker.go_down()
        self.cluster.time.after(self.rng.uniform(0, 0.5), lambda: self.cluster.kill(worker))
        self.cluster.time.after(self.rng.uniform(0, 1.0), self.add_decode)

    def kill_prefill(self) -> None:
        self.cluster.kill(self.one_prefill())
        self.cluster.time.after(self.rng.uniform(0, 1.0), self.add_prefill)

    def leave(self) -> None:
        """A decode worker drains: its streams move, or end with it."""
        worker = self.one_decode()
        worker.is_leaving = True
        worker.refuse = lambda reserve: NoFreeBlocks("leaving")
        worker.leave()
        self.add_decode()
        self.cluster.time.after(3.0, lambda: self.cluster.kill(worker))

    def stall(self) -> None:
        worker = self.one_decode()
        worker.max_tokens_sent = 0
        hangs = partial(self.cluster.change, worker.incarnation, state="stalled", seconds_since_progress=3.5)
        self.cluster.time.after(0.5, lambda: hangs() if worker.incarnation in self.cluster.records else None)
        self.cluster.time.after(1.5, lambda: self.cluster.kill(worker))
        self.add_decode()

    def lose_transfers(self) -> None:
        """For a moment nothing of what prefill workers send arrives."""
        worker = self.one_prefill()
        worker.commits = False
        worker.done.acked = False

        def again() -> None:
            worker.commits = True
            worker.done.acked = True

        self.cluster.time.after(0.3, again)

    def one_decode(self) -> ScriptedDecode:
        return self.rng.choice([worker for worker in self.cluster.decode if worker.is_up] or self.cluster.decode)

    def one_prefill(self) -> ScriptedPrefill:
        return self.rng.choice([worker for worker in self.cluster.prefill if worker.is_up] or self.cluster.prefill)


def check(call: ScriptedCaller, request: inference_pb2.GenerateRequest) -> None:
    """Complete, in order and equal to the script, or ended with a typed error; what came before an error is good."""
    result = call.result
    whole = (SCRIPT * 2)[: request.sampling.max_tokens]
    first = result.first_index or 0
    assert result.tokens == whole[first : first + len(result.tokens)]
    if call.error is None and not call.has_left:
        assert result.end.finish_reason in ENDS
        if result.end.finish_reason == types_pb2.FINISH_REASON_LENGTH:
            assert first + len(result.tokens) == len(whole) or result.first_index is None
            assert result.end.usage.num_generated_tokens == len(whole)
    else:
        assert call.error is None or isinstance(call.error, IsthmusError | ClientGone)
        assert not isinstance(call.error, DataLoss | InvalidRequest)


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, 50))
def test_whatever_happens_streams_are_whole_or_end_with_an_error_and_nothing_is_left(first: int) -> None:
    for seed in range(first, first + 50):
        try:
            for call, request in World(seed).run().calls:
                check(call, request)
        except AssertionError as wrong:
            raise AssertionError(f"seed {seed}") from wrong


def test_faults_of_every_kind_are_recovered_from_somewhere() -> None:
    """Or the test above would test little."""
    events = [
        (event.event, event.cause)
        for seed in range(30)
        for event in World(seed).run().cluster.ledger.read(limit=100_000)
    ]
    names = {event for event, _ in events}
    assert names >= {"request.recovered", "request.rearmed", "request.moved", "request.resumed", "placement.refused"}
    causes = {cause for event, cause in events if event == "request.failed"}
    assert causes >= {"ClientGone", "ATTACHED_ELSEWHERE", "DEADLINE_PASSED", "CANCELLED"}
    assert sum(event == ("request.finished", "length") for event in events) > 30 * NUM_REQUESTS / 4


def test_one_seed_is_one_run() -> None:
    def trace(seed: int) -> list[object]:
        world = World(seed).run()
        told = [(call.result.tokens, call.told_at, repr(call.error)) for call, _ in world.calls]
        ledger = world.cluster.ledger.read(limit=100_000)
        return [*told, *[(e.event, e.request_id, e.transfer_id, e.attempt, e.cause, e.fields) for e in ledger]]

    for seed in range(5):
        assert trace(seed) == trace(seed)
    assert trace(1) != trace(2)
