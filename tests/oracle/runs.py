"""The same tokens through transformers and through our engine, as tensors that can be laid side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from isthmus.checkpoint.directory import Checkpoint
from isthmus.engine.engine import Engine
from isthmus.kv.planes import LATENT
from isthmus.steps import DecodeRow, PrefillChunk
from tests.oracle.models import Model, Written


@dataclass(frozen=True)
class Run:
    logits: Tensor  # [positions, vocab] fp32
    latents: Tensor  # [layers, tokens, row elements] in the model's dtype

    @property
    def margins(self) -> Tensor:
        best = self.logits.topk(2).values
        return best[:, 0] - best[:, 1]


@torch.inference_mode()
def run_oracle(model: Model, token_ids: Sequence[int]) -> Run:
    """Logits after every token, and the cache, from one forward."""
    out = model(torch.tensor([list(token_ids)]), use_cache=True)
    latents = []
    for layer in out.past_key_values.layers:
        k_pe = layer.values[0, 0]
        if model.config.model_type == "deepseek_v2":  # transformers leaves V2's rotary pairs side by side
            k_pe = torch.cat((k_pe[:, 0::2], k_pe[:, 1::2]), dim=-1)
        latents.append(torch.cat((layer.keys[0, 0], k_pe), dim=-1))
    return Run(out.logits[0].float(), torch.stack(latents))


def open_engine(model: Written, dtype: str = "fp32", *, block_size: int = 16) -> Engine:
    return Engine.open(Checkpoint.open(model.served), dtype=dtype, block_size=block_size, num_blocks=4096 // block_size)


class EngineRun:
    """One sequence in an engine whose unused slots all hold NaN."""

    def __init__(self, engine: Engine, num_positions: int, *, seed: int = 0) -> None:
        for layer in engine.cache.layers[LATENT]:
            layer.fill_(torch.nan)
        self.engine = engine
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(engine.cache.shape.num_blocks, generator=generator).tolist()
        self.table = order[: engine.layout.num_blocks(num_positions)]
        self.free = order[len(self.table) :]

    def prefill(self, token_ids: Sequence[int], cuts: Sequence[int] = ()) -> Tensor:
        """Logits [chunks, vocab] of each chunk's last token; chunks end at `cuts`."""
        chunks = [
            PrefillChunk(token_ids[start:end], start, self.table, needs_logits=True)
            for start, end in pairwise([0, *cuts, len(token_ids)])
        ]
        return torch.cat([self.engine.runner.prefill([chunk]) for chunk in chunks])

    def decode(self, token_ids: Sequence[int], start: int) -> Tensor:
        """Logits [tokens, vocab], one step a token."""
        return torch.cat([self.replay([token], start + i) for i, token in enumerate(token_ids)])

    def replay(self, token_ids: Sequence[int], start: int) -> Tensor:
        """Logits [tokens, vocab] of one step with a row for each token."""
        rows = [DecodeRow(token, start + i, self.table) for i, token in enumerate(token_ids)]
        return self.engine.runner.decode(rows)

    def greedy(self, first: Tensor, start: int, count: int) -> tuple[list[int], Tensor]:
        """`count` tokens and the logits each was chosen from; `first` are those of position `start` - 1."""
        tokens, logits = [int(first.argmax())], [first]
        while len(tokens) < count:
            logits.append(self.decode(tokens[-1:], start + len(tokens) - 1)[0])
            tokens.append(int(logits[-1].argmax()))
        return tokens, torch.stack(logits)

    def latents(self, count: int) -> Tensor:
        """[layers, count, row elements] as stored."""
        layers = self.engine.cache.layers[LATENT]
        return torch.stack([layer[self.table].flatten(0, 1)[:count] for layer in layers])


def prompt(length: int, *, seed: int, vocab_size: int = 300) -> list[int]:
    return torch.randint(0, vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def distance(exact: Tensor, rounded: Tensor) -> Tensor:
    """KL(exact || rounded) of each position's next token."""
    p, q = exact.double().log_softmax(-1), rounded.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
