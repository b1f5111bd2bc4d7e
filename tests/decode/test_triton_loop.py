"""The step loop over the kernels' decoder, interpreted: what runs a step ahead on a GPU, in its real threads.

Prompts are computed in plain torch: the interpreter serves one thread at a time, and that is the step loop's.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from isthmus.engine.canary import Numerics
from isthmus.engine.engine import USUAL_LIMITS, Engine
from isthmus.engine.latent_cache import LatentCache
from isthmus.engine.open_runner import open_decoder
from isthmus.engine.runner import StepRunner, TorchRunner
from isthmus.engine.triton_decoder import TritonDecoder
from isthmus.engine.triton_runner import TritonRunner
from isthmus.kv.block_pool import BlockPool
from isthmus.kv.planes import kv_layout
from isthmus.types import Request, SamplingParams, Token
from isthmus.v1 import types_pb2
from tests.decode import world as world_module
from tests.decode.world import world
from tests.engine.test_triton_runner import DEVICE, model, tokens

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE.type == "cuda", reason="its blocks are sent from host memory"),
]

MAX_ROWS = 16
KINDS = {
    "greedy": SamplingParams(3, temperature=0.0),
    "drawn": SamplingParams(4, temperature=0.9, top_p=0.9, min_p=0.01),
    "penalised": SamplingParams(3, temperature=1.0, repetition_penalty=1.2, frequency_penalty=0.3),
    "with logprobs": SamplingParams(2, temperature=0.7, top_k=20, logprobs=2),
}


def engine_over(make: Callable[[LatentCache], StepRunner]) -> Engine:
    bf16 = model(torch.bfloat16)
    layout = kv_layout(bf16.config, "", dtype="bf16", block_size=16)
    cached = LatentCache(layout, 24, DEVICE)
    runner = make(cached)
    numerics = Numerics("0" * 32, {})
    pool, decoder = BlockPool(24, 16), open_decoder(runner)
    return Engine(bf16.config, runner, decoder, cached, pool, layout, numerics, DEVICE, "bf16", USUAL_LIMITS)


@cache
def engine(name: str) -> Engine:
    bf16 = model(torch.bfloat16)
    if name == "prefill":
        return engine_over(lambda cached: TorchRunner(bf16, cached))
    return engine_over(lambda cached: TritonRunner(bf16, cached, MAX_ROWS))


def request(kind: str, **fields: object) -> Request:
    prompt = tuple(tokens(5 + len(kind), seed=len(kind)))
    return replace(world_module.request(sampling=KINDS[kind]), prompt_token_ids=prompt, **fields)


async def run(*asked: Request) -> dict[str, list[Token]]:
    """All of them at once, by what they were asked under."""
    async with world("d1") as here:
        router = await here.router()
        for one in asked:
            await router.start(here.prefill, one)
        for _ in asked:
            ended = (await router.until("ended")).ended
            assert ended.finish_reason == types_pb2.FINISH_REASON_LENGTH, ended
        return dict(router.tokens_of)


async def test_company_and_replay_change_nothing_ahead_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world_module, "engine", engine)
    assert isinstance(engine("d1").decoder, TritonDecoder)
    asked = {kind: request(kind) for kind in KINDS}
    together = await run(*asked.values())
    for one in asked.values():
        assert len(together[one.request_id]) == one.sampling.max_tokens
    drawn = asked["drawn"]
    expected = together[drawn.request_id]
    again = replace(drawn, request_id=f"{drawn.request_id[:-1]}z", emitted_token_ids=(expected[0].id, expected[1].id))
    assert (await run(again))[again.request_id] == expected[2:]
