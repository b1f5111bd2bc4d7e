"""Steps over the kernels, interpreted without a GPU: near to plain torch; no bit depends on company, cuts or blocks.

Two layers of the bundled model, one dense and one with experts, and a quarter of its vocabulary; `tests/gpu` does the
same at full size.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from isthmus.checkpoint.directory import Checkpoint
from isthmus.engine.decode_graphs import buckets
from isthmus.engine.latent_cache import LatentCache
from isthmus.engine.open_runner import open_runner
from isthmus.engine.runner import StepRunner, TorchRunner
from isthmus.engine.triton_decoder import TritonDecoder
from isthmus.engine.triton_runner import TritonRunner
from isthmus.errors import CannotStart
from isthmus.kv.planes import LATENT, kv_layout
from isthmus.model import Model, load_model
from isthmus.model.triton_model import TritonModel
from isthmus.steps import DecodeRow, FromPrevious, PrefillChunk, SamplingInput, StepRow
from isthmus.types import Request, SamplingParams, Token
from kernels.table import UnsupportedKernel
from tests.engine.engines import prompt

pytestmark = pytest.mark.slow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_SIZE, NUM_BLOCKS = 16, 24
VOCAB = 512
PROMPT, REPLAYED = 11, (5, 170)


@cache
def model(dtype: torch.dtype) -> Model:
    whole = load_model(Checkpoint.open("bundled", 64), dtype, DEVICE, keeps_fp8=False)
    config = replace(whole.config, sparse_layers=whole.config.sparse_layers[:2], vocab_size=VOCAB)
    return replace(
        whole, config=config, layers=whole.layers[:2], embedding=whole.embedding[:VOCAB], head=whole.head[:, :VOCAB]
    )


def tokens(count: int, seed: int = 0) -> list[int]:
    return [token % VOCAB for token in prompt(count, seed)]


def poisoned_cache(dtype: str) -> LatentCache:
    layout = kv_layout(model(torch.bfloat16).config, "", dtype=dtype, block_size=BLOCK_SIZE)
    made = LatentCache(layout, NUM_BLOCKS, DEVICE)
    for layer in made.layers[LATENT]:
        layer.fill_(torch.nan)
    return made


@cache
def triton_runner() -> TritonRunner:
    return TritonRunner(model(torch.bfloat16), poisoned_cache("bf16"), max_rows=16)


class Prompted(NamedTuple):
    tokens: list[int]
    table: list[int]


class Outcome(NamedTuple):
    logits: Tensor  # of the prompt's end and of each replayed token
    latents: Tensor


def outcomes(runner: StepRunner, sequences: Sequence[Prompted], cut: int | None) -> list[Outcome]:
    """Prefill, cut once or not at all, then the replayed tokens in one step."""
    if cut:
        runner.prefill([PrefillChunk(one.tokens[:cut], 0, one.table, needs_logits=False) for one in sequences])
    start = cut or 0
    first = runner.prefill([PrefillChunk(one.tokens[start:], start, one.table, needs_logits=True) for one in sequences])
    rows = [
        DecodeRow(token, len(one.tokens) + index, one.table)
        for one in sequences
        for index, token in enumerate(REPLAYED)
    ]
    later = runner.decode(rows).unflatten(0, (len(sequences), -1))
    stored = [
        torch.stack([layer[one.table].flatten(0, 1)[: len(one.tokens) + 2] for layer in runner.cache.layers[LATENT]])
        for one in sequences
    ]
    return [Outcome(torch.cat((a[None], b)), c) for a, b, c in zip(first, later, stored, strict=True)]


@cache
def alone() -> Outcome:
    return outcomes(triton_runner(), [Prompted(tokens(PROMPT), [3])], cut=None)[0]


def divergence(exact: Tensor, other: Tensor) -> Tensor:
    """KL of each row."""
    p, q = exact.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def test_logits_are_as_near_to_fp32_as_torchs():
    sequence = [Prompted(tokens(PROMPT), [3])]
    exact = outcomes(TorchRunner(model(torch.float32), poisoned_cache("fp32")), sequence, cut=None)[0]
    torchs = outcomes(TorchRunner(model(torch.bfloat16), poisoned_cache("bf16")), sequence, cut=None)[0]
    ours, theirs = (float(divergence(exact.logits, one.logits).mean()) for one in (alone(), torchs))
    assert ours <= max(1e-3, 1.5 * theirs)
    torch.testing.assert_close(alone().latents, torchs.latents, atol=0.05, rtol=0.05)


def test_company_cuts_and_blocks_change_no_bit():
    others = [Prompted(tokens(4, seed=1), [1]), Prompted(tokens(7, seed=2), [8])]
    together = outcomes(triton_runner(), [others[0], Prompted(tokens(PROMPT), [20]), others[1]], cut=3)[1]
    assert torch.equal(together.logits, alone().logits)
    assert torch.equal(together.latents, alone().latents)


def test_tokens_that_only_the_device_knows_are_taken_from_the_step_before():
    runner = triton_runner()
    alone()
    rows = [DecodeRow(token, PROMPT + index, [3]) for index, token in enumerate(REPLAYED)]
    runner.buffers.sampled[:3] = torch.tensor([1, REPLAYED[1], REPLAYED[0]], dtype=torch.int32)
    logits = runner.launch([replace(row, token_id=0) for row in rows], [2, 1])
    assert torch.equal(logits[:2], alone().logits[1:])


def request(sampling: SamplingParams, request_id: str) -> Request:
    return Request(request_id, 7, tuple(tokens(PROMPT)), sampling)


def test_a_step_is_launched_on_tokens_of_a_pending_one():
    runner = triton_runner()
    alone()
    decoder = TritonDecoder(runner)
    inputs = [
        SamplingInput(request(SamplingParams(8, temperature=0.0, logprobs=0), "greedy"), [REPLAYED[0]]),
        SamplingInput(request(SamplingParams(8, temperature=0.9, top_p=0.9), "drawn"), [REPLAYED[0]]),
    ]
    # Both sequences are the same prompt; the second is in a block of its own.
    for layer in runner.cache.layers[LATENT]:
        layer[9] = layer[3]
    first = decoder.submit([StepRow(REPLAYED[0], PROMPT, [block]) for block in (3, 9)], inputs)
    second = decoder.submit([StepRow(FromPrevious(i), PROMPT + 1, [block]) for i, block in ((0, 3), (1, 9))], inputs)
    taken = [first.results(), second.results()]
    assert taken[0][0].id == int(alone().logits[1].argmax())
    known = [SamplingInput(one.request, [REPLAYED[0], token.id]) for one, token in zip(inputs, taken[0], strict=True)]
    rows = [StepRow(token.id, PROMPT + 1, [block]) for token, block in zip(taken[0], (3, 9), strict=True)]
    assert decoder.submit(rows, known).results() == taken[1]
    assert isinstance(taken[1][0], Token)
    assert taken[1][0].logprob is not None


def test_the_numerics_class_names_what_computes():
    name = triton_runner().kernels
    assert name.startswith("triton ")
    assert name != TorchRunner.kernels


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([DecodeRow(VOCAB, 0, [0])], "token ids"),
        ([DecodeRow(1, 16, [0])], "blocks"),
        ([DecodeRow(1, 64, [0] * 9)], "context"),
        ([], "at least one"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows: list[DecodeRow], message: str):
    with pytest.raises(ValueError, match=message):
        triton_runner().decode(rows)


def test_what_the_callback_raises_ends_a_prefill_step():
    def stop(_plane: str, layer: int) -> None:
        if layer == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        triton_runner().prefill([PrefillChunk(tokens(2), 0, [2], needs_logits=True)], stop)


def test_models_that_no_kernel_takes_are_refused_by_name():
    with pytest.raises(UnsupportedKernel, match="float32"):
        TritonModel(model(torch.float32))
    config = replace(model(torch.bfloat16).config, vocab_size=2040)
    with pytest.raises(UnsupportedKernel, match="vocabulary is 2040"):
        TritonModel(replace(model(torch.bfloat16), config=config))


def test_what_the_table_lacks_is_refused_by_name():
    layout = kv_layout(model(torch.bfloat16).config, "", dtype="fp8", block_size=BLOCK_SIZE)
    cache = LatentCache(layout, NUM_BLOCKS, DEVICE)
    with pytest.raises(UnsupportedKernel, match=r"latent=64,.*rows=fp8.* is not in the kernel table for sm_"):
        TritonRunner(model(torch.bfloat16), cache, max_rows=16)
    with pytest.raises(CannotStart) as refused:
        open_runner(model(torch.bfloat16), 16, cache)
    assert refused.value.setting == "cache_dtype"


def test_buckets_double_up_to_the_largest_step():
    assert buckets(1) == (16,)
    assert buckets(17) == (16, 32)
    assert buckets(128) == (16, 32, 64, 128)
    assert buckets(200) == (16, 32, 64, 128, 208)
    assert buckets(256 + 64) == (16, 32, 64, 128, 256)
