"""`isthmus model path MODEL` says where a checkpoint lies, `isthmus model check MODEL` whether it can be served."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from isthmus.checkpoint.directory import resolve_model
from isthmus.checkpoint.model_config import Experts, ModelConfig
from isthmus.cli.model_check import Parameters, Report, Serving, ServingPlan, StoredWeights, check_model, shown_bytes
from isthmus.errors import CannotStart

_COLUMN = 14


def run(parsed: argparse.Namespace) -> int:
    """Without an event loop: Ctrl-C ends a download at once."""
    if parsed.action == "path":
        sys.stdout.write(f"{resolve_model(parsed.model)}\n")
        return 0
    if parsed.device == "cuda" and parsed.memory is None:
        raise CannotStart("--memory", "a GPU's is not looked up", "say how much a worker may use, as --memory 80GiB")
    report = check_model(parsed.model, _plan(parsed))
    if parsed.json:
        sys.stdout.write(json.dumps(_as_json(report)) + "\n")
    else:
        sys.stdout.writelines(f"{name.ljust(_COLUMN)}{line}\n" for name, line in _lines(report))
        sys.stdout.write(f"served: {'no - ' + '; '.join(report.reasons) if report.reasons else 'yes'}\n")
    return 1 if report.reasons else 0


def _plan(parsed: argparse.Namespace) -> ServingPlan:
    return ServingPlan(
        dtype=parsed.dtype,
        device=parsed.device,
        block_size=parsed.block_size,
        memory_bytes=parsed.memory,
        context_length=parsed.context_length,
        cache_dtype=parsed.cache_dtype,
    )


def _as_json(report: Report) -> dict[str, Any]:
    told = asdict(report)
    if report.config is not None and report.config.experts is not None:
        told["config"]["experts"]["routing"]["bias"] = report.config.experts.routing.bias.value
    return {**told, "path": str(report.path), "served": not report.reasons}


def _lines(report: Report) -> Iterator[tuple[str, str]]:
    yield "model", report.model
    yield "directory", str(report.path)
    if report.config is not None:
        yield from _config_lines(report.config)
    if report.parameters is not None:
        yield "parameters", _parameters_line(report.parameters)
    if report.weights is not None:
        yield from _weight_lines(report.weights)
    if report.serving is not None:
        yield from _serving_lines(report.serving)
    text = "present" if report.has_tokenizer else "missing: prompts and answers are token ids"
    yield "tokenizer", f"{text}; chat template {_present(report.has_chat_template)}"
    yield "ends with", ", ".join(map(str, report.eos_token_ids)) or "no token: only a limit or a stop string ends text"


def _config_lines(config: ModelConfig) -> Iterator[tuple[str, str]]:
    yield "architecture", config.model_type
    num_sparse = sum(config.sparse_layers)
    yield "layers", f"{config.num_layers}: {config.num_layers - num_sparse} dense, {num_sparse} with experts"
    yield "sizes", f"hidden {config.hidden_size}, dense {config.intermediate_size}, vocabulary {config.vocab_size:,}"
    query = "plain queries" if config.q_lora_rank is None else f"query rank {config.q_lora_rank}"
    head = f"{config.qk_nope_head_dim} + {config.qk_rope_head_dim} rotary, value {config.v_head_dim}"
    yield "attention", f"{config.num_heads} heads of {head}; {query}, latent rank {config.kv_lora_rank}"
    if config.experts is not None:
        yield "experts", _experts_line(config.experts)
    yield "context", f"{config.context_length:,} tokens"
    rope = config.rope
    scaling = "" if rope.kind == "default" else f", {rope.factor:g} times {rope.original_max_position_embeddings:,}"
    yield "rope", f"{rope.kind}, theta {rope.theta:g}{scaling}"


def _experts_line(experts: Experts) -> str:
    groups = f" from {experts.num_groups_chosen} of {experts.num_groups} groups" if experts.num_groups > 1 else ""
    scores = "softmax" if experts.routing.softmax else "sigmoid"
    chosen = f"{experts.num_per_token} a token{groups} by {scores}"
    return f"{experts.num_experts} of width {experts.width}, {chosen}; {experts.num_shared} shared"


def _parameters_line(parameters: Parameters) -> str:
    return f"{_shown_count(parameters.total)}, {_shown_count(parameters.active)} active per token"


def _weight_lines(weights: StoredWeights) -> Iterator[tuple[str, str]]:
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in weights.dtypes.items())
    yield "stored", f"{shown_bytes(weights.num_bytes)} in {weights.num_tensors:,} tensors: {dtypes}"
    if weights.num_draft_tensors:
        aside = f"{weights.num_draft_tensors:,} tensors, {shown_bytes(weights.draft_bytes)}"
        yield "kept aside", f"{aside} of draft (MTP) layers"


def _serving_lines(serving: Serving) -> Iterator[tuple[str, str]]:
    fp8 = ", FP8 as stored" if serving.keeps_fp8 else ""
    yield f"in {serving.dtype}", f"{shown_bytes(serving.weight_bytes)} of weights{fp8}"
    block = f"{shown_bytes(serving.block_bytes)} a block of {serving.block_size}"
    rows = "" if serving.cache_dtype == serving.dtype else f", rows in {serving.cache_dtype}"
    yield "cache", f"{shown_bytes(serving.cache_bytes_per_token)} a token, {block}{rows}"
    room = f"{serving.num_blocks:,} blocks, {serving.num_tokens:,} tokens"
    yield "room", f"{room} beside the weights of one worker in {shown_bytes(serving.memory_bytes)}"


def _shown_count(count: int) -> str:
    return f"{count / 1e9:,.2f} billion" if count >= 1e9 else f"{count / 1e6:,.2f} million"


def _present(is_there: bool) -> str:  # noqa: FBT001 - the one word it chooses
    return "present" if is_there else "missing"
