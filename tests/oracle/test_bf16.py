"""In bf16 we are as far from transformers in fp32 as transformers itself is."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.oracle.configs import ARCHITECTURES, MOE, SEEDS, SmallConfig, random_config
from tests.oracle.models import Write, Written, load_oracle, write_model
from tests.oracle.runs import EngineRun, distance, open_engine, prompt, run_oracle

LENGTH, PREFILLED = 240, 120
CUTS = range(4, PREFILLED, 4)
AT = [*(cut - 1 for cut in CUTS), *range(PREFILLED - 1, LENGTH)]
ENOUGH = 1e-3  # mean KL that is good in itself
RATIO = 1.5


class Compared(NamedTuple):
    exact: Tensor  # transformers in fp32
    theirs: Tensor  # transformers in bf16
    eager: Tensor  # the same with its plain attention
    ours: Tensor


def compare(model: Written, seed: int) -> Compared:
    tokens = prompt(LENGTH, seed=seed)
    oracles = [
        run_oracle(
            load_oracle(model.oracle, dtype, attn_implementation=attention, experts_implementation="eager"),
            tokens,
        )
        for dtype, attention in [(torch.float32, "sdpa"), (torch.bfloat16, "sdpa"), (torch.bfloat16, "eager")]
    ]
    run = EngineRun(open_engine(model, "bf16"), LENGTH, seed=seed)
    ours = torch.cat((run.prefill(tokens[:PREFILLED], CUTS), run.replay(tokens[PREFILLED:], PREFILLED)))
    exact, theirs, eager = (oracle.logits[AT] for oracle in oracles)
    return Compared(exact, theirs, eager, ours)


def with_all_experts(config: SmallConfig) -> SmallConfig:
    """Every expert is chosen, so that rounding cannot choose another one: distances are then small and steady."""
    if config.architecture not in MOE:
        return config
    every = {"num_experts_per_tok": config.fields["n_routed_experts"], "topk_group": config.fields["n_group"]}
    return replace(config, fields={**config.fields, **every})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_as_near_to_fp32_as_transformers(tmp_path: Path, architecture: str, seed: int):
    runs = compare(write_model(tmp_path, with_all_experts(random_config(architecture, seed))), seed)
    ours, theirs = (float(distance(runs.exact, each).mean()) for each in (runs.ours, runs.theirs))
    print(f"mean KL x 1000: ours {1e3 * ours:.3f}, transformers {1e3 * theirs:.3f}")
    assert ours <= RATIO * theirs
    assert ours <= ENOUGH or theirs > ENOUGH

    differs = runs.ours.argmax(-1) != runs.exact.argmax(-1)
    margins = runs.exact.topk(2).values.diff(dim=1).abs()[:, 0]
    assert (margins[differs] <= RATIO * noise(runs)).all()


def noise(runs: Compared) -> float:
    """What transformers' rounding moves at most: how far the best token stands before each of its four next."""
    contenders = runs.exact.topk(5).indices
    exact, *rounded = (each.gather(1, contenders) for each in (runs.exact, runs.theirs, runs.eager))
    moved = [((exact - each)[:, :1] - (exact - each)[:, 1:]).abs().max() for each in rounded]
    return float(torch.stack(moved).max())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_latents_of_the_first_layer_have_transformers_bits(written: Write, architecture: str, seed: int):
    """Rounding happens in the same places: after norm, product and bias together, and rotation."""
    model, tokens = written(architecture, seed), prompt(PREFILLED, seed=seed)
    oracle = load_oracle(model.oracle, torch.bfloat16, experts_implementation="eager")
    theirs = run_oracle(oracle, tokens).latents[0]
    run = EngineRun(open_engine(model, "bf16"), PREFILLED)
    run.prefill(tokens[:64])
    run.replay(tokens[64:], 64)
    ours = run.latents(PREFILLED)[0]
    assert theirs.dtype == ours.dtype
    assert (ours == theirs).float().mean() > 0.98


@pytest.mark.oracle
@pytest.mark.parametrize("architecture", MOE)
def test_rounding_chooses_other_experts_no_more_often(written: Write, architecture: str):
    """One wrong expert is worth a hundred times the rounding, so only many configurations together tell anything."""
    runs = [compare(written(architecture, seed), seed) for seed in range(max(SEEDS, 8))]
    ours, sdpa, eager = (
        torch.cat([distance(run.exact, each(run)) for run in runs])
        for each in (lambda r: r.ours, lambda r: r.theirs, lambda r: r.eager)
    )
    far = [int((each > 0.01).sum()) for each in (ours, sdpa, eager)]
    means = [f"{1e3 * each.mean():.2f}" for each in (ours, sdpa, eager)]
    print(f"{architecture}, ours, transformers, eager: mean KL x 1000 {means}, over 0.01 of {len(ours)}: {far}")
    assert ours.mean() <= RATIO * max(sdpa.mean(), eager.mean())
    assert far[0] <= RATIO * max(far[1:])
