"""The host's layout of a prefill step: which context is expanded when, and which query tiles meet it.

Contexts are cut in segments of a bounded number of tokens. A sequence that fits a segment is never cut; a longer one is
cut at multiples of KEY_TILE, and its query tiles wait between the pieces. What a row computes depends on none of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

KEY_TILE = 128  # pieces begin at multiples; every kernel's key tile divides it
QUERY_TILE = 128  # rows of a query tile, from a chunk's first
SEGMENT_TOKENS = 8192
TILE_FIELDS = 8  # int32: see QueryTile


class ContextChunk(NamedTuple):
    """Tokens at positions [start, start + num_tokens) of one sequence. Past their blocks the table is not read."""

    start: int
    num_tokens: int
    block_table: Sequence[int]

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


class QueryTile(NamedTuple):
    """Rows of one chunk and the keys of one segment they see; first to last field as the kernel reads them."""

    first_row: int  # of the step
    num_rows: int
    first_position: int
    key_begin: int  # positions [key_begin, key_end): key_begin > 0: the rows' state waits from an earlier segment
    key_end: int
    key_row: int  # of key_begin among the segment's gathered tokens
    goes_on: int  # 1: the rows see keys of a later segment too
    unused: int = 0


class _Piece(NamedTuple):
    chunk: int
    begin: int
    end: int
    key_row: int


@dataclass(frozen=True, slots=True)
class Segment:
    slots_T: Tensor  # int64: the cache slots of its tokens
    tiles: Tensor  # int32 [tiles, TILE_FIELDS], those with most keys first


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    num_rows: int
    waits: bool  # some rows see keys of several segments
    segments: tuple[Segment, ...]

    @classmethod
    def build(
        cls,
        chunks: Sequence[tuple[int, int, Sequence[int]]],
        block_size: int,
        device: torch.device,
        *,
        segment_tokens: int = SEGMENT_TOKENS,
    ) -> "PrefillPlan":
        """From (start, num_tokens, block table) of each chunk, whose rows follow one another in the step.

        One copy to the device, from pinned memory, that nobody waits for. Raises ValueError for an empty chunk, a table
        that is too short, or segments of less than KEY_TILE tokens.
        """
        if segment_tokens < KEY_TILE:
            raise ValueError(f"segment_tokens is {segment_tokens}, less than a key tile of {KEY_TILE}")
        named = [ContextChunk(*chunk) for chunk in chunks]
        for chunk in named:
            if chunk.start < 0 or chunk.num_tokens < 1 or len(chunk.block_table) * block_size < chunk.end:
                blocks = f"{len(chunk.block_table)} blocks of {block_size}"
                raise ValueError(f"a chunk of {chunk.num_tokens} tokens at {chunk.start} with {blocks}")
        slots = [_slots(chunk, block_size) for chunk in named]
        cuts = _cut([chunk.end for chunk in named], segment_tokens)
        host: list[Tensor] = []
        for pieces in cuts:
            host.append(torch.cat([slots[piece.chunk][piece.begin : piece.end] for piece in pieces]))
            host.append(torch.tensor(_query_tiles(named, pieces), dtype=torch.int32).view(torch.int64).flatten())
        parts = _upload(host, device)
        segments = [
            Segment(of_tokens, of_tiles.view(torch.int32).view(-1, TILE_FIELDS))
            for of_tokens, of_tiles in zip(parts[::2], parts[1::2], strict=True)
        ]
        waits = any(chunk.end > segment_tokens for chunk in named)
        return cls(sum(chunk.num_tokens for chunk in named), waits, tuple(segments))


def _slots(chunk: ContextChunk, block_size: int) -> Tensor:
    """Of positions [0, end)."""
    num_blocks = -(-chunk.end // block_size)
    blocks = torch.tensor(chunk.block_table[:num_blocks], dtype=torch.int64)
    return (blocks[:, None] * block_size + torch.arange(block_size)).flatten()[: chunk.end]


def _cut(contexts: Sequence[int], segment_tokens: int) -> list[list[_Piece]]:
    """Pieces of each segment, sequences in order."""
    segments: list[list[_Piece]] = []
    used = segment_tokens
    for index, context in enumerate(contexts):
        step = context if context <= segment_tokens else segment_tokens // KEY_TILE * KEY_TILE
        for begin in range(0, context, step):
            end = min(begin + step, context)
            if used + end - begin > segment_tokens:
                segments.append([])
                used = 0
            segments[-1].append(_Piece(index, begin, end, used))
            used += end - begin
    return segments


def _query_tiles(chunks: Sequence[ContextChunk], pieces: Sequence[_Piece]) -> list[QueryTile]:
    """Tiles that see something of these pieces; longest first, so that a launch ends with short ones."""
    first_rows = [0]
    for chunk in chunks:
        first_rows.append(first_rows[-1] + chunk.num_tokens)
    tiles: list[QueryTile] = []
    for piece in pieces:
        chunk = chunks[piece.chunk]
        for offset in range(0, chunk.num_tokens, QUERY_TILE):
            num_rows = min(QUERY_TILE, chunk.num_tokens - offset)
            first = chunk.start + offset
            sees = chunk.start + offset + num_rows
            if sees > piece.begin:
                keys = (piece.begin, min(sees, piece.end), piece.key_row)
                tiles.append(QueryTile(first_rows[piece.chunk] + offset, num_rows, first, *keys, int(sees > piece.end)))
    return sorted(tiles, key=lambda tile: tile.key_begin - tile.key_end)


def _upload(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """int64 tensors in one copy; each begins at a multiple of 16 bytes."""
    sizes = [part.shape[0] + part.shape[0] % 2 for part in parts]
    packed = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    for part, place in zip(parts, packed.split(sizes), strict=True):
        place[: part.shape[0]] = part
    moved = packed.to(device, non_blocking=True).split(sizes)
    return [place[: part.shape[0]] for part, place in zip(parts, moved, strict=True)]
