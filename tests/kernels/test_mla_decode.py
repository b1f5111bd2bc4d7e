"""Absorbed decode attention: against an fp32 oracle, and bit for bit in any company, blocks and schedule of splits."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels.attention_decode.attend import paged_mla_decode
from kernels.attention_decode.schedule import DecodeScratch, Plan, Splits, plan_of, schedule_decode
from kernels.table import Config, UnsupportedKernel, table
from tests.kernels.latent_rows import BOGUS_BLOCK, PagedRows, paged, random_latents

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RANK, ROPE = 32, 16
SPLITS = Splits(16, 32, 64, 64, 128)  # 64, 128 and 256 positions are 4, 6 and 8 splits
FOLDING, SEPARATE = Plan(SPLITS, block_h=16, fold=True), Plan(SPLITS, block_h=16, fold=False)
TILE, AHEAD = Config({"BLOCK_N": 16, "AHEAD": 0}, 4, 2), Config({"BLOCK_N": 16, "AHEAD": 1}, 4, 2)
SMALL, COMBINE = Config({"ROWS": 32, "OTHERS": 32, "CHOICES": 5}, 4, 1), Config({"IN_FLIGHT": 2}, 1, 1)
LENGTHS = [70, 1, 16, 17, 140, 64, 33]  # one split, its edge, one past it, several, every size of split


@dataclass(frozen=True)
class Step:
    """Rows of a step: which sequence each belongs to, its position, its query and its scale."""

    sequences: list[int]
    positions: list[int]
    q: Tensor
    scale: Tensor

    def pick(self, rows: list[int]) -> "Step":
        chosen = [self.sequences[r] for r in rows], [self.positions[r] for r in rows]
        return Step(*chosen, self.q[rows], self.scale[rows])


def step_of(sequences: list[int], positions: list[int], heads: int, *, rank: int = RANK, rope: int = ROPE) -> Step:
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(len(sequences), heads, rank + rope, generator=generator).to(torch.bfloat16)
    return Step(sequences, positions, q, 0.05 + 0.2 * torch.rand(len(sequences), generator=generator))


def scratch_for(step: Step, plan: Plan, *, rank: int = RANK, context: int = 256, programs: int = 3) -> DecodeScratch:
    rows, heads = step.q.shape[:2]
    scratch = DecodeScratch.allocate(rows, heads, rank, context, DEVICE, plan=plan, programs=programs)
    for poisoned in (scratch.partials, scratch.stats):
        poisoned.fill_(torch.nan)
    return scratch


def attend(
    step: Step, rows: PagedRows, plan: Plan = FOLDING, *, forced: int = 0, scratch: DecodeScratch | None = None
) -> Tensor:
    scratch = scratch or scratch_for(step, plan)
    positions = torch.tensor(step.positions, dtype=torch.int32, device=DEVICE)
    schedule_decode(positions, scratch, step.q.shape[1], forced=forced, config=SMALL)
    return launch(step, rows, positions, scratch)


def launch(step: Step, rows: PagedRows, positions: Tensor, scratch: DecodeScratch, config: Config = TILE) -> Tensor:
    tables = rows.block_tables[step.sequences].contiguous().to(DEVICE)
    parts = (step.q.to(DEVICE), step.scale.to(DEVICE), rows.cache.to(DEVICE), tables, positions, scratch)
    return paged_mla_decode(*parts, latent_rank=RANK, config=config, combine_config=COMBINE).cpu()


def oracle(step: Step, rows: PagedRows, *, rank: int = RANK) -> Tensor:
    out = torch.zeros(len(step.sequences), step.q.shape[1], rank)
    for row, (sequence, position) in enumerate(zip(step.sequences, step.positions, strict=True)):
        if position >= 0:
            keys = rows.latents[sequence][: position + 1]
            weights = torch.softmax(step.q[row].float() @ keys.T * step.scale[row], dim=-1)
            out[row] = weights @ keys[:, :rank]
    return out


def assert_same_arithmetic(got: Tensor, want: Tensor) -> None:
    """Two different kernels: the interpreter shows that they are one formula; on a device a sum's order is its own."""
    if DEVICE.type == "cpu":
        assert torch.equal(got, want)
    assert_close(got, want.float())


