"""The prefill loop without thread, socket or real time: who is computed when, what it is told, what it leaves."""

from dataclasses import replace

import pytest

from isthmus.errors import (
    DeadlinePassed,
    InvalidRequest,
    LayoutMismatch,
    NonFiniteLogits,
    Overloaded,
    RequestCancelled,
    StaleOwner,
)
from isthmus.kv.layout import KvLayout, Plane, PlaneKind
from isthmus.steps import StepResult
from isthmus.testing.hash_model import next_token
from isthmus.types import Request, SamplingParams, Token
from prefill_service.prefill_loop import BLOCKED_WAIT_S, MAX_RUNNING
from prefill_service.submissions import MAX_PROMPTS
from tests.prefill.core_world import LAYER_S, STEP_S, TARGET, PrefillWorld, Submitted

NUM_LAYERS = 4
STEP_WITH_LAYERS_MS = 1000 * (STEP_S + NUM_LAYERS * LAYER_S)


def first_token_of(submitted: Submitted) -> int:
    return next_token(submitted.prompt.request, ())


def test_an_idle_loop_asks_for_no_turn() -> None:
    world = PrefillWorld()
    assert world.turn() is None
    assert not world.progress.is_working


def test_a_prompt_hears_of_its_first_tile_its_chunks_its_token_and_its_end() -> None:
    world = PrefillWorld(tile_budget=64)
    submitted = world.submit(150)
    world.run()
    assert world.engine.steps == [[(0, 64)], [(64, 64)], [(128, 22)]]
    assert submitted.kinds == ["progress", "progress", "progress", "first_token"]
    assert submitted.last("first_token").token.id == first_token_of(submitted)
    world.transfer(submitted).end()
    assert submitted.kinds[-1] == "done"
    assert submitted.last("done").acked
    assert world.blocks_in_use == (0, 0)


def test_rows_are_offered_before_the_commit_and_each_place_once_it_exists() -> None:
    world = PrefillWorld(tile_budget=64)
    submitted = world.submit(100)
    world.run()
    places = [("latent", layer) for layer in range(NUM_LAYERS)]
    rows = [(*place, start, n) for start, n in ((0, 64), (64, 36)) for place in places]
    assert world.transfer(submitted).said == [*rows, (Token(first_token_of(submitted)),)]


def test_a_second_planes_rows_leave_when_they_exist_and_not_with_the_first_planes() -> None:
    planes = (
        Plane("latent", PlaneKind.APPEND_ONLY, 4, 2, "fp32"),
        Plane("indexer", PlaneKind.APPEND_ONLY, 2, 1, "fp32"),
    )
    world = PrefillWorld(layout=KvLayout("ab" * 16, planes, 16))
    submitted = world.submit(10)
    left_before: list[list[tuple[str, int]]] = []
    world.engine.at_layer = lambda _: left_before.append(
        [(plane, layer) for plane, layer, _, _ in world.transfer(submitted).rows]
    )
    world.run()
    order = [("latent", 0), ("indexer", 0), ("latent", 1), ("indexer", 1), ("latent", 2), ("latent", 3)]
    assert left_before == [order[:n] for n in range(len(order))]
    assert [(plane, layer) for plane, layer, _, _ in world.transfer(submitted).rows] == order


def test_spans_run_from_the_first_tile_to_the_last_and_to_the_last_acknowledgement() -> None:
    world = PrefillWorld(tile_budget=64)
    submitted = world.submit(128)
    world.run()
    acked_ns = world.clock.now_ns() + 30_000_000
    world.transfer(submitted).end(last_ack_ns=acked_ns)
    done = submitted.last("done")
    assert done.prefill_ms == pytest.approx(2 * STEP_WITH_LAYERS_MS)
    assert done.transfer_exposed_ms == pytest.approx(30)
    assert [float(tile.fields["ms"]) for tile in world.recorded("prefill.tile")] == [STEP_WITH_LAYERS_MS] * 2


def test_a_request_that_ends_at_its_first_token_without_a_target_is_done_at_once() -> None:
    world = PrefillWorld()
    submitted = world.submit(10, sends=False)
    world.run()
    assert submitted.kinds == ["progress", "first_token", "done"]
    assert world.sender.transfers == {}


def test_a_request_that_ends_at_its_first_token_tells_decode_that_it_is_not_needed() -> None:
    world = PrefillWorld()
    submitted = world.submit(10, sampling=SamplingParams(max_tokens=1))
    world.run()
    assert world.transfer(submitted).said[-1] == "finished at token 0 (finished)"


def test_prompts_get_blocks_by_priority_then_by_arrival() -> None:
    world = PrefillWorld(num_blocks=4)
    low, high, high_too = [world.submit(64, first=n, priority=p) for n, p in ((1, 0), (100, 5), (200, 5))]
    for submitted in (high, high_too, low):
        assert world.turn() == 0
        assert "first_token" in submitted.kinds
        world.transfer(submitted).end()
    started = [entry.request_id for entry in world.recorded("prefill.started")]
    assert started == [submitted.prompt.request_id for submitted in (high, high_too, low)]


