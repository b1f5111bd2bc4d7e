"""All served architectures against transformers in fp32: logits, greedy tokens and the cached latents themselves."""

import random

import pytest
import torch

from isthmus.checkpoint.directory import Checkpoint, resolve_model
from isthmus.engine.engine import Engine
from tests.oracle.configs import ARCHITECTURES
from tests.oracle.models import Model, Write, load_oracle
from tests.oracle.runs import EngineRun, open_engine, prompt, run_oracle

FEW_SEEDS = 6
NUM_PROMPT, NUM_EMITTED = 150, 48  # ends past the third tile and past every scaled rotary embedding's original context
MARGIN = 1e-3  # a greedy token may differ only where the oracle's two best logits are closer than this


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_tokens_and_latents_equal_transformers(written: Write, architecture: str, seed: int):
    model = written(architecture, seed)
    check(open_engine(model), load_oracle(model.oracle), seed)


def test_the_bundled_checkpoint_equals_transformers():
    check(Engine.open(Checkpoint.open("bundled"), num_blocks=256), load_oracle(resolve_model("bundled")), seed=1)


def check(engine: Engine, oracle: Model, seed: int) -> None:
    token_ids = prompt(NUM_PROMPT, seed=seed, vocab_size=engine.model_config.vocab_size)
    cuts = sorted({64, *random.Random(seed).sample(range(1, NUM_PROMPT), 4)})
    ours = EngineRun(engine, NUM_PROMPT + NUM_EMITTED, seed=seed)

    prefilled = ours.prefill(token_ids, cuts)
    tokens, decoded = ours.greedy(prefilled[-1], NUM_PROMPT, NUM_EMITTED)

    # One forward over our own tokens: up to the first difference it sees what its own generation would see.
    run = run_oracle(oracle, [*token_ids, *tokens[:-1]])
    at = [*(cut - 1 for cut in cuts), *range(NUM_PROMPT - 1, NUM_PROMPT + NUM_EMITTED - 1)]
    torch.testing.assert_close(torch.cat((prefilled[:-1], decoded)), run.logits[at], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(ours.latents(run.latents.shape[1]), run.latents, atol=1e-4, rtol=1e-5)
    differs = run.logits[NUM_PROMPT - 1 :].argmax(-1) != torch.tensor(tokens)
    assert (run.margins[NUM_PROMPT - 1 :][differs] < MARGIN).all()
