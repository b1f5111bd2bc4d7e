"""The names and shapes that a checkpoint must hold for its configuration, and one error for all that do not fit."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from isthmus.checkpoint.directory import Checkpoint, TensorEntry
from isthmus.checkpoint.families import Bias
from isthmus.checkpoint.model_config import Experts, ModelConfig
from isthmus.errors import CannotStart

Shapes = dict[str, tuple[int, ...]]
_DTYPES: Final = ("F32", "BF16", "F16")
_FP8: Final = "F8_E4M3"
_BLOCK: Final = 128
_LISTED: Final = 40  # names shown per kind of fault; a wrong config can make tens of thousands
# Buffers that old exports wrote; they are recomputed.
_RECOMPUTED: Final = re.compile(r"\.rotary_emb\.inv_freq$")
_LAYER: Final = re.compile(r"^model\.layers\.(\d+)\.")


def check_tensors(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Returns the names of draft tensors, which nobody loads.

    Raises CannotStart with every tensor that is missing, unexpected, of a wrong shape or of an unreadable dtype.
    """
    faults, draft = find_faults(checkpoint.config, checkpoint.tensors)
    if faults:
        mend = "use weights that belong to this config.json"
        raise CannotStart("model", f"{checkpoint.path}: {'; '.join(faults)}", mend)
    return draft


def find_faults(config: ModelConfig, tensors: Mapping[str, TensorEntry]) -> tuple[list[str], tuple[str, ...]]:
    """Returns a line for each kind of fault, and the names of the draft tensors (model.layers.{num_layers + i}.*)."""
    # A block of no width (no shared experts) may be stored as empty tensors.
    present = {name: entry for name, entry in tensors.items() if 0 not in entry.shape and not _RECOMPUTED.search(name)}
    required = model_shapes(config)
    for layer, sparse in enumerate(config.sparse_layers):
        if sparse and f"model.layers.{layer}.mlp.experts.gate_up_proj" in present:
            _replace_by_fused(config, f"model.layers.{layer}.mlp.experts.", required)
    draft, optional_draft = _draft_shapes(config, present)
    required |= draft
    optional = {**optional_draft, **_optional_shapes(config)}
    if config.fp8:
        required |= _scale_shapes({**required, **optional}, present)
    known = {**required, **optional}
    expected = [(name, entry) for name, entry in present.items() if name in known]
    misshapen = [(name, list(entry.shape)) for name, entry in expected if entry.shape != known[name]]
    unreadable = [f"{name} {entry.dtype}" for name, entry in expected if entry.dtype not in _dtypes(config, name)]
    names = {
        "missing": [name for name in required if name not in present],
        "unexpected": [name for name in present if name not in known],
        "of wrong shape": [f"{name} {shape}, not {list(known[name])}" for name, shape in misshapen],
        f"of a dtype other than {'/'.join(_DTYPES)}": unreadable,
    }
    faults = [_fault(kind, faulty) for kind, faulty in names.items() if faulty]
    return faults, tuple(name for name in {**draft, **optional_draft} if name in present)


def model_shapes(config: ModelConfig) -> Shapes:
    """The required tensors in the published form, which has a tensor for each projection of each expert."""
    D = config.hidden_size
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, D), "model.norm.weight": (D,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, D)
    for layer, sparse in enumerate(config.sparse_layers):
        shapes |= _layer_shapes(config, layer, sparse=sparse)
    return shapes


def _layer_shapes(config: ModelConfig, layer: int, *, sparse: bool) -> Shapes:
    D = config.hidden_size
    prefix = f"model.layers.{layer}."
    shapes: Shapes = {f"{prefix}input_layernorm.weight": (D,), f"{prefix}post_attention_layernorm.weight": (D,)}
    shapes |= _prefixed(f"{prefix}self_attn.", _attention_shapes(config))
    if not sparse or config.experts is None:
        return shapes | _prefixed(f"{prefix}mlp.", _mlp_shapes(config, config.intermediate_size))
    if config.experts.norm_output:
        shapes[f"{prefix}post_mlp_layernorm.weight"] = (D,)
    return shapes | _prefixed(f"{prefix}mlp.", dict(_expert_shapes(config, config.experts)))


def _attention_shapes(config: ModelConfig) -> Shapes:
    D = config.hidden_size
    H = config.num_heads
    C = config.kv_lora_rank
    shapes: Shapes = {
        "kv_a_proj_with_mqa.weight": (config.latent_elements, D),
        "kv_a_layernorm.weight": (C,),
        "kv_b_proj.weight": (H * (config.qk_nope_head_dim + config.v_head_dim), C),
        "o_proj.weight": (D, H * config.v_head_dim),
    }
    if config.q_lora_rank is None:
        shapes["q_proj.weight"] = (H * config.qk_head_dim, D)
    else:
        shapes["q_a_proj.weight"] = (config.q_lora_rank, D)
        shapes["q_a_layernorm.weight"] = (config.q_lora_rank,)
        shapes["q_b_proj.weight"] = (H * config.qk_head_dim, config.q_lora_rank)
    biased = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj") if config.attention_bias else ()
    return shapes | _biases(shapes, biased)


