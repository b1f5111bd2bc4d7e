"""A loaded model with its cache, block pool and proven numerics: what a prefill or decode worker is built on."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

import torch

from isthmus.checkpoint.directory import Checkpoint
from isthmus.checkpoint.model_config import ModelConfig
from isthmus.engine.canary import Numerics, run_canary
from isthmus.engine.latent_cache import TORCH_DTYPES, LatentCache
from isthmus.engine.memory_profile import profile_steps
from isthmus.engine.open_runner import open_decoder, open_runner
from isthmus.engine.runner import StepRunner
from isthmus.engine.sampler import sample
from isthmus.errors import CannotStart
from isthmus.kv.block_pool import BlockPool
from isthmus.kv.layout import KvLayout
from isthmus.kv.planes import CacheDtype, kv_layout, stored_as
from isthmus.kv.prefix import prefix_hashes, prefix_scope
from isthmus.log import get_logger
from isthmus.model import Model, Progress, load_model
from isthmus.steps import Decoder, OnStored, PrefillChunk, SamplingInput, StepLimits, StepResult

log = get_logger("engine")


USUAL_LIMITS = StepLimits()


@dataclass(frozen=True, slots=True)
class Engine:
    """What `isthmus.worker.engine_port` asks of an engine, over the runner that suits the device."""

    model_config: ModelConfig
    runner: StepRunner
    decoder: Decoder
    cache: LatentCache
    pool: BlockPool
    layout: KvLayout
    numerics: Numerics
    device: torch.device
    dtype: str  # fp32 or bf16: of the weights
    limits: StepLimits

    @property
    def context_length(self) -> int:
        return self.model_config.context_length

    @property
    def vocab_size(self) -> int:
        return self.model_config.vocab_size

    @property
    def numerics_digest(self) -> str:
        """Names the numerics class: engines with the same digest give the same bits."""
        return self.numerics.digest

    def match_prompt(self, token_ids: Sequence[int], tenant: str) -> list[int]:
        """Blocks that hold the longest prefix cached for this tenant; the caller has a reference to each."""
        return self.pool.match(self._block_hashes(token_ids, tenant))

    def publish_prompt(self, token_ids: Sequence[int], block_table: Sequence[int], tenant: str) -> None:
        """Full blocks of these prompt tokens become reusable by content, for this tenant's prompts alone.

        Blocks with generated tokens are never given to it: their rows are rounded otherwise than a prompt's.
        """
        for block_id, block_hash in zip(block_table, self._block_hashes(token_ids, tenant), strict=False):
            self.pool.publish(block_id, block_hash)

    def _block_hashes(self, token_ids: Sequence[int], tenant: str) -> list[bytes]:
        scope = prefix_scope(self.layout.fingerprint, tenant=tenant)
        return prefix_hashes(token_ids, self.layout.block_size, scope)

    def compute(
        self, chunks: Sequence[PrefillChunk], sampling: Sequence[SamplingInput], on_stored: OnStored
    ) -> list[StepResult]:
        """As `PrefillEngine` says."""

        def stored(plane: str, layer: int) -> None:
            self.cache.stored.note(plane, layer)
            on_stored(plane, layer)

        return sample(self.runner.prefill(chunks, stored), sampling)

    def check_device(self) -> None:
        """Waits for what this thread launched. Raises when the device is lost: every call then fails, for good."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    @classmethod
    def open(  # noqa: PLR0913 — settings of a worker, by name
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: Literal["fp32", "bf16"] = "fp32",
        device: Literal["cpu", "cuda"] = "cpu",
        cache_dtype: CacheDtype = "auto",
        block_size: int = 16,
        num_blocks: int | None,
        limits: StepLimits = USUAL_LIMITS,
        progress: Progress = lambda *_: None,
    ) -> "Engine":
        """Loads the weights, runs the canary. `block_size` divides the tile of 64 tokens. Raises CannotStart.

        `cache_dtype` auto: as the weights; fp8 needs the kernels. `num_blocks` None: as many as a GPU has room for.
        """
        torch_device = _open_device(device)
        layout = kv_layout(checkpoint.config, "", dtype=stored_as(dtype, cache_dtype, device), block_size=block_size)
        with ThreadPoolExecutor(1) as hashing:
            digest = hashing.submit(lambda: checkpoint.digest)
            keeps_fp8 = False if dtype == "bf16" and _lacks_fp8(torch_device) else None
            model = load_model(checkpoint, TORCH_DTYPES[dtype], torch_device, progress, keeps_fp8=keeps_fp8)
        layout = replace(layout, model_digest=digest.result())
        if num_blocks is None:
            num_blocks = _profiled_blocks(model, layout, limits)
        cache = LatentCache(layout, num_blocks, torch_device)
        pool = BlockPool(num_blocks, block_size)
        runner = open_runner(model, limits.decode_rows, cache)
        return cls(
            model_config=checkpoint.config,
            runner=runner,
            decoder=open_decoder(runner),
            cache=cache,
            pool=pool,
            layout=layout,
            numerics=run_canary(runner, pool),
            device=torch_device,
            dtype=dtype,
            limits=limits,
        )


def _lacks_fp8(device: torch.device) -> bool:
    """Whether it is a GPU without FP8 products: the kernels then take FP8 matrices as bf16."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0)


def _profiled_blocks(model: Model, layout: KvLayout, limits: StepLimits) -> int:
    """Raises CannotStart where one request of the full context would not fit."""
    profile = profile_steps(model.config, layout, partial(open_runner, model, limits.decode_rows), **asdict(limits))
    num_blocks = profile.num_blocks(layout.block_bytes)
    log.info("memory.profiled", num_blocks=num_blocks, block_bytes=layout.block_bytes, **asdict(profile))
    require_room(num_blocks, layout, model.config.context_length)
    return num_blocks


def require_room(num_blocks: int, layout: KvLayout, context_length: int) -> None:
    """Raises CannotStart."""
    num_positions = num_blocks * layout.block_size
    if num_positions < context_length:
        problem = f"the cache holds {num_positions} positions, one request may need {context_length}"
        raise CannotStart("cache_bytes", problem, "set --num-blocks or --cache-bytes higher, or --context-length lower")


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
