"""Models of published shapes with random weights, made where they are used: nothing is read and nothing is written.

Matrices have the variance that keeps a unit of variance, norms are ones; so routing is near uniform. V2-Lite is
15.7 billion parameters, 31.4 GB in bf16.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import isthmus
from isthmus.checkpoint.model_config import ModelConfig, parse_config
from isthmus.checkpoint.tensor_names import model_shapes
from isthmus.model import Model
from isthmus.model.linear import ExpertStack, Linear
from isthmus.model.load import assemble
from isthmus.model.weights import Part, Weights
from tools.checkpoints.published import PUBLISHED


class RandomWeights(Weights):
    """Answers the loader's questions by drawing numbers."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.shapes = model_shapes(config)
        self.entries = dict.fromkeys(self.shapes)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        shape = self.shapes[name]
        out = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        if len(shape) == 1:
            return out.fill_(0.0 if name.endswith("bias") else 1.0)
        return out.normal_(std=1.0 if "embed" in name else shape[-1] ** -0.5)

    def plain(self, *parts: Part) -> Tensor:
        return self._matrices([parts])[0]

    def linear(self, *parts: Part) -> Linear:
        return Linear(self.plain(*parts).t())

    def stack(self, matrices: Sequence[Sequence[Part]]) -> ExpertStack:
        return ExpertStack(self._matrices(matrices))

    def _matrices(self, matrices: Sequence[Sequence[Part]]) -> Tensor:
        shapes = [self.shapes[f"{part.name}.weight"] for part in matrices[0]]
        rows = sum(shape[0] for shape in shapes)
        columns = shapes[0][1]
        out = torch.empty(len(matrices), rows, columns, dtype=self.dtype, device=self.device)
        return out.normal_(std=columns**-0.5)


def published_config(name: str, context_length: int) -> ModelConfig:
    """Of a model in `tools.checkpoints`."""
    return parse_config(PUBLISHED[name], context_length)


def dry_config() -> ModelConfig:
    """Of one small layer with experts and the bundled checkpoint's heads, which the kernel table has."""
    raw = json.loads((Path(isthmus.__file__).parent / "bundled/config.json").read_text(encoding="utf-8"))
    sizes = {"hidden_size": 64, "vocab_size": 128, "moe_intermediate_size": 32, "q_lora_rank": 32}
    return parse_config({**raw, **sizes, "num_hidden_layers": 1, "first_k_dense_replace": 0}, 256)


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Model:
    return assemble(config, RandomWeights(config, dtype, device))
