"""Names and shapes a checkpoint must hold for a configuration, and one error for all that do not fit."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from isthmus.checkpoint import Checkpoint
from isthmus.errors import CannotStart
from isthmus.model_config import Experts, ModelConfig

Shapes = dict[str, tuple[int, ...]]
_DTYPES: Final = ("F32", "BF16", "F16")
_LISTED: Final = 40  # names shown per kind of fault; a wrong config can make tens of thousands
# Buffers that old exports wrote; they are recomputed.
_RECOMPUTED: Final = re.compile(r"\.rotary_emb\.inv_freq$")
_LAYER: Final = re.compile(r"^model\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class TensorNames:
    """The checked content of a checkpoint: every name of the model itself, and those of its draft (MTP) layers."""

    model: tuple[str, ...]
    draft: tuple[str, ...]  # model.layers.{num_layers + i}.*: recognised, checked, not loaded


def check_tensors(checkpoint: Checkpoint) -> TensorNames:
    """Raises CannotStart listing every missing, unexpected, misshapen and unreadable tensor at once."""
    config = checkpoint.config
    expected = model_shapes(config)
    present = {name: entry for name, entry in checkpoint.tensors.items() if not _RECOMPUTED.search(name)}
    draft, optional = _draft_shapes(config, present)
    if config.tie_word_embeddings:
        optional["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    required = {**expected, **draft}
    known = {**required, **optional}
    faults = [
        *_fault("missing", [name for name in required if name not in present]),
        *_fault("unexpected", [name for name in present if name not in known]),
        *_fault(
            "of wrong shape",
            [
                f"{name} {list(entry.shape)}, not {list(known[name])}"
                for name, entry in present.items()
                if name in known and entry.shape != known[name]
            ],
        ),
        *_fault(
            f"of a dtype other than {'/'.join(_DTYPES)}",
            [
                f"{name} {entry.dtype}"
                for name, entry in present.items()
                if name in known and entry.dtype not in _DTYPES
            ],
        ),
    ]
    if faults:
        mend = "use weights that belong to this config.json"
        raise CannotStart("model", f"{checkpoint.path}: {'; '.join(faults)}", mend)
    return TensorNames(tuple(expected), tuple(name for name in {**draft, **optional} if name in present))


def model_shapes(config: ModelConfig) -> Shapes:
    D = config.hidden_size
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, D), "model.norm.weight": (D,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, D)
    for layer in range(config.num_layers):
        shapes.update(_layer_shapes(config, layer, dense=layer < config.num_dense_layers))
    return shapes


def _layer_shapes(config: ModelConfig, layer: int, *, dense: bool) -> Shapes:
    D, prefix = config.hidden_size, f"model.layers.{layer}."
    norms = {f"{prefix}input_layernorm.weight": (D,), f"{prefix}post_attention_layernorm.weight": (D,)}
    attention = _prefixed(f"{prefix}self_attn.", _attention_shapes(config))
    if dense or config.experts is None:
        return {**norms, **attention, **_prefixed(f"{prefix}mlp.", _mlp_shapes(D, config.intermediate_size))}
    return {**norms, **attention, **_prefixed(f"{prefix}mlp.", dict(_expert_shapes(D, config.experts)))}


def _attention_shapes(config: ModelConfig) -> Shapes:
    D, H, C = config.hidden_size, config.num_heads, config.kv_lora_rank
    shapes: Shapes = {
        "kv_a_proj_with_mqa.weight": (config.latent_elements, D),
        "kv_a_layernorm.weight": (C,),
        "kv_b_proj.weight": (H * (config.qk_nope_head_dim + config.v_head_dim), C),
        "o_proj.weight": (D, H * config.v_head_dim),
    }
    if config.q_lora_rank is None:
        return {**shapes, "q_proj.weight": (H * config.qk_head_dim, D)}
    return {
        **shapes,
        "q_a_proj.weight": (config.q_lora_rank, D),
        "q_a_layernorm.weight": (config.q_lora_rank,),
        "q_b_proj.weight": (H * config.qk_head_dim, config.q_lora_rank),
    }


def _mlp_shapes(hidden_size: int, width: int) -> Shapes:
    wide, narrow = (width, hidden_size), (hidden_size, width)
    return {"gate_proj.weight": wide, "up_proj.weight": wide, "down_proj.weight": narrow}


def _expert_shapes(hidden_size: int, experts: Experts) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "gate.weight", (experts.num_experts, hidden_size)
    if experts.router.has_bias:
        yield "gate.e_score_correction_bias", (experts.num_experts,)
    for expert in range(experts.num_experts):
        yield from _prefixed(f"experts.{expert}.", _mlp_shapes(hidden_size, experts.width)).items()
    if experts.num_shared:
        yield from _prefixed("shared_experts.", _mlp_shapes(hidden_size, experts.num_shared * experts.width)).items()


def _draft_shapes(config: ModelConfig, present: Iterable[str]) -> tuple[Shapes, Shapes]:
    """Required and optional tensors of draft layers; the tensors say how many there are, config.json often lies."""
    layers = {int(found[1]) for name in present if (found := _LAYER.match(name)) and name.endswith(".eh_proj.weight")}
    D, required, optional = config.hidden_size, Shapes(), Shapes()
    for layer in sorted(layer for layer in layers if layer >= config.num_layers):
        prefix = f"model.layers.{layer}."
        required |= _layer_shapes(config, layer, dense=False)
        required |= _prefixed(
            prefix,
            {"enorm.weight": (D,), "hnorm.weight": (D,), "eh_proj.weight": (D, 2 * D), "shared_head.norm.weight": (D,)},
        )
        tables = {"embed_tokens.weight": (config.vocab_size, D), "shared_head.head.weight": (config.vocab_size, D)}
        optional |= _prefixed(prefix, tables)
    return required, optional


def _prefixed(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def _fault(kind: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return [f"{len(names)} tensors {kind}: {', '.join(names[:_LISTED])}{more}"]
