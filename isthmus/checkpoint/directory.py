"""A model directory in Hugging Face form: config.json, safetensors, tokenizer. Needs no torch, never unpickles."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import xxhash

from isthmus.checkpoint.hub import fetch, parse_id
from isthmus.checkpoint.model_config import ModelConfig, parse_config, token_ids
from isthmus.errors import CannotStart

BUNDLED: Final = "bundled"
_INDEX_FILE: Final = "model.safetensors.index.json"
_PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MAX_HEADER_BYTES: Final = 100 << 20  # the bound of the safetensors format
_HASHING_THREADS: Final = 4


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor, as its file's header describes it."""

    file: Path
    dtype: str  # safetensors' name: F32, BF16, …
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A model directory that was checked as far as that needs no tensor data."""

    path: Path
    config: ModelConfig
    eos_token_ids: tuple[int, ...]
    weight_files: tuple[Path, ...]
    tensors: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, path: str | Path, context_length: int | None = None) -> "Checkpoint":
        """Reads a directory, or a hub id, which is fetched. `context_length` None: as long as the model allows.

        Raises CannotStart with the file or field that is wrong, and how to mend it.
        """
        folder = resolve_model(path)
        config = parse_config(_read_json(folder / "config.json"), context_length)
        files, tensors = read_tensors(folder)
        return cls(folder, config, _eos_token_ids(folder, config), files, tensors)

    @cached_property
    def digest(self) -> str:
        """32 hex digits over config.json and every byte of the weights; the first use reads all of them."""
        return _digest((self.path / "config.json", *self.weight_files))


def read_tensors(folder: Path) -> tuple[tuple[Path, ...], dict[str, TensorEntry]]:
    """The weight files of a directory, and every tensor by name. Raises CannotStart."""
    weight_map = _weight_map(folder / _INDEX_FILE)
    files = _weight_files(folder, weight_map)
    return files, _tensors(files, weight_map)


def resolve_model(model: str | Path) -> Path:
    """The directory of a model: a directory itself, a hub id, which is fetched, or `bundled` for the one shipped here.

    Raises CannotStart.
    """
    if hub_id := parse_id(str(model)):
        return fetch(hub_id.name, revision=hub_id.revision)
    folder = Path(__file__).parents[1] / BUNDLED if str(model) == BUNDLED else Path(model)
    if not folder.is_dir():
        mend = f"name a checkpoint directory, a hub id (org/name or org/name@revision), or '{BUNDLED}'"
        raise CannotStart("model", f"{folder} is no directory", mend)
    return folder.resolve()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CannotStart("model", f"{file} is missing", "name a complete checkpoint directory") from error
    except (OSError, ValueError) as error:
        raise _broken(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise _broken(f"{file} holds no JSON object")
    return value


def _eos_token_ids(folder: Path, config: ModelConfig) -> tuple[int, ...]:
    file = folder / "generation_config.json"
    chosen = token_ids(_read_json(file).get("eos_token_id")) if file.exists() else ()
    return chosen or config.eos_token_ids


def _weight_files(folder: Path, weight_map: Mapping[str, str]) -> tuple[Path, ...]:
    """The files that the index names; without an index, every safetensors file."""
    if outside := [name for name in weight_map.values() if Path(name).name != name]:
        raise _broken(f"{folder / _INDEX_FILE} names {outside[0]!r}, not a plain file name")
    named = sorted({folder / name for name in weight_map.values()})
    if missing := [str(file) for file in named if not file.is_file()]:
        raise _broken(f"weight files are missing: {', '.join(missing)}")
    files = tuple(named or sorted(folder.glob("*.safetensors")))
    if not files:
        raise _no_weights(folder)
    return files


def _no_weights(folder: Path) -> CannotStart:
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLE_SUFFIXES)
    if pickled:
        problem = f"{folder} has only pickled weights ({', '.join(pickled[:4])}), which can run code when read"
        return CannotStart("model", problem, "convert them to safetensors")
    return CannotStart("model", f"{folder} has no *.safetensors file", "name a directory with weights")


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name to file name; empty where there is no index."""
    if not index.exists():
        return {}
    weight_map = _read_json(index).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise _broken(f"{index} has no weight_map of names")
    return weight_map


def _tensors(files: tuple[Path, ...], weight_map: Mapping[str, str]) -> dict[str, TensorEntry]:
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in _read_header(file).items():
            if name in tensors:
                problem = f"{name} is both in {tensors[name].file.name} and {file.name}"
                raise CannotStart("model", problem, "keep one copy of the weights in the directory")
            tensors[name] = entry
    absent = [name for name, file in weight_map.items() if name not in tensors or tensors[name].file.name != file]
    if absent:
        raise _broken(f"{_INDEX_FILE} lists {len(absent)} tensors that their files do not hold, first {absent[0]}")
    return tensors


def _read_header(file: Path) -> dict[str, TensorEntry]:
    """The JSON header of one safetensors file; its data must fill the file exactly."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
            raise _damaged(file, f"{size} bytes do not hold its header")
        try:
            header: dict[str, Any] = json.loads(stream.read(header_bytes))
            header.pop("__metadata__", None)
            found: dict[str, TensorEntry] = {}
            data_bytes = 0
            for name, fields in header.items():
                first, end = map(int, fields["data_offsets"])
                found[name] = TensorEntry(file, str(fields["dtype"]), tuple(map(int, fields["shape"])), end - first)
                data_bytes = max(data_bytes, end)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise _damaged(file, f"its header cannot be read ({type(error).__name__})") from error
    if 8 + header_bytes + data_bytes != size:
        raise _damaged(file, f"its header asks for {8 + header_bytes + data_bytes} bytes, it has {size}")
    return found


def _damaged(file: Path, problem: str) -> CannotStart:
    return CannotStart("model", f"{file} is truncated or damaged: {problem}", "fetch the file again")


def _broken(problem: str) -> CannotStart:
    return CannotStart("model", problem, "fetch the checkpoint again")


def _digest(files: tuple[Path, ...]) -> str:
    with ThreadPoolExecutor(_HASHING_THREADS) as threads:
        contents = threads.map(_content_digest, files)
        parts = [f"{file.name}\0{content}\0" for file, content in zip(files, contents, strict=True)]
    return xxhash.xxh3_128_hexdigest("".join(parts).encode())


def _content_digest(file: Path) -> str:
    with file.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()
