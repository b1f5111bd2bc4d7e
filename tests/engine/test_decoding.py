"""The decoder that computes at once, and which requests keep the next step from running ahead."""

import pytest

from isthmus.engine.decoding import HostDecoder
from isthmus.engine.sampler import sample
from isthmus.kv.planes import LATENT
from isthmus.steps import DecodeRow, FinishedStep, SamplingInput, StepRow, needs_its_tokens
from isthmus.types import Request, SamplingParams
from tests.engine.engines import bundled_engine, prefill, prompt, scattered_table


def test_the_host_decoder_samples_what_the_runner_computes() -> None:
    engine, tokens = bundled_engine(), tuple(prompt(40))
    table = scattered_table(engine, 60, seed=1)
    prefill(engine, tokens, table)
    request = Request("r", 7, tokens, SamplingParams(max_tokens=9, logprobs=3))
    sampling, stored = [SamplingInput(request, [11]), SamplingInput(request, [11, 12])], list[tuple[str, int]]()
    logits = engine.runner.decode([DecodeRow(11, 40, table), DecodeRow(12, 41, table)])
    decoder = HostDecoder(engine.runner)
    rows = [StepRow(11, 40, table), StepRow(12, 41, table)]
    step = decoder.submit(rows, sampling, lambda *place: stored.append(place))
    assert stored == [(LATENT, layer) for layer in range(engine.model_config.num_layers)]
    assert step.results() == sample(logits, sampling)
    assert not decoder.runs_ahead


def test_a_failed_step_raises_when_its_results_are_taken() -> None:
    with pytest.raises(RuntimeError, match="lost"):
        FinishedStep(RuntimeError("lost")).results()


@pytest.mark.parametrize(
    ("sampling", "needs"),
    [
        ({}, False),
        ({"logprobs": 0}, False),
        ({"logit_bias": ((3, 1.0),), "min_tokens": 4, "stop_token_ids": (9,)}, False),
        ({"logprobs": 1}, True),
        ({"presence_penalty": 0.1}, True),
        ({"frequency_penalty": -0.1}, True),
        ({"repetition_penalty": 1.1}, True),
    ],
)
def test_penalties_and_lists_of_logprobs_need_their_tokens(sampling: dict[str, object], needs: bool) -> None:
    assert needs_its_tokens(SamplingParams(max_tokens=9, **sampling)) == needs  # type: ignore[arg-type]
