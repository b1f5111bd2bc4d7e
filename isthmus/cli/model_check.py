"""What a checkpoint is, what serving it takes and every reason why it cannot be served: all from headers."""

import json
import math
import os
from collections import Counter
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from isthmus.checkpoint import hub
from isthmus.checkpoint.directory import TensorEntry, read_tensors, resolve_model
from isthmus.checkpoint.model_config import ModelConfig, parse_config, token_ids
from isthmus.checkpoint.tensor_names import find_faults, model_shapes
from isthmus.cli.hub_model import fetch_headers
from isthmus.errors import CannotStart
from isthmus.kv.layout import DTYPE_BYTES
from isthmus.kv.planes import CacheDtype, kv_layout, stored_as
from isthmus.text.tokenizer import NoTokenizer, Tokenizer

_FP8: Final = "F8_E4M3"
_CANNOT_START: Final = "cannot start: "
_OF_THE_MODEL: Final = "model: "


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """Tensors as they are stored; draft layers are among them and not served."""

    num_tensors: int
    num_bytes: int
    dtypes: dict[str, int]  # tensors of each
    num_draft_tensors: int
    draft_bytes: int


@dataclass(frozen=True, slots=True)
class Parameters:
    total: int
    active: int  # that take part in a token


@dataclass(frozen=True, slots=True)
class Serving:
    """What one worker needs."""

    dtype: str
    weight_bytes: int
    keeps_fp8: bool  # what is stored as FP8 stays so
    cache_dtype: str  # of a cached row
    cache_bytes_per_token: int
    block_size: int
    block_bytes: int
    memory_bytes: int
    num_blocks: int  # beside the weights
    num_tokens: int


@dataclass(slots=True)
class Report:
    """What `check_model` found, which alone writes it. What could not be found out is None; `reasons` says why."""

    model: str
    path: Path
    dtype: str
    config: ModelConfig | None = None
    parameters: Parameters | None = None
    weights: StoredWeights | None = None
    serving: Serving | None = None
    has_tokenizer: bool = False
    has_chat_template: bool = False
    eos_token_ids: tuple[int, ...] = ()
    reasons: list[str] = field(default_factory=list[str])

    def refuse(self, reason: str) -> None:
        """Said once, whoever finds it."""
        if reason not in self.reasons:
            self.reasons.append(reason)


@dataclass(frozen=True, slots=True)
class ServingPlan:
    """How the model would be served."""

    dtype: str
    device: str  # cpu or cuda
    block_size: int
    memory_bytes: int | None  # None: this machine's
    context_length: int | None = None  # None: the model's
    cache_dtype: CacheDtype = "auto"


def check_model(model: str, plan: ServingPlan) -> Report:
    """Raises CannotStart where there is nothing to look at."""
    folder, remote = _open(model)
    report = Report(model if remote is None else f"{remote.name}@{remote.revision}", folder, plan.dtype)
    raw = _read_json(folder / "config.json", report)
    if not (folder / "config.json").exists():
        report.refuse(f"{folder / 'config.json'} is missing")
    with _reasons(report):
        report.config = parse_config(raw, plan.context_length) if raw else None
    tensors = _tensors(folder, remote, report)
    _look_at_text(folder, report)
    _look_at_eos(folder, raw, report)
    if tensors is not None:
        faults, draft = ([], ()) if report.config is None else find_faults(report.config, tensors)
        for fault in faults:
            report.refuse(fault)
        report.weights = _weights(tensors, () if faults else draft)
    if report.config is not None:
        report.parameters = _parameters(report.config)
        with _reasons(report):
            report.serving = _serving(report.config, plan, tensors or {})
            _check_room(report, report.serving)
    return report


def _open(model: str) -> tuple[Path, hub.HubId | None]:
    """The directory to look at, and for a hub model whose weights are not in the cache its id and commit."""
    hub_id = hub.parse_id(model)
    if hub_id is None:
        return resolve_model(model), None
    folder = hub.fetch(hub_id.name, revision=hub_id.revision, files=hub.CHECKED_FILES)
    remote = hub.HubId(hub_id.name, folder.name)
    return folder, None if _has_weights(folder) else remote


def _has_weights(folder: Path) -> bool:
    index = folder / "model.safetensors.index.json"
    try:
        names = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()} if index.exists() else set()
    except (ValueError, KeyError, AttributeError):
        return False
    return all((folder / name).exists() for name in names or {"model.safetensors"})


def _tensors(folder: Path, remote: hub.HubId | None, report: Report) -> Mapping[str, TensorEntry] | None:
    with _reasons(report):
        if remote is not None:
            return fetch_headers(remote.name, revision=remote.revision)
        return read_tensors(folder)[1]
    return None


