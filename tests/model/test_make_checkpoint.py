"""Random checkpoints in published shapes: transformers reads each of them whole, and so does isthmus."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Mistral4ForCausalLM

from isthmus.checkpoint.directory import Checkpoint
from isthmus.checkpoint.model_config import parse_config
from isthmus.checkpoint.tensor_names import check_tensors, model_shapes
from isthmus.text.tokenizer import Tokenizer
from isthmus.v1 import inference_pb2
from tools.checkpoints import PUBLISHED, SCALES, Recipe, write_checkpoint
from tools.checkpoints.recipe import raw_config

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 128
# Of the models' own descriptions, without draft layers.
BILLIONS = {
    "deepseek-v2-lite": 15.7,
    "deepseek-v2": 236,
    "deepseek-v3": 671,
    "deepseek-r1": 671,
    "kimi-k2": 1026,
    "moonlight": 16,
    "glm-4.7-flash": 30,
    "youtu-2b": 1.96,
    "ax-k1": 519,
    "minicpm3-4b": 4.07,
    "mistral-small-4": 119,
}


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def load_with_transformers(folder: Path) -> tuple[Any, dict[str, Any]]:
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps({**raw, "model_type": raw["model_type"].replace("kimi_k2", "deepseek_v3")}))
    model_class = Mistral4ForCausalLM if raw["model_type"] == "mistral4" else AutoModelForCausalLM
    model, problems = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model, {kind: names for kind, names in problems.items() if names}


@pytest.mark.parametrize("like", PUBLISHED)
def test_transformers_and_isthmus_read_every_family(like: str, tmp_path: Path):
    folder = write_checkpoint(tmp_path, Recipe(like, dtype="fp32"))
    checkpoint = Checkpoint.open(folder)
    check_tensors(checkpoint)
    assert checkpoint.config == parse_config(raw_config(Recipe(like)))
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10e6
    model, problems = load_with_transformers(folder)
    assert problems == {}
    prompt = AutoTokenizer.from_pretrained(folder)("A prompt of some bytes", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(prompt).logits[0]
    assert 2 < logits.std() < 4
    assert len(set(logits.argmax(-1).tolist())) > prompt.shape[1] // 2


@pytest.mark.parametrize("like", PUBLISHED)
def test_full_scale_has_as_many_parameters_as_published(like: str):
    config = parse_config(raw_config(Recipe(like, scale="full")))
    num_parameters = sum(map(math.prod, model_shapes(config).values()))
    assert num_parameters / 1e9 == pytest.approx(BILLIONS[like], rel=0.02)


@pytest.mark.parametrize("scale", SCALES[:2])
@pytest.mark.parametrize("like", PUBLISHED)
def test_small_scales_take_the_branches_of_the_original(like: str, scale: Any):
    original = parse_config(raw_config(Recipe(like, scale="full")))
    small = parse_config(raw_config(Recipe(like, scale=scale)))
    assert {*small.sparse_layers} == {*original.sparse_layers}
    assert (small.q_lora_rank is None) == (original.q_lora_rank is None)
    assert (small.v_head_dim == small.qk_nope_head_dim) == (original.v_head_dim == original.qk_nope_head_dim)
    assert (small.rope.kind, small.rope.factor) == (original.rope.kind, original.rope.factor)
    if original.experts is not None:
        assert small.experts is not None
        assert small.experts.routing is original.experts.routing
        assert (small.experts.num_groups > 1) == (original.experts.num_groups > 1)
        assert small.experts.num_shared == original.experts.num_shared
    if scale == "small":
        assert small.latent_elements == original.latent_elements


def test_the_tokenizer_serves(tmp_path: Path):
    tokenizer = Tokenizer.open(write_checkpoint(tmp_path, Recipe("glm-4.7-flash")))
    text = "Grüße, 世界 🌍\n"
    token_ids = tokenizer.encode(text)
    assert token_ids[0] == 0
    assert len(token_ids) == 1 + len(text.encode())
    assert tokenizer.decode(token_ids) == text
    assert tokenizer.vocab_size == Checkpoint.open(tmp_path).config.vocab_size
    assert all(tokenizer.decode([token_id]) for token_id in range(3, tokenizer.vocab_size))
    chat = tokenizer.encode_chat([inference_pb2.ChatMessage(role="user", content="Hello")])
    assert tokenizer.decode(chat) == "user: Hello\nassistant:"


def test_published_special_ids_are_kept_at_full_scale(tmp_path: Path):
    from tools.checkpoints.tokenizer import write_tokenizer

    write_tokenizer(tmp_path, raw_config(Recipe("glm-4.7-flash", scale="full")))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token_id == 154820
    assert tokenizer.convert_ids_to_tokens([154827, 154829]) == ["<|eos_1|>", "<|eos_2|>"]
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id == 154822


def test_a_recipe_always_gives_the_same_bytes(tmp_path: Path):
    recipe = Recipe("deepseek-v3", fp8="float")
    first, again = write_checkpoint(tmp_path / "first", recipe), write_checkpoint(tmp_path / "again", recipe)
    assert {file.name: file.read_bytes() for file in first.iterdir()} == {
        file.name: file.read_bytes() for file in again.iterdir()
    }
    other = write_checkpoint(tmp_path / "other", Recipe("deepseek-v3", fp8="float", seed=1))
    assert (other / "model.safetensors").read_bytes() != (first / "model.safetensors").read_bytes()


def test_shards_and_dtypes_hold_the_same_values(tmp_path: Path):
    whole = all_tensors(write_checkpoint(tmp_path / "whole", Recipe("deepseek-v2-lite", dtype="fp32")))
    folder = write_checkpoint(tmp_path / "shards", Recipe("deepseek-v2-lite", shard_bytes=300_000))
    shards = all_tensors(folder)
    assert len(list(folder.glob("*.safetensors"))) > 5
    check_tensors(Checkpoint.open(folder))
    assert shards.keys() == whole.keys()
    for name, tensor in shards.items():
        assert torch.equal(tensor, whole[name].bfloat16()), name


def dequantised(stored: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    rows, columns = stored.shape
    spread = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return stored.float() * spread


@pytest.mark.parametrize("scales", ["float", "ue8m0"])
def test_fp8_is_the_same_model_in_fewer_bits(tmp_path: Path, scales: Any):
    plain = all_tensors(write_checkpoint(tmp_path / "plain", Recipe("deepseek-v3", dtype="fp32")))
    folder = write_checkpoint(tmp_path / "fp8", Recipe("deepseek-v3", dtype="fp32", fp8=scales))
    check_tensors(Checkpoint.open(folder))
    stored = all_tensors(folder)
    quantised = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    assert {name for name in plain if name.endswith("_proj.weight") or "_with_mqa" in name} == quantised
    ragged = 0
    for name, tensor in plain.items():
        if name not in quantised:
            assert torch.equal(stored[name], tensor), name
            continue
        scale = stored[f"{name}_scale_inv"]
        assert scale.shape == tuple(-(-length // BLOCK) for length in tensor.shape)
        ragged += any(length % BLOCK for length in tensor.shape)
        step = tensor.abs().clamp(min=scale.max() * 2**-6) / 16  # E4M3 keeps three bits after the first
        assert ((dequantised(stored[name], scale) - tensor).abs() <= step * 1.001).all(), name
        if scales == "ue8m0":
            assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    assert ragged > 10


def test_the_command_writes_what_was_asked(tmp_path: Path):
    command = "tools/make_checkpoint.py --like moonlight --layers 2 --dtype fp32 --fp8 --shard-gb 0.0005 --out".split()
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "MB/s" in done.stdout
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config.num_layers == 2
    assert checkpoint.config.fp8
    assert len(checkpoint.weight_files) > 1
    with safe_open(checkpoint.weight_files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
