"""A loaded model with its cache, block pool and proven numerics: what a prefill or decode worker is built on."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import torch

from isthmus.checkpoint import Checkpoint
from isthmus.engine.block_pool import BlockPool, prefix_hashes
from isthmus.engine.canary import Numerics, run_canary
from isthmus.engine.latent_cache import TORCH_DTYPES, LatentCache
from isthmus.engine.runner import Runner
from isthmus.errors import CannotStart
from isthmus.kv_layout import KvLayout, Plane, PlaneKind
from isthmus.model import Progress, load_model
from isthmus.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Engine:
    model_config: ModelConfig
    runner: Runner
    cache: LatentCache
    pool: BlockPool
    layout: KvLayout
    numerics: Numerics
    device: torch.device
    dtype: str  # fp32 or bf16: of weights and cache

    @property
    def context_length(self) -> int:
        return self.model_config.context_length

    def match_prompt(self, token_ids: Sequence[int]) -> list[int]:
        """Blocks that hold the longest cached prefix; the caller has a reference to each."""
        return self.pool.match(prefix_hashes(token_ids, self.layout.block_size, self.layout.fingerprint))

    def publish_prompt(self, token_ids: Sequence[int], block_table: Sequence[int]) -> None:
        """Full prompt blocks become reusable by content; blocks with generated tokens never do (other rounding)."""
        hashes = prefix_hashes(token_ids, self.layout.block_size, self.layout.fingerprint)
        for block_id, block_hash in zip(block_table, hashes, strict=False):
            self.pool.publish(block_id, block_hash)

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: Literal["fp32", "bf16"] = "fp32",
        device: Literal["cpu", "cuda"] = "cpu",
        block_size: int = 16,
        num_blocks: int,
        progress: Progress = lambda *_: None,
    ) -> "Engine":
        """Loads the weights, runs the canary. `block_size` divides the tile of 64 tokens. Raises CannotStart."""
        torch_device = _open_device(device)
        layout = kv_layout(checkpoint.config, "", dtype=dtype, block_size=block_size)
        with ThreadPoolExecutor(1) as hashing:
            digest = hashing.submit(lambda: checkpoint.digest)
            model = load_model(checkpoint, TORCH_DTYPES[dtype], torch_device, progress)
        layout = replace(layout, model_digest=digest.result())
        cache = LatentCache(layout, num_blocks, torch_device)
        pool = BlockPool(num_blocks, block_size)
        runner = Runner(model, cache)
        return cls(
            model_config=checkpoint.config,
            runner=runner,
            cache=cache,
            pool=pool,
            layout=layout,
            numerics=run_canary(runner, pool),
            device=torch_device,
            dtype=dtype,
        )


def kv_layout(config: ModelConfig, digest: str, *, dtype: str, block_size: int) -> KvLayout:
    """MLA caches one append-only plane on every layer."""
    latent = Plane("latent", PlaneKind.APPEND_ONLY, config.num_layers, config.latent_elements, dtype)
    return KvLayout(digest, (latent,), block_size)


def _open_device(name: Literal["cpu", "cuda"]) -> torch.device:
    """TF32 and reduced-precision sums would make fp32 something else; they are switched off for the whole process."""
    if name == "cuda" and not torch.cuda.is_available():
        raise CannotStart("device", "torch sees no CUDA device", "set --device cpu, or install a CUDA build of torch")
    torch.set_float32_matmul_precision("highest")
    if name == "cpu":
        return torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return torch.device("cuda", torch.cuda.current_device())
