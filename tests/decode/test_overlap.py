"""A decoder that runs ahead gives what one that does not gives, and no step touches a block that was given back."""

import asyncio
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest

from decode_service.step_messages import HandedOver
from isthmus.engine.engine import Engine
from isthmus.engine.sampler import sample
from isthmus.kv.planes import LATENT
from isthmus.steps import DecodeRow, FromPrevious, OnStored, SamplingInput, StepResult, StepRow, needs_its_tokens
from isthmus.text.finish import finish_reason, is_full
from isthmus.types import Request, SamplingParams, Token
from isthmus.v1 import decode_pb2, types_pb2
from tests.decode import test_any_order as any_order
from tests.decode import world as world_module
from tests.decode.world import SEEDED, Router, Worker, oracle, request, world
from tests.kv_transfer.world import wait_until

PLAIN = SamplingParams(max_tokens=100, temperature=1.0, top_p=0.9)
engine_of = world_module.engine


class LateDecoder:
    """Computes a step when its results are taken: later than any device would."""

    runs_ahead = True

    def __init__(self, engine: Engine):
        self.engine = engine
        self.pending: list[LateStep] = []
        self.num_ahead = 0  # rows that took a sample the host had not seen
        self.fails: dict[int, str] = {}  # step -> where
        self.num_steps = 0
        self.generation: Counter[int] = Counter()  # of each block: how often it was allocated
        self._allocate, engine.pool.allocate = engine.pool.allocate, self._counted

    def submit(self, rows: Sequence[StepRow], sampling: Sequence[SamplingInput], on_stored: OnStored) -> "LateStep":
        assert len(self.pending) <= 1
        self.num_steps += 1
        fails = self.fails.get(self.num_steps, "")
        if fails == "submit":
            raise RuntimeError
        on_stored(LATENT, 0)
        copies = [SamplingInput(one.request, list(one.token_ids)) for one in sampling]
        for row, one in zip(rows, copies, strict=True):
            index = row.position + 1 - len(one.request.prompt_token_ids)
            assert not is_full(one.request, index, self.engine.context_length), "a row past the end"
            if isinstance(row.token, FromPrevious):
                self.num_ahead += 1
                assert self.pending
                assert not needs_its_tokens(one.request.sampling)
            else:
                assert row.token == one.token_ids[-1]
                assert len(one.token_ids) == index
        step = LateStep(self, rows, copies, self.pending[-1] if self.pending else None, fails == "results")
        self.pending.append(step)
        return step

    def blocks(self, rows: Sequence[StepRow]) -> list[tuple[int, int]]:
        """(block, generation) of everything the rows read or write, each with a reference."""
        size, references = self.engine.pool.block_size, self.engine.pool._references
        used = [block for row in rows for block in row.block_table[: row.position // size + 1]]
        assert all(references[block] for block in used)
        return [(block, self.generation[block]) for block in used]

    def _counted(self, num_blocks: int, *, from_set_aside: bool = False) -> list[int]:
        blocks = self._allocate(num_blocks, from_set_aside=from_set_aside)
        self.generation.update(blocks)
        return blocks


class LateStep:
    def __init__(
        self,
        decoder: LateDecoder,
        rows: Sequence[StepRow],
        sampling: Sequence[SamplingInput],
        before: "LateStep | None",
        fails: bool,
    ):
        self.decoder, self.rows, self.sampling, self.before, self.fails = decoder, rows, sampling, before, fails
        self.used = decoder.blocks(rows)
        self.ids: list[int] = []

    def results(self) -> list[StepResult]:
        assert self.decoder.pending.pop(0) is self
        assert self.decoder.blocks(self.rows) == self.used, "a block was given back under a pending step"
        if self.fails:
            raise RuntimeError
        rows, sampling = [], []
        for row, one in zip(self.rows, self.sampling, strict=True):
            token = row.token
            if isinstance(token, FromPrevious):
                assert self.before is not None
                token = (self.before.ids or [0] * (token.index + 1))[token.index]
            index = row.position + 1 - len(one.request.prompt_token_ids)
            known = [*one.token_ids, *[0] * (index - len(one.token_ids))]  # which ones they are must not matter
            rows.append(DecodeRow(token, row.position, row.block_table))
            sampling.append(SamplingInput(one.request, known))
        results = sample(self.decoder.engine.runner.decode(rows), sampling)
        self.ids = [result.id if isinstance(result, Token) else 0 for result in results]
        return results


@dataclass
class Decoders:
    made: list[LateDecoder]

    def __call__(self, name: str) -> Engine:
        engine = engine_of(name)
        if name == "prefill":
            return engine
        self.made.append(LateDecoder(engine))
        return replace(engine, decoder=self.made[-1])


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[Decoders]:
    """Workers decode late; what the decoders were asked for."""
    decoders = Decoders([])
    monkeypatch.setattr(world_module, "engine", decoders)
    yield decoders
    for decoder in decoders.made:
        decoder.engine.pool.allocate = decoder._allocate
        assert not decoder.pending


def ends(asked: Request) -> list[Token]:
    """What the request gives up to its end."""
    tokens = oracle(replace(asked, emitted_token_ids=(), timeout_s=None))
    ids = [token.id for token in tokens]
    return next(tokens[:n] for n in range(1, len(ids) + 1) if finish_reason(asked, ids[:n], 10**6))


def any_request(rng: random.Random) -> Request:
    """Of any kind; half of them end at a token that nobody could foresee."""
    sampling = rng.choice([PLAIN, PLAIN, replace(PLAIN, temperature=0.0), replace(PLAIN, logprobs=0), SEEDED])
    asked = request(rng.randint(1, 70), replace(sampling, max_tokens=rng.choice([1, 2, 3, 20, 40])))
    ids = [token.id for token in oracle(asked)]
    if rng.random() < 0.5:
        stops = (rng.choice(ids),)
        asked = replace(asked, eos_token_ids=stops) if rng.random() < 0.5 else with_stop(asked, stops)
    num_tokens = len(ends(asked))
    if rng.random() < 0.4:
        asked = replace(asked, emitted_token_ids=tuple(ids[: rng.randint(0, num_tokens - 1)]))
    return replace(asked, timeout_s=30.0) if rng.random() < 0.2 else asked


def with_stop(asked: Request, stops: tuple[int, ...]) -> Request:
    return replace(asked, sampling=replace(asked.sampling, stop_token_ids=stops))


async def listen(router: Router, kind: str, ended: dict[str, decode_pb2.StreamEnded]) -> decode_pb2.SessionResponse:
    while (message := await router._hear()).WhichOneof("message") != kind:
        if message.WhichOneof("message") == "ended":
            ended[message.ended.request_id] = message.ended
    return message


@pytest.mark.parametrize("seed", range(6))
async def test_mixed_batches_give_the_tokens_of_the_oracle(late: Decoders, seed: int) -> None:
    rng = random.Random(seed)
    asked = {one.request_id: one for one in (any_request(rng) for _ in range(8))}
    ended: dict[str, decode_pb2.StreamEnded] = {}
    async with world("d1") as here:
        router = await here.router()
        for one in asked.values():
            router.say(reserve=decode_pb2.Reserve(request=world_module.request_to_proto(one), attach=router.key(1)))
            reserved = (await listen(router, "reserved", ended)).reserved
            await here.prefill.fill(one, reserved)
            if rng.random() < 0.3:
                begun = list(asked)[: list(asked).index(one.request_id) + 1]
                name = rng.choice(begun)
                router.say(cancel=decode_pb2.CancelStream(request_id=name, attach=router.key(1)))
            if rng.random() < 0.1:
                here.clock.advance(31.0)
        waiting = set(asked) - set(ended)
        while waiting:
            message = (await listen(router, "ended", ended)).ended
            ended[message.request_id] = message
            waiting.discard(message.request_id)
    for name, one in asked.items():
        expected = ends(one)[len(one.emitted_token_ids) :]
        tokens = router.tokens_of.get(name, [])
        assert ended[name].finish_reason != types_pb2.FINISH_REASON_ERROR, ended[name]
        whole = ended[name].finish_reason in (types_pb2.FINISH_REASON_STOP, types_pb2.FINISH_REASON_LENGTH)
        assert tokens == (expected if whole else expected[: len(tokens)]), (seed, one)


@pytest.mark.parametrize("seed", range(3))
async def test_moves_and_takeovers_lose_nothing(late: Decoders, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(any_order, "SEEDED", PLAIN)
    handed_over = Worker.handed_over

    def watched(worker: Worker, answer: HandedOver) -> None:
        assert not worker.step_loop._steps
        handed_over(worker, answer)

    monkeypatch.setattr(Worker, "handed_over", watched)
    await any_order.test_no_token_is_lost_repeated_or_changed(seed)
    assert sum(decoder.num_ahead for decoder in late.made) > 20


@pytest.mark.parametrize("num_emitted", [0, 1, 17, 39])
@pytest.mark.parametrize("sampling", [PLAIN, SEEDED], ids=["ahead", "one by one"])
async def test_replay_goes_on_with_the_same_bits(late: Decoders, sampling: SamplingParams, num_emitted: int) -> None:
    plain = request(sampling=replace(sampling, max_tokens=40))
    expected = oracle(plain)
    async with world("d1") as here:
        router = await here.router()
        emitted = tuple(token.id for token in expected[:num_emitted])
        await router.start(here.prefill, replace(plain, emitted_token_ids=emitted))
        tokens, _ = await router.rest(plain.request_id, num_emitted)
        assert tokens == expected[num_emitted:]
    assert (late.made[0].num_ahead > 0) == (sampling is PLAIN and num_emitted < 39)
    assert late.made[0].num_steps == 39 - max(0, num_emitted - 1)


@pytest.mark.parametrize("where", ["submit", "results"])
async def test_a_step_that_fails_ends_its_streams_after_the_tokens_before_it(late: Decoders, where: str) -> None:
    asked = request(sampling=PLAIN)
    async with world("d1") as here:
        late.made[0].fails[5] = where
        router = await here.router()
        await router.start(here.prefill, asked)
        tokens, ended = await router.rest(asked.request_id, 0)
        assert (ended.finish_reason, ended.reason) == (types_pb2.FINISH_REASON_ERROR, "INTERNAL")
        assert tokens == oracle(asked)[:5]


async def test_a_lost_device_ends_the_worker_and_no_stream(late: Decoders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing works in the process any more; the stream goes on elsewhere."""

    def check(_: Engine) -> None:
        if late.made[0].num_steps >= 5:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(Engine, "check_device", check)
    asked = request(sampling=PLAIN)
    async with world("d1") as here:
        worker = here.workers[0]
        late.made[0].fails[5] = "results"
        router = await here.router()
        await router.start(here.prefill, asked)
        await router.tokens(asked.request_id, 0, 5)
        await asyncio.to_thread(wait_until, lambda: worker.crashes)
        assert "illegal memory access" in str(worker.crashes[0])
        await router.was_heard()  # only tokens came before
        assert router.tokens_of[asked.request_id] == oracle(asked)[:5]
        late.made[0].pending.clear()
        for run in worker.step_loop._scheduler:
            run.free(worker.engine.pool)
        worker.crashes.clear()
