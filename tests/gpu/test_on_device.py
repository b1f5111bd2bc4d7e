"""On a GPU: torch there is torch here, the kernels are near to both, and no bit depends on anything but the row.

pytest -m gpu tests/gpu
"""

import asyncio
import json
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from isthmus.checkpoint.directory import Checkpoint
from isthmus.engine.engine import Engine
from isthmus.engine.sampler import sample
from isthmus.engine.triton_decoder import TritonDecoder
from isthmus.engine.triton_runner import TritonRunner
from isthmus.steps import DecodeRow, FromPrevious, SamplingInput, StepRow
from isthmus.types import Request, SamplingParams, Token
from tests.gpu.runs import LIMITS, Prompted, decode, engine, forced, greedy, latents, placed, prefill, prompted, texts

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]

NUM_TOKENS = 48
BATCHES = (1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 255, 256)


def kernels() -> Engine:
    opened = engine("bf16", "cuda")
    assert isinstance(opened.runner, TritonRunner), "see the log line triton_unsupported"
    return opened


def divergence(exact: Tensor, other: Tensor) -> Tensor:
    """KL of each row."""
    p, q = exact.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def assert_equal_rows(one: Tensor, other: Tensor) -> None:
    differing = (one != other).flatten(1).any(-1).nonzero().flatten().tolist()
    assert differing == [], f"rows {differing} differ"


def test_torch_in_fp32_gives_the_same_tokens_as_on_the_cpu():
    here, there = engine("fp32", "cpu"), engine("fp32", "cuda")
    tokens = [
        greedy(opened, placed(opened, texts()), NUM_TOKENS).argmax(-1).flatten().tolist() for opened in (here, there)
    ]
    assert there.numerics.ingredients["kernels"] == "torch"
    assert tokens[0] == tokens[1]


def test_kernels_are_near_to_torch_in_fp32():
    """Along the same tokens: mean KL at most 1e-3, and another best token only where the best two were near."""
    exact_engine, opened = engine("fp32", "cuda"), kernels()
    exact = greedy(exact_engine, placed(exact_engine, texts()), NUM_TOKENS)
    ours = forced(opened, placed(opened, texts()), exact.argmax(-1))
    kl = divergence(exact, ours)
    print(json.dumps({"mean_kl": float(kl.mean()), "max_kl": float(kl.max())}))
    assert float(kl.mean()) <= 1e-3
    best = exact.topk(2, dim=-1).values
    differs = exact.argmax(-1) != ours.argmax(-1)
    assert bool(((best[..., 0] - best[..., 1])[differs] < 0.1).all())


def test_graphs_are_captured_and_give_the_bits_of_eager_steps():
    opened = kernels()
    runner = opened.runner
    assert isinstance(runner, TritonRunner)
    assert sorted(runner.graphs._graphs) == list(runner.buffers.buckets)
    for count in (1, 16, 40, 200, 256):
        bucket = runner.buffers.bucket_of(count)
        sequences = prompted(opened, [7 + i % 50 for i in range(count)], room=4)
        prefill(opened, sequences)
        rows = [DecodeRow(i, len(one.tokens), one.table) for i, one in enumerate(sequences)]
        graph = runner.launch(rows)[:count].clone()
        runner.buffers.stage(rows, bucket)
        assert_equal_rows(graph, runner.graphs.run_eagerly(bucket)[:count])


def test_a_step_may_have_more_rows_than_a_graph():
    opened = kernels()
    sequences = prompted(opened, [20] * LIMITS.decode_rows, room=4)
    for first in range(0, len(sequences), 64):
        prefill(opened, sequences[first : first + 64])
    tokens = [(31 * i + 5) % 2048 for i in range(len(sequences))]
    everyone = decode(opened, sequences, tokens)
    assert_equal_rows(decode(opened, sequences[250:270], tokens[250:270]), everyone[250:270])


@pytest.mark.parametrize("block_size", [16, 64])
def test_a_decode_row_is_the_same_in_every_batch(block_size: int):
    """Of 256 sequences the first so many, in reversed order too; lengths over several splits."""
    opened = engine("bf16", "cuda", block_size)
    assert isinstance(opened.runner, TritonRunner)
    lengths = [3 + 97 * i % 1400 for i in range(256)]
    sequences = prompted(opened, lengths, room=8)
    for first in range(0, 256, 16):
        prefill(opened, sequences[first : first + 16])
    tokens = [(31 * i + 5) % 2048 for i in range(256)]
    everyone = decode(opened, sequences, tokens)
    for count in BATCHES:
        assert_equal_rows(decode(opened, sequences[:count], tokens[:count]), everyone[:count])
        assert_equal_rows(decode(opened, sequences[-count:][::-1], tokens[-count:][::-1]).flip(0), everyone[-count:])


def test_blocks_cuts_and_company_change_no_bit_of_a_prompt():
    opened = kernels()
    lengths = [1, 9, 63, 64, 65, 130, 500, 1300]
    alone, stored = [], []
    for one in prompted(opened, lengths):
        alone.append(prefill(opened, [one])[0])
        stored.append(latents(opened, one, len(one.tokens)))
    for blocks, cuts in ((1, ()), (2, (64,)), (3, (21, 22, 85, 400)), (4, (1, 128, 129, 640))):
        sequences = prompted(opened, lengths, blocks=blocks)
        assert_equal_rows(prefill(opened, sequences, cuts), torch.stack(alone))
        for one, expected in zip(sequences, stored, strict=True):
            assert torch.equal(latents(opened, one, len(one.tokens)), expected)


