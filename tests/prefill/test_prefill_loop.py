"""The prefill loop: what a prompt is told, what cancelling stops, and what stays for the next time."""

import time

import numpy as np
import pytest

from isthmus.engine.engine import Engine
from isthmus.errors import IsthmusError, RequestCancelled
from isthmus.failpoints import Failpoints
from kv_transfer.receiver_events import ClaimedTransfer
from tests.kv_transfer.world import DecodeSide, wait_until
from tests.prefill.conftest import AtLayer, Submitted, decoding, landed, prefilling, prompt, reserve

NUM_LAYERS = 4


def kinds(submitted: Submitted) -> list[str | None]:
    return ["error" if isinstance(event, IsthmusError) else event.WhichOneof("event") for event in submitted.said]


def test_a_prompt_hears_of_its_first_tile_then_of_each_chunk(decode: DecodeSide) -> None:
    with prefilling(tile_budget=64) as prefill:
        submitted = prefill.submit(prompt(150), reserve(decode, 0, 150))
        assert submitted.until("done").acked
        assert submitted.progress() == [0, 64, 128]
        assert kinds(submitted) == ["progress", "progress", "progress", "first_token", "done"]
        tiles = prefill.recorded("prefill.tile")
        assert [(tile.fields["start"], tile.fields["num_tokens"]) for tile in tiles] == [
            ("0", "64"),
            ("64", "64"),
            ("128", "22"),
        ]
        assert all(float(tile.fields["ms"]) > 0 for tile in tiles)


def test_tokens_emitted_before_change_nothing(decode: DecodeSide) -> None:
    with prefilling() as prefill:
        plain = prefill.submit(prompt(50), reserve(decode, 0, 50)).until("first_token").token
        again = prefill.submit(prompt(50), reserve(decode, 10, 50), emitted_token_ids=(plain.id, 3, 5))
        assert again.until("first_token").token == plain
        assert again.until("done").acked


def test_cancelling_most_of_a_step_ends_it_at_the_next_layer_and_the_rest_is_computed_again(
    decode: DecodeSide,
) -> None:
    with prefilling() as prefill:
        first_token = prefill.submit(prompt(64, seed=1), reserve(decode, 40, 64)).until("first_token").token
    points = AtLayer()
    with prefilling(points, start=False) as prefill:
        gone = [prefill.submit(prompt(64, seed), reserve(decode, 10 * seed, 64)) for seed in (2, 3)]
        staying = prefill.submit(prompt(64, seed=1), reserve(decode, 0, 64))

        def cancel() -> None:
            for submitted in gone:
                submitted.prompt.cancel()

        points.actions[2] = cancel
        prefill.thread.start()
        done = staying.until("done")
        assert all(isinstance(submitted.until("error"), RequestCancelled) for submitted in gone)
        assert points.num_layers == 2 + NUM_LAYERS
        assert kinds(staying) == ["progress", "first_token", "done"]
        assert staying.said[1].first_token.token == first_token
        assert (done.acked, done.transfer_frames) == (True, NUM_LAYERS)  # layer 0 went out before, and not again
    np.testing.assert_array_equal(landed(decode, 0, 64), landed(decode, 40, 64))


def test_cancelling_the_lesser_part_of_a_step_costs_the_others_nothing(decode: DecodeSide) -> None:
    points = AtLayer()
    with prefilling(points, start=False) as prefill:
        gone, *staying = [prefill.submit(prompt(64, seed), reserve(decode, 10 * seed, 64)) for seed in (1, 2, 3)]
        points.actions[2] = gone.prompt.cancel
        prefill.thread.start()
        assert all(submitted.until("done").acked for submitted in staying)
        assert isinstance(gone.until("error"), RequestCancelled)
        assert points.num_layers == NUM_LAYERS


def test_ten_cancelled_long_prompts_delay_a_short_one_by_less_than_half_a_second() -> None:
    with prefilling(Failpoints.parse("prefill.layer=sleep(0.05)")) as prefill:
        began = time.monotonic()
        prefill.submit(prompt(16), None).until("done")
        alone_s = time.monotonic() - began
        long = [prefill.submit(prompt(2000, seed), None) for seed in range(1, 11)]
        long[0].until("progress")
        for submitted in long:
            submitted.prompt.cancel()
        began = time.monotonic()
        prefill.submit(prompt(16, seed=11), None).until("done")
        assert time.monotonic() - began - alone_s < 0.5
        assert all(isinstance(submitted.until("error"), RequestCancelled) for submitted in long)
    counts = prefill.engine.pool.counts()
    assert (counts.referenced, counts.draining) == (0, 0)


def test_a_prompt_that_comes_again_after_its_decode_worker_is_lost_is_found_in_the_cache(decode: DecodeSide) -> None:
    num_tokens = 150
    with prefilling() as prefill:
        with decoding() as lost:
            first = prefill.submit(prompt(num_tokens), reserve(lost, 0, num_tokens))
            token = first.until("first_token").token
            assert first.until("done").acked
        again = prefill.submit(prompt(num_tokens), reserve(decode, 3, num_tokens))
        assert again.until("first_token").num_cached_tokens == 144  # whole blocks of 16
        assert again.said[-1].first_token.token == token
        assert again.until("done").acked
        assert isinstance(decode.next(), ClaimedTransfer)
        np.testing.assert_array_equal(landed(decode, 3, num_tokens), landed(lost, 0, num_tokens))
        assert [tile.fields["start"] for tile in prefill.recorded("prefill.tile")] == ["0", "144"]


def test_what_a_cancelled_prompt_had_computed_is_found_too(decode: DecodeSide) -> None:
    points = AtLayer()
    with prefilling(points, tile_budget=64) as prefill:
        first = prefill.submit(prompt(300), reserve(decode, 0, 300))
        points.actions[2 * NUM_LAYERS + 1] = first.prompt.cancel
        first.until("error")
        again = prefill.submit(prompt(300), reserve(decode, 20, 300))
        assert again.until("first_token").num_cached_tokens == 128
        assert again.until("done").acked


@pytest.mark.parametrize(
    "name", ["prefill.step", "prefill.layer", "prefill.before_first_token", "prefill.before_commit"]
)
def test_an_error_anywhere_ends_the_prompts_of_the_step_and_not_the_loop(decode: DecodeSide, name: str) -> None:
    with prefilling(Failpoints.parse(f"{name}=raise@1")) as prefill:
        hurt = prefill.submit(prompt(64), reserve(decode, 0, 64)).until("error")
        assert "FailpointError" in hurt.detail
        assert prefill.submit(prompt(64), reserve(decode, 10, 64)).until("done").acked
        wait_until(lambda: prefill.engine.pool.counts().referenced == 0)
        assert prefill.engine.pool.counts().draining == 0


@pytest.mark.parametrize("when", ["a step fails", "idle"])
def test_a_lost_device_ends_the_loop_and_its_owner_hears(
    decode: DecodeSide, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def lost(_: Engine) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    points = Failpoints.parse("prefill.layer=raise@1") if when == "a step fails" else Failpoints()
    with prefilling(points, start=False) as prefill:
        monkeypatch.setattr(Engine, "check_device", lost)
        if when == "a step fails":
            prefill.submit(prompt(64), reserve(decode, 0, 64))
        prefill.thread.start()
        wait_until(lambda: prefill.crashes)
        assert "illegal memory access" in str(prefill.crashes[0])