@contextmanager
def _reasons(report: Report) -> Generator[None]:
    """What would stop a process at its start is a reason."""
    try:
        yield
    except CannotStart as error:
        problem, _, _ = error.detail.removeprefix(_CANNOT_START).partition(". To mend it: ")
        report.refuse(problem.removeprefix(_OF_THE_MODEL))


def _read_json(file: Path, report: Report) -> dict[str, Any]:
    """Empty where there is none; what is damaged is a reason."""
    try:
        value = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError) as error:
        report.refuse(f"{file} cannot be read: {error}")
        return {}
    return value if isinstance(value, dict) else {}


def _look_at_text(folder: Path, report: Report) -> None:
    with _reasons(report):
        tokenizer = Tokenizer.open(folder)
        report.has_tokenizer = not isinstance(tokenizer, NoTokenizer)
        report.has_chat_template = (folder / "chat_template.jinja").exists() or bool(
            _read_json(folder / "tokenizer_config.json", report).get("chat_template")
        )
        if report.config and tokenizer.vocab_size > report.config.vocab_size:
            sizes = f"{tokenizer.vocab_size} tokens, the model {report.config.vocab_size}"
            report.refuse(f"tokenizer.json knows {sizes}")


def _look_at_eos(folder: Path, raw: Mapping[str, Any], report: Report) -> None:
    chosen = _read_json(folder / "generation_config.json", report).get("eos_token_id")
    report.eos_token_ids = token_ids(chosen) or token_ids(raw.get("eos_token_id"))


def _weights(tensors: Mapping[str, TensorEntry], draft: Collection[str]) -> StoredWeights:
    return StoredWeights(
        num_tensors=len(tensors),
        num_bytes=sum(tensor.num_bytes for tensor in tensors.values()),
        dtypes=dict(Counter(tensor.dtype for tensor in tensors.values()).most_common()),
        num_draft_tensors=len(draft),
        draft_bytes=sum(tensors[name].num_bytes for name in draft),
    )


def _parameters(config: ModelConfig) -> Parameters:
    sizes = {name: math.prod(shape) for name, shape in model_shapes(config).items()}
    total = sum(sizes.values())
    if config.experts is None:
        return Parameters(total, total)
    routed = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    return Parameters(total, total - routed + routed * config.experts.num_per_token // config.experts.num_experts)


def _serving(config: ModelConfig, plan: ServingPlan, tensors: Mapping[str, TensorEntry]) -> Serving:
    cache_dtype = stored_as(plan.dtype, plan.cache_dtype, plan.device)
    layout = kv_layout(config, "", dtype=cache_dtype, block_size=plan.block_size)
    keeps_fp8 = plan.device == "cuda" and any(tensor.dtype == _FP8 for tensor in tensors.values())
    weight_bytes = sum(
        _fp8_bytes(name, tensors)
        if keeps_fp8 and name in tensors and tensors[name].dtype == _FP8
        else math.prod(shape) * _bytes_each(name, plan.dtype)
        for name, shape in model_shapes(config).items()
    )
    memory_bytes = _machine_bytes() if plan.memory_bytes is None else plan.memory_bytes
    num_blocks = max(0, memory_bytes - weight_bytes) // layout.block_bytes
    return Serving(
        dtype=plan.dtype,
        weight_bytes=weight_bytes,
        keeps_fp8=keeps_fp8,
        cache_dtype=cache_dtype,
        cache_bytes_per_token=layout.bytes_per_token,
        block_size=plan.block_size,
        block_bytes=layout.block_bytes,
        memory_bytes=memory_bytes,
        num_blocks=num_blocks,
        num_tokens=num_blocks * plan.block_size,
    )


def _fp8_bytes(name: str, tensors: Mapping[str, TensorEntry]) -> int:
    """With its scales."""
    return sum(tensors[stored].num_bytes for stored in (name, f"{name}_scale_inv") if stored in tensors)


def _bytes_each(name: str, dtype: str) -> int:
    """The router computes in fp32."""
    return DTYPE_BYTES["fp32" if ".mlp.gate." in name else dtype]


def _machine_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_room(report: Report, serving: Serving) -> None:
    if serving.num_blocks == 0:
        needed = f"{shown_bytes(serving.weight_bytes)} of weights in {serving.dtype} and one block"
        report.refuse(f"a worker needs room for {needed}, the memory is {shown_bytes(serving.memory_bytes)}")


def shown_bytes(num_bytes: int) -> str:
    """In the largest unit that leaves a digit before the point."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes} bytes"