def test_no_more_than_so_many_prompts_run_at_once() -> None:
    world = PrefillWorld(num_blocks=64, tile_budget=64)
    for number in range(MAX_RUNNING + 1):
        world.submit(5, first=1 + 10 * number)
    world.turn()
    assert len(world.recorded("prefill.started")) == MAX_RUNNING


def test_a_prompt_waits_for_blocks_that_a_send_still_reads() -> None:
    world = PrefillWorld(num_blocks=4)
    first = world.submit(64)
    world.run()
    assert world.blocks_in_use == (4, 4)
    second = world.submit(64, first=100)
    assert world.turn() == pytest.approx(BLOCKED_WAIT_S)
    assert not world.progress.is_working
    assert second.said == []
    world.transfer(first).end()
    world.run()
    assert "first_token" in second.kinds


def test_what_was_computed_before_is_sent_at_once_and_not_computed_again() -> None:
    world = PrefillWorld()
    world.submit(100)
    world.run()
    again = world.submit(100)
    world.run()
    assert again.last("first_token").num_cached_tokens == 96
    assert world.engine.steps[-1] == [(96, 4)]
    assert world.transfer(again).rows[:NUM_LAYERS] == [("latent", layer, 0, 96) for layer in range(NUM_LAYERS)]


def test_one_tenants_prefix_is_not_anothers() -> None:
    world = PrefillWorld()
    world.submit(100, tenant="a")
    world.run()
    other = world.submit(100, tenant="b")
    world.run()
    assert other.last("first_token").num_cached_tokens == 0


def test_the_last_prompt_token_is_always_computed() -> None:
    world = PrefillWorld()
    world.submit(64)
    world.run()
    again = world.submit(64)
    world.run()
    assert again.last("first_token").num_cached_tokens == 48
    assert world.engine.steps[-1] == [(48, 16)]


def test_a_step_is_abandoned_when_most_of_its_rows_are_of_cancelled_prompts() -> None:
    world = PrefillWorld()
    staying, *gone = [world.submit(64, first=first) for first in (1, 100, 200)]

    def cancel(layer: int) -> None:
        if layer == 1:
            for submitted in gone:
                submitted.prompt.cancel()

    world.engine.at_layer = cancel
    assert world.turn() == 0
    assert [submitted.kinds for submitted in (staying, *gone)] == [["progress"]] * 3
    assert len(world.transfer(staying).rows) == 1  # layer 0, before the cancels were seen
    world.run()
    assert [submitted.kinds[1:] for submitted in gone] == [["RequestCancelled"]] * 2
    assert world.engine.steps[1] == [(0, 64)]
    assert staying.last("first_token").token.id == first_token_of(staying)
    assert [world.transfer(submitted).said[-1] for submitted in gone] == ["CANCELLED"] * 2


def test_a_cancelled_prompt_that_is_the_lesser_part_of_a_step_is_sent_no_more() -> None:
    world = PrefillWorld()
    gone, *staying = [world.submit(64, first=first) for first in (1, 100, 200)]
    world.engine.at_layer = lambda layer: gone.prompt.cancel() if layer == 2 else None
    world.run()
    assert len(world.engine.steps) == 1
    assert len(world.transfer(gone).rows) == 2
    assert [submitted.kinds[-1] for submitted in staying] == ["first_token"] * 2
    assert gone.kinds == ["progress", "RequestCancelled"]


def test_what_a_cancelled_prompt_had_computed_is_found_by_the_next() -> None:
    world = PrefillWorld(tile_budget=64)
    first = world.submit(300)
    assert [world.turn(), world.turn()] == [0, 0]
    first.prompt.cancel()
    assert world.turn() is None
    again = world.submit(300)
    world.run()
    assert again.last("first_token").num_cached_tokens == 128


def test_a_prompt_out_of_time_ends_between_two_layers_of_a_step() -> None:
    world = PrefillWorld()
    late = world.submit(64, timeout_s=STEP_S + 1.5 * LAYER_S)
    world.turn()
    assert late.kinds == ["progress"]
    assert len(world.transfer(late).rows) == 1
    world.turn()
    assert isinstance(late.said[-1], DeadlinePassed)


def test_a_prompt_out_of_time_ends_while_it_waits_for_blocks() -> None:
    world = PrefillWorld(num_blocks=4)
    world.submit(64)
    world.run()
    late = world.submit(64, first=100, timeout_s=1.0)
    assert world.turn() == pytest.approx(BLOCKED_WAIT_S)
    world.clock.advance(1.0)
    assert world.turn() is None
    assert isinstance(late.said[-1], DeadlinePassed)


def test_a_prompt_cancelled_at_the_end_of_its_step_gets_no_token() -> None:
    world = PrefillWorld()
    gone, staying = world.submit(16), world.submit(64, first=100)
    world.engine.at_layer = lambda layer: gone.prompt.cancel() if layer == NUM_LAYERS - 1 else None
    world.run()
    assert gone.kinds == ["progress", "RequestCancelled"]
    assert world.transfer(gone).said[-1] == "CANCELLED"
    assert staying.kinds[-1] == "first_token"