def test_block_sizes_give_one_numerics_class():
    digests = {size: engine("bf16", "cuda", size).numerics.digest for size in (16, 32, 64)}
    assert len(set(digests.values())) == 1, digests
    assert kernels().numerics.ingredients["kernels"].startswith("triton ")


def inputs_for(sequences: Sequence[Prompted], emitted: Sequence[Sequence[int]]) -> list[SamplingInput]:
    """Every kind of sampling in turn."""
    kinds = [
        SamplingParams(64, temperature=0.0, logprobs=0),
        SamplingParams(64, temperature=1.0, logprobs=0),
        SamplingParams(64, temperature=0.7, top_p=0.9, top_k=50, logprobs=0),
        SamplingParams(64, temperature=1.3, min_p=0.05, logit_bias=((7, 2.0), (9, -100.0))),
    ]
    return [
        SamplingInput(Request(f"r{i}", 1000 + i, tuple(one.tokens), kinds[i % len(kinds)]), ids)
        for i, (one, ids) in enumerate(zip(sequences, emitted, strict=True))
    ]


def run_ahead(
    opened: Engine, sequences: Sequence[Prompted], places: Sequence[int], num_tokens: int
) -> list[list[Token]]:
    """Tokens with logprobs of these sequences, each step launched on samples the host has not seen."""
    decoder = opened.decoder
    assert isinstance(decoder, TritonDecoder)
    everyone = inputs_for(sequences, [[3]] * len(sequences))
    sampling = [everyone[place] for place in places]
    chosen = [sequences[place] for place in places]
    prefill(opened, chosen)
    tokens: list[list[Token]] = [[] for _ in places]
    pending = None
    for step in range(num_tokens):
        rows = [
            StepRow(FromPrevious(i) if step else 3, len(one.tokens) + step, one.table) for i, one in enumerate(chosen)
        ]
        submitted = decoder.submit(rows, sampling)
        take(tokens, pending)
        pending = submitted
    take(tokens, pending)
    return tokens


def take(tokens: list[list[Token]], pending) -> None:
    if pending is not None:
        for own, result in zip(tokens, pending.results(), strict=True):
            assert isinstance(result, Token)
            own.append(result)


def test_tokens_and_logprobs_are_the_same_at_concurrency_1_and_32():
    opened = kernels()
    sequences = prompted(opened, [5 + 37 * i % 400 for i in range(32)])
    together = run_ahead(opened, sequences, range(32), NUM_TOKENS)
    for place in range(8):
        assert run_ahead(opened, sequences, [place], NUM_TOKENS)[0] == together[place]


def test_tokens_taken_from_the_step_before_are_those_the_host_would_pass():
    opened = kernels()
    sequences = prompted(opened, [11, 40, 90, 200, 333])
    ahead = run_ahead(opened, sequences, range(5), 12)
    prefill(opened, sequences)
    given = [[3, *(token.id for token in own[:-1])] for own in ahead]
    for step in range(12):
        rows = [
            StepRow(tokens[step], len(one.tokens) + step, one.table)
            for one, tokens in zip(sequences, given, strict=True)
        ]
        sampling = inputs_for(sequences, [tokens[: step + 1] for tokens in given])
        results = opened.decoder.submit(rows, sampling).results()
        assert results == [own[step] for own in ahead]


@pytest.mark.parametrize("vocab_size", [2048, 102400])
def test_the_device_samples_what_the_host_does_in_every_batch(vocab_size: int):
    from isthmus.engine.device_sampler import DeviceSampler

    device = torch.device("cuda")
    logits = torch.randn(256, vocab_size, generator=torch.Generator().manual_seed(1)).mul_(4)
    sequences = [Prompted([1, 2, 3], [])] * 256
    inputs = inputs_for(sequences, [[i % 50] * (i % 5) for i in range(256)])
    sampler = DeviceSampler(vocab_size, 256, device)
    on_device = logits.to(device)
    everyone = sampler.sample(on_device, inputs)
    assert [token.id for token in everyone] == [token.id for token in sample(logits, inputs)]
    for count in BATCHES:
        assert sampler.sample(on_device[-count:].contiguous(), inputs[-count:]) == everyone[-count:]


def test_a_memory_profile_leaves_room_for_the_largest_steps():
    opened = Engine.open(
        Checkpoint.open("bundled"), dtype="bf16", device="cuda", block_size=64, num_blocks=None, limits=LIMITS
    )
    num_blocks, free = opened.cache.shape.num_blocks, torch.cuda.mem_get_info()[0]
    print(json.dumps({"num_blocks": num_blocks, "gib_free": free / (1 << 30)}))
    assert num_blocks * opened.layout.block_bytes > 4 * free  # most of what there was is blocks now
    sequences = prompted(opened, [300] * 256, room=8)
    for first in range(0, 256, 8):
        prefill(opened, sequences[first : first + 8])
    assert torch.isfinite(decode(opened, sequences, [5] * 256)).all()


def test_another_thread_may_run_the_steps():
    """Engines are opened in one thread and driven by another; streams and devices are a thread's own."""
    opened = kernels()
    sequences = prompted(opened, [33, 70])
    expected = prefill(opened, sequences), decode(opened, sequences, [4, 5])

    async def elsewhere() -> tuple[Tensor, Tensor]:
        first = await asyncio.to_thread(prefill, opened, sequences)
        return first, await asyncio.to_thread(decode, opened, sequences, [4, 5])

    again = asyncio.run(elsewhere())
    for one, other in zip(expected, again, strict=True):
        assert torch.equal(one, other)