def _mlp_shapes(config: ModelConfig, width: int) -> Shapes:
    shapes = _gated_shapes(config.hidden_size, width)
    return shapes | _biases(shapes, ("gate_proj", "up_proj", "down_proj") if config.mlp_bias else ())


def _gated_shapes(hidden_size: int, width: int) -> Shapes:
    wide = (width, hidden_size)
    narrow = (hidden_size, width)
    return {"gate_proj.weight": wide, "up_proj.weight": wide, "down_proj.weight": narrow}


def _biases(shapes: Shapes, names: Iterable[str]) -> Shapes:
    return {f"{name}.bias": shapes[f"{name}.weight"][:1] for name in names if f"{name}.weight" in shapes}


def _expert_shapes(config: ModelConfig, experts: Experts) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "gate.weight", (experts.num_experts, config.hidden_size)
    if experts.routing.bias is Bias.REQUIRED:
        yield "gate.e_score_correction_bias", (experts.num_experts,)
    for expert in range(experts.num_experts):
        yield from _prefixed(f"experts.{expert}.", _gated_shapes(config.hidden_size, experts.width)).items()
    if experts.num_shared:
        yield from _prefixed("shared_experts.", _mlp_shapes(config, experts.num_shared * experts.width)).items()


def _replace_by_fused(config: ModelConfig, prefix: str, shapes: Shapes) -> None:
    """Replaces a layer's expert tensors by the two in which transformers may write them."""
    assert config.experts is not None, "sparse layers have experts"
    E = config.experts.num_experts
    W = config.experts.width
    D = config.hidden_size
    for name in [name for name in shapes if name.startswith(prefix)]:
        del shapes[name]
    shapes[f"{prefix}gate_up_proj"] = (E, 2 * W, D)
    shapes[f"{prefix}down_proj"] = (E, D, W)


def _optional_shapes(config: ModelConfig) -> Shapes:
    """Tensors that are read if they are there, or that published files carry unused."""
    D = config.hidden_size
    shapes = Shapes()
    if config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, D)
    for layer, sparse in enumerate(config.sparse_layers):
        if config.experts is None:
            continue
        if config.experts.norm_output and not sparse:
            shapes[f"model.layers.{layer}.post_mlp_layernorm.weight"] = (D,)
        if config.experts.routing.bias is Bias.OPTIONAL and sparse:
            shapes[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = (config.experts.num_experts,)
    return shapes


def _scale_shapes(known: Shapes, present: Mapping[str, TensorEntry]) -> Shapes:
    """The scales of the matrices that are stored as FP8: one for each block of 128 x 128, or of what is left there."""
    return {
        f"{name}_scale_inv": (-(-known[name][0] // _BLOCK), -(-known[name][1] // _BLOCK))
        for name, entry in present.items()
        if name in known and entry.dtype == _FP8 and _is_projection(name)
    }


def _is_projection(name: str) -> bool:
    return name.endswith("_proj.weight") or name.endswith("_proj_with_mqa.weight")


def _dtypes(config: ModelConfig, name: str) -> tuple[str, ...]:
    if name.endswith("_scale_inv"):
        return (*_DTYPES, "F8_E8M0")
    return (*_DTYPES, _FP8) if config.fp8 and _is_projection(name) else _DTYPES


def _draft_shapes(config: ModelConfig, present: Iterable[str]) -> tuple[Shapes, Shapes]:
    """The required and the optional tensors of draft layers.

    How many there are is read off the tensors themselves: config.json often says something else.
    """
    layers = {int(found[1]) for name in present if (found := _LAYER.match(name)) and name.endswith(".eh_proj.weight")}
    D = config.hidden_size
    required = Shapes()
    optional = Shapes()
    for layer in sorted(layer for layer in layers if layer >= config.num_layers):
        prefix = f"model.layers.{layer}."
        required |= _layer_shapes(config, layer, sparse=config.experts is not None)
        required |= _prefixed(
            prefix,
            {"enorm.weight": (D,), "hnorm.weight": (D,), "eh_proj.weight": (D, 2 * D), "shared_head.norm.weight": (D,)},
        )
        tables = {"embed_tokens.weight": (config.vocab_size, D), "shared_head.head.weight": (config.vocab_size, D)}
        optional |= _prefixed(prefix, tables)
    return required, optional


def _prefixed(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def _fault(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} tensors {kind}: {', '.join(names[:_LISTED])}{more}"
