"""Writes a recipe's checkpoint shard by shard: memory holds a few pieces of tensors, whatever the model's size."""

import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from isthmus.checkpoint.model_config import ModelConfig, parse_config
from isthmus.checkpoint.tensor_names import model_shapes

from .recipe import FP8_BLOCK, Recipe, raw_config
from .tokenizer import write_tokenizer
from .values import Draw, fp8_values, spread, stored_values

_PIECE_ELEMENTS = 8 << 20
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}
_FUSED_EXPERTS = frozenset({"mistral4"})  # published with the experts of a layer in two tensors


def write_checkpoint(folder: str | Path, recipe: Recipe) -> Path:
    """A directory that transformers and isthmus open: configuration, sharded weights, tokenizer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    raw = raw_config(recipe)
    config = parse_config(raw)
    _write_json(folder / "config.json", raw)
    tokens = {name: raw[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in raw}
    _write_json(folder / "generation_config.json", {**tokens, "do_sample": False})
    write_tokenizer(folder, raw)
    shards = _shards(list(_tensors(config, recipe)), recipe.shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(_write_shard(folder / name, shard, config, recipe), name)
    if len(shards) > 1:
        total_size = sum(tensor.num_bytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    return folder


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def is_fp8(self) -> bool:
        return self.dtype == torch.float8_e4m3fn

    @property
    def scales(self) -> "Tensor":
        blocks = tuple(-(-length // FP8_BLOCK) for length in self.shape)
        return Tensor(f"{self.name}_scale_inv", blocks, torch.float32)

    @property
    def num_bytes(self) -> int:
        own = math.prod(self.shape) * self.dtype.itemsize
        return own + self.scales.num_bytes if self.is_fp8 else own


def _tensors(config: ModelConfig, recipe: Recipe) -> Iterator[Tensor]:
    """As published: projections in FP8 if asked for, the correction bias always in full precision."""
    fused = config.model_type in _FUSED_EXPERTS
    if fused and recipe.fp8:
        raise SystemExit(f"{recipe.like} is not published in blocks of FP8")
    for name, shape in (_fused_shapes(config) if fused else model_shapes(config)).items():
        is_projection = name.endswith(("_proj.weight", "_proj_with_mqa.weight"))
        if recipe.fp8 and is_projection:
            yield Tensor(name, shape, torch.float8_e4m3fn)
        else:
            full = name.endswith("e_score_correction_bias")
            yield Tensor(name, shape, torch.float32 if full else _DTYPES[recipe.dtype])


def _fused_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    assert config.experts is not None, "a family of mixtures"
    E = config.experts.num_experts
    W = config.experts.width
    D = config.hidden_size
    shapes = {name: shape for name, shape in model_shapes(config).items() if ".mlp.experts." not in name}
    for layer in (layer for layer, sparse in enumerate(config.sparse_layers) if sparse):
        shapes[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = (E, 2 * W, D)
        shapes[f"model.layers.{layer}.mlp.experts.down_proj"] = (E, D, W)
    return shapes


def _shards(tensors: list[Tensor], max_bytes: int) -> list[list[Tensor]]:
    """In order; a tensor larger than a shard has one of its own."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def _write_shard(file: Path, tensors: list[Tensor], config: ModelConfig, recipe: Recipe) -> list[str]:
    """The names of its tensors."""
    stored = list(chain.from_iterable((t, t.scales) if t.is_fp8 else (t,) for t in tensors))
    with file.open("wb") as out, ThreadPoolExecutor(os.cpu_count()) as threads:
        _write_header(out, stored)
        pieces = chain.from_iterable(map(_pieces, tensors))
        futures = (threads.submit(_values, piece, config, recipe) for piece in pieces)
        scales: list[np.ndarray] = []
        for values in _ahead(futures, 2 * (os.cpu_count() or 1)):
            out.write(values.data)
            if values.scales is not None:
                scales.append(values.scales)
            if values.ends_fp8:
                out.write(np.concatenate(scales).tobytes())
                scales.clear()
    return [tensor.name for tensor in stored]


def _write_header(out: BinaryIO, tensors: list[Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)


class _Piece(NamedTuple):
    tensor: Tensor  # of two dimensions or one
    first_row: int
    shape: tuple[int, ...]
    is_last: bool


def _pieces(tensor: Tensor) -> Iterator[_Piece]:
    """Whole rows of FP8 blocks, whatever the dtype: the values are the same in each."""
    if len(tensor.shape) == 1:
        yield _Piece(tensor, 0, tensor.shape, is_last=True)
        return
    rows = math.prod(tensor.shape[:-1])
    columns = tensor.shape[-1]
    matrix = replace(tensor, shape=(rows, columns))
    step = max(1, _PIECE_ELEMENTS // columns // FP8_BLOCK) * FP8_BLOCK
    for first_row in range(0, rows, step):
        num_rows = min(step, rows - first_row)
        yield _Piece(matrix, first_row, (num_rows, columns), is_last=first_row + num_rows == rows)


class _Values(NamedTuple):
    data: bytes
    scales: np.ndarray | None
    ends_fp8: bool


def _values(piece: _Piece, config: ModelConfig, recipe: Recipe) -> _Values:
    tensor = piece.tensor
    draw = Draw(recipe.seed, tensor.name, piece.first_row)
    how = spread(config, tensor.name, tensor.shape)
    if not tensor.is_fp8:
        return _Values(stored_values(draw, piece.shape, how, tensor.dtype), None, ends_fp8=False)
    rows, columns = piece.shape
    data, scales = fp8_values(draw, (rows, columns), how, powers_of_two=recipe.fp8 == "ue8m0")
    return _Values(data, scales, ends_fp8=piece.is_last)


def _ahead(futures: Iterable["Future[_Values]"], depth: int) -> Iterator[_Values]:
    """Results in order, with at most `depth` under way or waiting."""
    waiting: deque[Future[_Values]] = deque()
    for future in futures:
        waiting.append(future)
        if len(waiting) >= depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
