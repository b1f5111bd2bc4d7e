"""Which planes a model's cache has and what a row of each takes, from its config alone. No torch.

The engine lays its memory out by this, and `isthmus model check` counts by it before anything is loaded.
"""

from typing import Final, Literal

from isthmus.checkpoint.model_config import ModelConfig
from isthmus.errors import CannotStart
from isthmus.kv.layout import KvLayout, Plane, PlaneKind

LATENT: Final = "latent"  # the name of MLA's plane: each token's compressed keys and values, on every layer

CacheDtype = Literal["auto", "fp8"]

_FP8_GROUP: Final = 128  # latent elements that share a scale


def stored_as(dtype: str, cache_dtype: CacheDtype, device: str) -> str:
    """The dtype of cached rows, for weights in `dtype`. Raises CannotStart for fp8 where the kernels do not run."""
    if cache_dtype == "auto":
        return dtype
    if device != "cuda" or dtype != "bf16":
        problem = f"{cache_dtype} rows need --device cuda and --dtype bf16, not {device} and {dtype}"
        raise CannotStart("cache_dtype", problem, "set --cache-dtype auto")
    return cache_dtype


def kv_layout(config: ModelConfig, digest: str, *, dtype: str, block_size: int) -> KvLayout:
    """The layout of this model's cache with rows stored in `dtype`. `digest` names the weights.

    Raises CannotStart for a latent that has no row in that dtype.
    """
    return KvLayout(digest, (latent_plane(config, dtype),), block_size)


def latent_plane(config: ModelConfig, dtype: str) -> Plane:
    """MLA's one append-only plane: kv_lora_rank latent and qk_rope_head_dim rotated elements on every layer.

    The elements of an fp8 row are its bytes. Raises CannotStart for a latent that has no such row.
    """
    elements = config.latent_elements
    if dtype == "fp8":
        elements = fp8_row_bytes(config.kv_lora_rank, config.qk_rope_head_dim)
    return Plane(LATENT, PlaneKind.APPEND_ONLY, config.num_layers, elements, dtype)


def fp8_row_bytes(latent_rank: int, rope: int) -> int:
    """Bytes of a cached fp8 row: one for each latent, an fp32 scale for each group of them, bf16 rotated elements.

    `kernels.latents.definition`, whose library imports nothing of ours, has the same number under the same name.
    Raises CannotStart for a rank that is neither whole groups nor less than one.
    """
    if (latent_rank > _FP8_GROUP and latent_rank % _FP8_GROUP) or latent_rank % 16:
        problem = f"fp8: latent rank {latent_rank} is neither a multiple of {_FP8_GROUP} nor a smaller one of 16"
        raise CannotStart("cache_dtype", problem, "set --cache-dtype auto")
    num_scales = max(1, latent_rank // _FP8_GROUP)
    return latent_rank + 4 * num_scales + 2 * rope
