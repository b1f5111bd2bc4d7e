"""The least a step of a model can move and compute, from its configuration: every figure is divided by these."""

import math
from dataclasses import dataclass

from isthmus.checkpoint.model_config import ModelConfig
from isthmus.checkpoint.tensor_names import model_shapes

BYTES = 2  # of an element: weights and cache are bf16


@dataclass(frozen=True)
class Sizes:
    """Elements of a model's matrices."""

    config: ModelConfig

    @property
    def always(self) -> int:
        """Read by every step whatever it routes: all but experts and embedding, whose rows are few."""
        shapes = model_shapes(self.config)
        return sum(
            math.prod(shape) for name, shape in shapes.items() if ".experts." not in name and "embed" not in name
        )

    @property
    def head(self) -> int:
        return self.config.vocab_size * self.config.hidden_size

    @property
    def expert(self) -> int:
        """One expert of one layer."""
        return 0 if self.config.experts is None else 3 * self.config.hidden_size * self.config.experts.width

    @property
    def num_sparse(self) -> int:
        return sum(self.config.sparse_layers)

    def decode_weight_bytes(self, num_experts_read: int) -> int:
        """`num_experts_read`: distinct experts that a step's rows choose, over all layers together."""
        return BYTES * (self.always + num_experts_read * self.expert)

    def cache_bytes(self, num_positions: int) -> int:
        """Cached rows of so many positions, of all layers."""
        return BYTES * num_positions * self.config.latent_elements * self.config.num_layers

    def prefill_flops(self, num_tokens: int) -> int:
        """One prompt, causal, keys and values expanded once, the head for its last token."""
        config = self.config
        chosen = 0 if config.experts is None else config.experts.num_per_token
        per_token = 2 * (self.always - self.head + self.num_sparse * chosen * self.expert)
        pairs = num_tokens * (num_tokens + 1) // 2
        attention = 2 * config.num_heads * (config.qk_head_dim + config.v_head_dim) * pairs * config.num_layers
        return num_tokens * per_token + attention + 2 * self.head