def assert_close(got: Tensor, want: Tensor) -> None:
    """P and the result are rounded to bf16: 2**-8 of the largest latents that are weighted."""
    torch.testing.assert_close(got.float(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("plan", [FOLDING, SEPARATE], ids=["fold", "separate"])
@pytest.mark.parametrize(("block_size", "heads"), [(16, 4), (32, 16), (16, 24)])
def test_it_is_attention(plan: Plan, block_size: int, heads: int):
    lengths = [70, 17, 140]
    rows = paged(random_latents(lengths, RANK + ROPE), block_size)
    step = step_of([0, 1, 2], [n - 1 for n in lengths], heads)
    assert_close(attend(step, rows, plan), oracle(step, rows))


@pytest.mark.parametrize(("heads", "fp8"), [(16, False), (64, False), (128, False), (16, True), (128, True)])
def test_the_tables_own_variants_are_attention(heads: int, fp8: bool):
    """As they are launched: 512 + 64 latents, blocks of 64, lengths of one split, two and three."""
    lengths = [70, 530, 600]
    rows = paged(random_latents(lengths, 512 + 64), 64, fp8_rank=512 if fp8 else None)
    step = step_of([0, 1, 2], [n - 1 for n in lengths], heads, rank=512, rope=64)
    step = Step(step.sequences, step.positions, step.q, step.scale * 0.2)
    scratch = scratch_for(step, plan_of(heads), rank=512, context=1024)
    positions = torch.tensor(step.positions, dtype=torch.int32, device=DEVICE)
    schedule_decode(positions, scratch, heads)
    operands = [part.to(DEVICE) for part in (step.q, step.scale, rows.cache, rows.block_tables, positions)]
    got = paged_mla_decode(*operands, scratch, latent_rank=512).cpu()
    assert_close(got, oracle(step, rows, rank=512))


def test_rows_see_no_company_no_schedule_and_no_order_of_blocks():
    latents = random_latents(LENGTHS, RANK + ROPE)
    rows = paged(latents, 16)
    sequences = [0, 1, 2, 3, 4, 5, 6] + [4] * 9 + [0]
    positions = [n - 1 for n in LENGTHS] + list(range(23, 32)) + [63]
    step = step_of(sequences, positions, 4)
    together = attend(step, rows)
    for row in (3, 4):  # alone, whatever the schedule
        alone = step.pick([row])
        for forced in (0, 16, 64):
            assert torch.equal(attend(alone, rows, forced=forced)[0], together[row]), (row, forced)
        assert_same_arithmetic(attend(alone, rows, SEPARATE)[0], together[row])
    assert torch.equal(attend(step, rows, forced=32), together)
    assert torch.equal(attend(step, rows, scratch=scratch_for(step, FOLDING, programs=50)), together)
    order = list(range(16, -1, -1))
    assert torch.equal(attend(step.pick(order), paged(latents, 16, seed=5)), together[order])


def test_every_layer_uses_the_same_schedule():
    rows = paged(random_latents([40, 130], RANK + ROPE), 16)
    step = step_of([0, 1], [39, 129], 4)
    scratch = scratch_for(step, FOLDING)
    positions = torch.tensor(step.positions, dtype=torch.int32, device=DEVICE)
    schedule_decode(positions, scratch, 4, forced=32, config=SMALL)
    first = launch(step, rows, positions, scratch)
    assert_close(first, oracle(step, rows))
    assert torch.equal(launch(step, rows, positions, scratch), first)
    assert_same_arithmetic(launch(step, rows, positions, scratch, AHEAD), first)


def test_tiles_of_several_blocks_and_blocks_of_several_tiles():
    plan = Plan(Splits(32, 32, 64, 64, 128), block_h=16, fold=True)
    latents = random_latents([75, 40], RANK + ROPE)
    step = step_of([0, 1], [74, 39], 4)
    positions = torch.tensor(step.positions, dtype=torch.int32, device=DEVICE)
    results = []
    for block_size, ahead in ((16, 0), (16, 1), (32, 0), (64, 0)):
        scratch, tile = scratch_for(step, plan), Config({"BLOCK_N": 32, "AHEAD": ahead}, 4, 2)
        schedule_decode(positions, scratch, 4, config=SMALL)
        results.append(launch(step, paged(latents, block_size), positions, scratch, tile))
    assert_close(results[0], oracle(step, paged(latents, 16)))
    for result in results[1:]:
        assert_same_arithmetic(result, results[0])


def test_padding_rows_are_zero_and_cost_nothing():
    rows = paged(random_latents([50], RANK + ROPE), 16)
    rows.block_tables.resize_(2, rows.block_tables.shape[1])[1] = BOGUS_BLOCK
    step = step_of([1, 0, 1], [-1, 49, -1], 4)
    scratch = scratch_for(step, FOLDING)
    got = attend(step, rows, scratch=scratch)
    assert torch.equal(got[1], attend(step.pick([1]), rows)[0])
    assert not got[[0, 2]].any()
    assert scratch.parts[:, 1].tolist()[::2] == [0, 0]
    assert int(scratch.counters[0]) == 1 + int(scratch.parts[1, 1]) - 1


@pytest.mark.parametrize(("rank", "plan"), [(32, FOLDING), (256, SEPARATE)])
def test_eight_bit_rows(rank: int, plan: Plan):
    latents = random_latents([90, 20], rank + ROPE)
    rows = paged(latents, 32, fp8_rank=rank)
    step = step_of([0, 1], [89, 19], 4, rank=rank)
    results = []
    for forced in (16, 128):
        scratch = scratch_for(step, plan, rank=rank)
        positions = torch.tensor(step.positions, dtype=torch.int32, device=DEVICE)
        schedule_decode(positions, scratch, 4, forced=forced, config=SMALL)
        parts = (step.q, step.scale, rows.cache, rows.block_tables, positions, scratch)
        on_device = [part.to(DEVICE) if isinstance(part, Tensor) else part for part in parts]
        results.append(paged_mla_decode(*on_device, latent_rank=rank, config=TILE, combine_config=COMBINE).cpu())
    assert_close(results[0], oracle(step, rows, rank=rank))
    assert torch.equal(*results)


def test_splits_are_counted_as_they_begin():
    for plan in (plan_of(16), plan_of(128), FOLDING):
        s = plan.splits
        begins = list(range(0, s.E0, s.S0)) + list(range(s.E0, s.E1, s.S1)) + [s.E1 + s.S2 * i for i in range(4)]
        for length in (0, 1, s.S0, s.S0 + 1, s.E0, s.E0 + 1, s.E1 - 1, s.E1, s.E1 + s.S2 + 1):
            assert s.count(length) == sum(begin < length for begin in begins), (s, length)


@pytest.mark.parametrize("lengths", [[200, 30, 0, 1, 64, 256], [7] * 32, [0, 0], [256]])
@pytest.mark.parametrize("slots", [2, 100])
def test_schedule_covers_every_split_once_and_keeps_to_its_slots(lengths: list[int], slots: int):
    scratch = DecodeScratch.allocate(32, 4, RANK, 256, DEVICE, plan=FOLDING, programs=5)
    scratch.partials.resize_(slots, 1, 16, RANK)
    positions = torch.tensor([n - 1 for n in lengths], dtype=torch.int32, device=DEVICE)
    schedule_decode(positions, scratch, 4, config=SMALL)
    items = scratch.items[: int(scratch.counters[0])].tolist()
    parts = scratch.parts[: len(lengths)].tolist()
    covered = sorted((row, split) for row, first, end, _ in items for split in range(first, end))
    assert covered == [(row, split) for row, n in enumerate(lengths) for split in range(SPLITS.count(n))]
    used = []
    for row, (base, count) in enumerate(parts):
        own = sorted((first, slot) for r, first, _, slot in items if r == row)
        assert count == len(own)
        expected = [-1] if count == 1 else list(range(base, base + count))
        assert [slot for _, slot in own] == expected
        used += [slot for slot in expected if slot >= 0] if count else []
    assert len(used) == len(set(used))
    assert all(slot < slots for slot in used)


def test_what_does_not_fit_is_refused_by_name():
    rows = paged(random_latents([20], RANK + ROPE), 16)
    step = step_of([0], [19], 4)
    scratch, positions = scratch_for(step, FOLDING), torch.tensor([19], dtype=torch.int32)
    good = {"q_BHL": step.q, "scale_B": step.scale, "cache": rows.cache, "block_tables": rows.block_tables}
    bad = {
        "q_BHL": step.q.float(),
        "scale_B": step.scale.to(torch.bfloat16),
        "cache": rows.cache[..., :-1],
        "block_tables": rows.block_tables.long(),
    }
    for name, tensor in bad.items():
        with pytest.raises(ValueError, match=name):
            paged_mla_decode(**{**good, name: tensor}, positions_B=positions, scratch=scratch, latent_rank=RANK)
    with pytest.raises(ValueError, match="scratch is for"):
        paged_mla_decode(
            **good, positions_B=positions, scratch=scratch_for(step.pick([0]), FOLDING, rank=64), latent_rank=32
        )
    with pytest.raises(UnsupportedKernel, match=r"mla_decode\[heads=4,latent=32"):
        paged_mla_decode(**good, positions_B=positions, scratch=scratch, latent_rank=RANK)
    with pytest.raises(ValueError, match="257"):
        DecodeScratch.allocate(257, 4, RANK, 256, DEVICE)
    with pytest.raises(ValueError, match="2 rows, 4 heads"):
        schedule_decode(torch.zeros(2, dtype=torch.int32), scratch, 4)


def test_tiles_of_the_table_divide_splits():
    for variants in table()["mla_decode"].values():
        for variant, entry in variants.items():
            heads = int(variant.split(",")[0].removeprefix("heads="))
            assert plan_of(heads).splits.S0 % entry["constants"]["BLOCK_N"] == 0