def test_logits_that_are_not_finite_end_their_prompt_alone() -> None:
    world = PrefillWorld()
    broken, fine = world.submit(10), world.submit(10, first=100)
    results: list[StepResult] = [NonFiniteLogits("token 0"), Token(5)]
    world.engine.results = results
    world.run()
    assert isinstance(broken.said[-1], NonFiniteLogits)
    assert world.transfer(broken).said[-1] == "NON_FINITE_LOGITS"
    assert fine.last("first_token").token.id == 5


@pytest.mark.parametrize(
    "name", ["prefill.step", "prefill.layer", "prefill.before_first_token", "prefill.before_commit"]
)
def test_a_failed_step_ends_its_own_prompts_and_not_the_loop(name: str) -> None:
    world = PrefillWorld(num_blocks=8, tile_budget=64, failpoints=f"{name}=raise@1")
    hurt = world.submit(64)
    waiting = world.submit(100, first=100)  # no blocks for it yet
    world.turn()
    assert "FailpointError" in str(hurt.said[-1])
    world.transfer(hurt).end("aborted")
    world.run()
    assert waiting.kinds[-1] == "first_token"
    world.transfer(waiting).end()
    assert world.blocks_in_use == (0, 0)


def test_a_lost_device_is_for_the_driver_to_hear_of() -> None:
    world = PrefillWorld(failpoints="prefill.layer=raise@1")
    hurt = world.submit(64)
    world.engine.device_lost = True
    with pytest.raises(RuntimeError, match="illegal memory access"):
        world.turn()
    assert hurt.kinds == ["progress"]


def test_a_transfer_that_cannot_be_opened_ends_the_prompt() -> None:
    world = PrefillWorld()
    world.sender.refusal = Overloaded("no more transfers", retry_after_s=1.0)
    submitted = world.submit(64)
    world.run()
    assert submitted.said == [world.sender.refusal]
    assert world.blocks_in_use == (0, 0)


def test_a_transfer_that_fails_is_told_as_such() -> None:
    world = PrefillWorld()
    submitted = world.submit(64)
    world.run()
    world.transfer(submitted).end("no answer")
    assert (submitted.last("done").acked, submitted.last("done").failure) == (False, "no answer")


def test_the_end_of_the_loop_is_the_end_of_every_prompt() -> None:
    world = PrefillWorld(num_blocks=8, tile_budget=64)
    running = world.submit(100)
    waiting = world.submit(100, first=200)
    world.turn()
    world.loop.close(world.clock.now())
    assert isinstance(running.said[-1], RequestCancelled)
    assert isinstance(waiting.said[-1], RequestCancelled)
    world.transfer(running).end("aborted")
    assert world.blocks_in_use == (0, 0)


def test_the_same_tokens_at_any_tile_budget() -> None:
    worlds = [PrefillWorld(tile_budget=tile_budget) for tile_budget in (64, 128, 256)]
    prompts = [[world.submit(n, first=100 * n) for n in (3, 64, 150, 200)] for world in worlds]
    for world in worlds:
        world.run()
    tokens = [[submitted.last("first_token").token.id for submitted in row] for row in prompts]
    assert tokens == [[first_token_of(submitted) for submitted in prompts[0]]] * 3


def test_prompts_are_counted_until_they_end_and_refused_at_the_bound() -> None:
    world = PrefillWorld(num_blocks=4)
    prompts = [world.submit(64, first=n) for n in range(MAX_PROMPTS)]
    assert world.submissions.num_queued == MAX_PROMPTS
    with pytest.raises(Overloaded):
        world.submit(64, first=MAX_PROMPTS)
    world.turn()
    assert "first_token" in prompts[0].kinds
    assert world.submissions.num_queued == MAX_PROMPTS - 1  # though its transfer goes on
    world.submit(64, first=MAX_PROMPTS)
    assert world.submissions.num_draining_blocks == 4


@pytest.mark.parametrize(
    ("num_tokens", "digest", "fingerprint", "refusal"),
    [
        (0, "", None, InvalidRequest),
        (4096, "", None, InvalidRequest),
        (10, "ee" * 16, None, StaleOwner),
        (10, "", "ee" * 16, LayoutMismatch),
    ],
)
def test_what_the_worker_cannot_do_is_refused(
    num_tokens: int, digest: str, fingerprint: str | None, refusal: type[Exception]
) -> None:
    world = PrefillWorld()
    request = Request("r", 1, tuple(range(num_tokens)), SamplingParams(max_tokens=1), numerics_digest=digest)
    target = None if fingerprint is None else replace(TARGET, layout_fingerprint=fingerprint)
    with pytest.raises(refusal):
        world.submissions.check(request, target)


def test_what_the_worker_can_do_is_taken() -> None:
    world = PrefillWorld()
    own = replace(TARGET, layout_fingerprint=world.engine.layout.fingerprint)
    request = Request("r", 1, tuple(range(4095)), SamplingParams(max_tokens=1))
    world.submissions.check(request, own)
    world.submissions.check(replace(request, numerics_digest=world.engine.numerics_digest), None)
