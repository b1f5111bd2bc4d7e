"""Checkpoint directories: both dialects are read, and each way a directory can be wrong is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from isthmus.checkpoint.directory import Checkpoint
from isthmus.checkpoint.model_config import parse_config
from isthmus.checkpoint.tensor_names import check_tensors
from isthmus.errors import CannotStart
from isthmus.model import load_model
from tests.model.small_models import edit_config, write_model, yarn


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scaling = yarn(mscale=1.0, mscale_all_dim=1.0)
    return write_model(tmp_path_factory.mktemp("models") / "v3", "v3", rope_parameters=scaling)


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    for file in written.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def load(folder: Path):
    return load_model(Checkpoint.open(folder), torch.float32, torch.device("cpu"))


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_both_dialects_give_the_same_configuration(folder: Path):
    new = json.loads((folder / "config.json").read_text())
    scaling = dict(new["rope_parameters"])
    old = {name: value for name, value in new.items() if name not in ("rope_parameters", "dtype")}
    old |= {"rope_theta": scaling.pop("rope_theta"), "torch_dtype": new["dtype"]}
    old["rope_scaling"] = {"type": scaling.pop("rope_type"), **scaling}
    assert parse_config(old) == parse_config(new)


def test_kimi_k2_is_served_like_v3(folder: Path):
    edit_config(folder, model_type="kimi_k2")
    assert load(folder).config.experts == Checkpoint.open(folder).config.experts


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "deepseek_v32"),
        ("hidden_act", "gelu"),
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("attention_bias", "yes"),
        ("mlp_bias", True),
        ("moe_layer_freq", 2),
        ("quantization_config", {"quant_method": "gptq"}),
        ("rope_parameters", {"rope_type": "llama3"}),
        ("num_key_value_heads", 1),
        ("n_group", 3),
        ("topk_group", 9),
        ("hidden_size", "48"),
        ("index_topk", 64),
    ],
)
def test_fields_that_change_the_maths_are_refused_by_name(folder: Path, field: str, value: object):
    edit_config(folder, **{field: value})
    with pytest.raises(CannotStart) as refused:
        Checkpoint.open(folder)
    shown = repr(next(iter(value.values())) if isinstance(value, dict) else value)
    assert shown in refused.value.detail
    assert field.replace("rope_parameters", "rope_type") in refused.value.detail


def test_every_tensor_that_does_not_fit_is_in_one_error(folder: Path):
    def change(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
        tensors["model.layers.0.mystery"] = torch.zeros(2)
        tensors["lm_head.weight"] = torch.zeros(3, 4)
        tensors["model.layers.2.mlp.gate.weight"] = tensors["model.layers.2.mlp.gate.weight"].to(torch.int8)

    rewrite(folder, change)
    with pytest.raises(CannotStart) as refused:
        load(folder)
    text = refused.value.detail
    assert "2 tensors missing: model.norm.weight, model.layers.1.mlp.experts.3.up_proj.weight" in text
    assert "1 tensors unexpected: model.layers.0.mystery" in text
    assert "lm_head.weight [3, 4], not [199, 48]" in text
    assert "model.layers.2.mlp.gate.weight I8" in text


def test_draft_layers_are_recognised_and_kept_aside():
    checkpoint = Checkpoint.open("bundled")
    draft = check_tensors(checkpoint)
    last = checkpoint.config.num_layers
    assert f"model.layers.{last}.eh_proj.weight" in draft
    assert all(name.startswith(f"model.layers.{last}.") for name in draft)


def test_progress_ends_at_the_bytes_that_are_read():
    """The bundled checkpoint has draft layers: they do not count."""
    told: list[tuple[int, int]] = []
    checkpoint = Checkpoint.open("bundled")
    load_model(checkpoint, torch.float32, torch.device("cpu"), lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    done, total = told[-1]
    assert done == total < sum(entry.num_bytes for entry in checkpoint.tensors.values())


def test_a_layer_too_many_that_is_no_draft_layer_is_unexpected(folder: Path):
    rewrite(folder, lambda tensors: tensors.update({"model.layers.3.input_layernorm.weight": torch.ones(48)}))
    with pytest.raises(CannotStart, match=r"unexpected: model\.layers\.3\.input_layernorm\.weight"):
        load(folder)


def test_sharded_weights_are_the_same_model(folder: Path):
    whole = load(folder)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sharded = load(folder)
    assert torch.equal(sharded.head, whole.head)
    assert torch.equal(sharded.layers[2].attention.qkv_a.weight, whole.layers[2].attention.qkv_a.weight)
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(CannotStart, match=r"model-2\.safetensors"):
        load(folder)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_truncated_weights_name_the_file(folder: Path, length: int):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CannotStart, match=r"model\.safetensors is truncated or damaged"):
        load(folder)


def test_pickled_weights_are_never_read(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CannotStart, match=r"pickled weights \(pytorch_model\.bin\)"):
        load(folder)


def test_index_cannot_point_outside_the_directory(folder: Path):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(CannotStart, match="not a plain file name"):
        load(folder)


def test_missing_or_broken_config_is_named(folder: Path):
    (folder / "config.json").write_text("{")
    with pytest.raises(CannotStart, match=r"config\.json cannot be read"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CannotStart, match=r"config\.json is missing"):
        load(folder)
    with pytest.raises(CannotStart, match="no directory"):
        load(folder / "nowhere")


def test_digest_covers_weights_and_config(folder: Path):
    first = Checkpoint.open(folder).digest
    assert Checkpoint.open(folder).digest == first
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].add_(1.0))
    second = Checkpoint.open(folder).digest
    edit_config(folder, rms_norm_eps=1e-5)
    assert len({first, second, Checkpoint.open(folder).digest}) == 3


def test_end_tokens_come_from_the_generation_config_first(folder: Path):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert Checkpoint.open(folder).eos_token_ids == (7, 9)
    (folder / "generation_config.json").unlink()
    assert Checkpoint.open(folder).eos_token_ids == (1,)
