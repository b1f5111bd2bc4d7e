"""A drafting plane goes along when a stream moves, and is nobody's trouble where only one of the workers has it."""

from dataclasses import replace

import pytest
import torch

from tests.decode.test_moving import move, moved, running
from tests.decode.world import DRAFT, DRAFTING, SEEDED, Worker, oracle, request, until, world

LONG = replace(SEEDED, max_tokens=100)


async def draft_rows(worker: Worker, request_id: str, num_rows: int) -> torch.Tensor:
    """[layers, rows, elements] as they lie in the stream's blocks, once its run is in the step loop."""
    stream = worker.table.get(request_id)
    assert stream is not None
    await until(lambda: worker.step_loop._scheduler.find(stream.transfer_id), "its run is in the step loop")
    run = worker.step_loop._scheduler.find(stream.transfer_id)
    assert run is not None
    layers = worker.engine.cache.layers[DRAFT.name]
    return torch.stack([layer[run.block_table].flatten(0, 1)[:num_rows] for layer in layers]).clone()


@pytest.mark.parametrize("names", [(DRAFTING, DRAFTING), ("", DRAFTING), (DRAFTING, "")], ids=["both", "new", "old"])
async def test_a_stream_moves_whichever_worker_has_a_drafting_plane(names: tuple[str, str]) -> None:
    asked = request(sampling=LONG)
    async with world(f"d1{names[0]}", f"d2{names[1]}") as here:
        source, target = here.workers
        assert source.engine.layout.fingerprint == target.engine.layout.fingerprint
        first, second = await running(here, asked)
        tokens = await first.tokens(asked.request_id, 0, 5)
        for worker, value in ((source, 1.0), (target, 0.0)):
            for layer, rows in enumerate(worker.engine.cache.layers.get(DRAFT.name, [])):
                rows.copy_(value * (1 + layer + torch.arange(rows.numel()).view_as(rows)))
        with source.held(), target.held():
            num_rows = len(asked.prompt_token_ids) + len(tokens) - 1
            left = await draft_rows(source, asked.request_id, num_rows) if names[0] else None
            reserved = await second.reserve(asked, counter=2, moves=True)
            first.say(move=move(first, asked, reserved))
            await first.was_heard()
            source.may_step.set()
            answer = await moved(first)
            assert answer.acked, answer.failure
            if names[1]:
                came = await draft_rows(target, asked.request_id, num_rows)
                assert torch.equal(came, torch.zeros_like(came) if left is None else left)
        after, _ = await second.rest(asked.request_id, 0)
        assert after == oracle(asked)
