"""What one step computes, laid out as index tensors before the first layer runs: rows, cache slots, tiles.

Positions are absolute. A row is a token to compute. Rows are padded to the step's group with token 0 at position 0:
results of padding are never read, its latents never stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from isthmus.kv.slots import CacheShape, slots_at
from isthmus.steps import TILE, DecodeRow, PrefillChunk
from kernels.attention_decode.definition import MIN_PAIRS, DecodePairs
from kernels.attention_prefill.definition import KeyTile, PrefillTiles
from kernels.shapes import DECODE_GROUP

# (row, tile) pairs attended at once in decode: bounds the gathered latents (16 to 150 KiB a pair).
MAX_PAIRS = 1024


@dataclass(frozen=True, slots=True)
class StepRows:
    token_ids: Tensor  # [N]
    positions: Tensor  # [N]
    slots: Tensor  # [num_rows] where each row's latent is stored
    num_rows: int
    group: int  # rows of one product: the step's role
    logit_rows: Tensor  # rows whose logits are wanted, in the caller's order, padded to DECODE_GROUP
    num_logits: int


@dataclass(frozen=True, slots=True)
class PrefillStep:
    rows: StepRows
    tiles: PrefillTiles


@dataclass(frozen=True, slots=True)
class DecodeStep:
    rows: StepRows
    pairs: tuple[DecodePairs, ...]  # each for a run of consecutive rows


def prefill_step(chunks: Sequence[PrefillChunk], cache: CacheShape, device: torch.device) -> PrefillStep:
    """Chunks one after the other; a sequence has at most one chunk in a step."""
    ends = np.cumsum([len(chunk.token_ids) for chunk in chunks])
    positions = np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks])
    tables = [_padded_table(chunk.block_table, chunk.end, cache) for chunk in chunks]
    slots = [
        slots_at(table, np.arange(chunk.start, chunk.end), cache.block_size)
        for chunk, table in zip(chunks, tables, strict=True)
    ]
    rows = _step_rows(
        np.concatenate([np.asarray(chunk.token_ids, dtype=np.int64) for chunk in chunks]),
        positions,
        np.concatenate(slots),
        group=TILE,
        logit_rows=[int(end) - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.needs_logits],
        device=device,
    )
    return PrefillStep(rows, _prefill_tiles(chunks, tables, rows.token_ids.shape[0], cache, device))


def decode_step(rows: Sequence[DecodeRow], cache: CacheShape, device: torch.device) -> DecodeStep:
    """Rows are taken in descending order of context; logits come back in the caller's order."""
    tiles = np.asarray([row.position // TILE + 1 for row in rows])
    order = np.argsort(-tiles, kind="stable")
    sorted_rows = [rows[index] for index in order]
    parts: list[tuple[DecodePairs, np.ndarray]] = []
    first = 0
    while first < len(rows):
        last = first + max(1, MAX_PAIRS // int(tiles[order[first]]))
        parts.append(_decode_pairs(sorted_rows[first:last], cache, device))
        first = last
    pairs, slots = zip(*parts, strict=True)
    step_rows = _step_rows(
        np.asarray([row.token_id for row in sorted_rows]),
        np.asarray([row.position for row in sorted_rows]),
        np.concatenate(slots),
        group=DECODE_GROUP,
        logit_rows=np.argsort(order).tolist(),
        device=device,
    )
    return DecodeStep(step_rows, pairs)


def _step_rows(
    token_ids: np.ndarray,
    positions: np.ndarray,
    slots: np.ndarray,
    *,
    group: int,
    logit_rows: list[int],
    device: torch.device,
) -> StepRows:
    num_rows = token_ids.shape[0]
    padding = (0, -num_rows % group)
    return StepRows(
        token_ids=torch.from_numpy(np.pad(token_ids, padding)).to(device),
        positions=torch.from_numpy(np.pad(positions, padding)).to(device),
        slots=torch.from_numpy(slots).to(device),
        num_rows=num_rows,
        group=group,
        logit_rows=torch.tensor(logit_rows + [0] * (-len(logit_rows) % DECODE_GROUP)).to(device),
        num_logits=len(logit_rows),
    )


def _padded_table(block_table: Sequence[int], num_positions: int, cache: CacheShape) -> np.ndarray:
    """The blocks of `num_positions`, padded to whole tiles with block 0, whose slots are replaced before any read."""
    num_blocks = -(-num_positions // cache.block_size)
    table = np.zeros(-(-num_positions // TILE) * (TILE // cache.block_size), dtype=np.int64)
    table[:num_blocks] = block_table[:num_blocks]
    return table


def _decode_pairs(rows: Sequence[DecodeRow], cache: CacheShape, device: torch.device) -> tuple[DecodePairs, np.ndarray]:
    """Pairs of rows that stand in descending order of tiles, and the slot each row's own latent is stored in."""
    own = np.asarray([row.position for row in rows])
    num_tiles = own // TILE + 1
    most = int(num_tiles[0])
    tables = np.zeros((len(rows), most * (TILE // cache.block_size)), dtype=np.int64)
    for table, row in zip(tables, rows, strict=True):
        num_blocks = row.position // cache.block_size + 1
        table[:num_blocks] = row.block_table[:num_blocks]
    positions = np.broadcast_to(np.arange(most * TILE), (len(rows), most * TILE))
    hidden = positions > own[:, None]
    seen = slots_at(tables, positions, cache.block_size)
    slots = np.where(hidden, cache.zero_slot, seen).reshape(-1, most, TILE).swapaxes(0, 1)
    exists = np.arange(most)[:, None] < num_tiles  # [T, B]
    of_row = np.where(exists, (exists.cumsum() - 1).reshape(exists.shape), exists.sum())
    copies = max(1, MIN_PAIRS // int(exists.sum()))
    hidden_pairs = hidden.reshape(-1, most, TILE).swapaxes(0, 1)[exists][:, None]
    pairs = DecodePairs(
        slots=torch.from_numpy(np.tile(slots[exists], (copies, 1)).reshape(-1)).to(device),
        hidden=torch.from_numpy(np.tile(hidden_pairs, (copies, 1, 1))).to(device),
        row=torch.from_numpy(np.tile(np.nonzero(exists)[1], copies)).to(device),
        of_row=torch.from_numpy(of_row.reshape(-1)).to(device),
        rows_with_tile=tuple(exists.sum(axis=1).tolist()),
    )
    return pairs, slots_at(tables, own[:, None], cache.block_size)[:, 0]


def _prefill_tiles(
    chunks: Sequence[PrefillChunk], tables: Sequence[np.ndarray], num_rows: int, cache: CacheShape, device: torch.device
) -> PrefillTiles:
    query_tiles = [
        (tile, sequence)
        for sequence, chunk in enumerate(chunks)
        for tile in range(chunk.start // TILE, (chunk.end - 1) // TILE + 1)
    ]
    query_tiles.sort(key=lambda query_tile: -query_tile[0])
    rows = np.zeros(len(query_tiles) * TILE, dtype=np.int64)
    slot_of_row = np.zeros(num_rows, dtype=np.int64)
    first_rows = np.cumsum([0, *(len(chunk.token_ids) for chunk in chunks)])
    for index, (tile, sequence) in enumerate(query_tiles):
        chunk = chunks[sequence]
        positions = np.arange(max(chunk.start, tile * TILE), min(chunk.end, (tile + 1) * TILE))
        step_rows = first_rows[sequence] + positions - chunk.start
        slots = (index - tile) * TILE + positions
        rows[slots] = step_rows
        slot_of_row[step_rows] = slots
    ends = [chunk.end for chunk in chunks]
    return PrefillTiles(
        rows=torch.from_numpy(rows).to(device),
        slot_of_row=torch.from_numpy(slot_of_row).to(device),
        keys=tuple(_key_tile(tile, query_tiles, tables, ends, cache, device) for tile in range(query_tiles[0][0] + 1)),
    )


def _key_tile(
    tile: int,
    query_tiles: list[tuple[int, int]],
    tables: Sequence[np.ndarray],
    ends: list[int],
    cache: CacheShape,
    device: torch.device,
) -> KeyTile:
    seeing = [query_tile for query_tile in query_tiles if query_tile[0] >= tile]
    sequences = list(dict.fromkeys(sequence for _, sequence in seeing))
    positions = np.arange(tile * TILE, (tile + 1) * TILE)
    slots = [
        np.where(positions < ends[sequence], slots_at(tables[sequence], positions, cache.block_size), cache.zero_slot)
        for sequence in sequences
    ]
    sequence_of = None
    if len(sequences) < len(seeing):
        sequence_of = torch.tensor([sequences.index(sequence) for _, sequence in seeing]).to(device)
    hidden = None
    if seeing[-1][0] == tile:
        diagonal = np.asarray([query_tile == tile for query_tile, _ in seeing])
        future = np.triu(np.ones((TILE, TILE), dtype=bool), k=1)
        hidden = torch.from_numpy((diagonal[:, None, None] & future)[:, None]).to(device)
    return KeyTile(torch.from_numpy(np.concatenate(slots)).to(device), sequence_of, hidden, len(seeing))
