"""Block-FP8 checkpoints: the weights transformers makes of them, ragged blocks, and the form that stays FP8."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from isthmus.checkpoint.directory import Checkpoint
from isthmus.engine.latent_cache import LatentCache
from isthmus.engine.runner import TorchRunner
from isthmus.errors import CannotStart
from isthmus.kv.planes import kv_layout
from isthmus.model import load_model
from isthmus.model.linear import Fp8ExpertStack, Fp8Linear
from isthmus.steps import DecodeRow, PrefillChunk
from tests.model.small_models import edit_config, write_model

CPU = torch.device("cpu")
QUANTISED: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}
# transformers reads a block's size off the shapes, so every matrix is whole blocks, or one block in a direction.
WHOLE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 96,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 96,
    "n_shared_experts": 1,
}
RAGGED: dict[str, Any] = {
    "hidden_size": 144,
    "intermediate_size": 200,
    "moe_intermediate_size": 136,
    "kv_lora_rank": 132,
    "q_lora_rank": 150,
    "v_head_dim": 50,
}


def quantise(weight: torch.Tensor, *, power_of_two: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """By the definition, block after block: weight[block] = fp8[block] * scale[block]."""
    fp8 = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-weight.shape[0] // 128), -(-weight.shape[1] // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))
            scale = weight[block].abs().max() / 448
            scales[i, j] = scale.log2().ceil().exp2() if power_of_two else scale
            fp8[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
    return fp8, scales


def dequantise(fp8: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    out = torch.empty(fp8.shape)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1)))
            out[block] = fp8[block].float() * scales[i, j].float()
    return out


def write_fp8(folder: Path, *, ue8m0: bool = False, **sizes: Any) -> tuple[Path, Path]:
    """A block-FP8 checkpoint, and the same weights dequantised in another directory."""
    quantised, plain = write_model(folder / "fp8", "v3", **sizes), write_model(folder / "plain", "v3", **sizes)
    tensors = load_file(quantised / "model.safetensors")
    plainly = dict(tensors)
    for name in [name for name in tensors if name.endswith(("_proj.weight", "_mqa.weight"))]:
        fp8, scales = quantise(tensors[name], power_of_two=ue8m0)
        tensors[name] = fp8
        tensors[f"{name}_scale_inv"] = scales.to(torch.float8_e8m0fnu) if ue8m0 else scales
        plainly[name] = dequantise(fp8, scales)
    save_file(tensors, quantised / "model.safetensors", metadata={"format": "pt"})
    save_file(plainly, plain / "model.safetensors", metadata={"format": "pt"})
    edit_config(quantised, quantization_config={**QUANTISED, **({"scale_fmt": "ue8m0"} if ue8m0 else {})})
    return quantised, plain


def logits(path: Path, dtype: torch.dtype, *, keeps_fp8: bool) -> torch.Tensor:
    checkpoint = Checkpoint.open(path)
    model = load_model(checkpoint, dtype, CPU, keeps_fp8=keeps_fp8)
    if keeps_fp8:
        assert isinstance(model.layers[0].attention.o, Fp8Linear)
        assert isinstance(model.layers[1].mlp.gate_up, Fp8ExpertStack)
    layout = kv_layout(checkpoint.config, "", dtype="fp32" if dtype == torch.float32 else "bf16", block_size=16)
    runner = TorchRunner(model, LatentCache(layout, 8, CPU))
    prompt = [(37 * i + 5) % 199 for i in range(70)]
    first = runner.prefill([PrefillChunk(prompt, 0, range(8), needs_logits=True)])
    return torch.cat((first, runner.decode([DecodeRow(3, 70, range(8))])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_transformers_makes(tmp_path: Path, dtype: torch.dtype):
    quantised, _ = write_fp8(tmp_path, **WHOLE)
    oracle = AutoModelForCausalLM.from_pretrained(quantised, dtype=dtype)
    model = load_model(Checkpoint.open(quantised), dtype, CPU)
    for ours, theirs in zip(model.layers, oracle.model.layers, strict=True):
        assert torch.equal(ours.attention.o.weight.t(), theirs.self_attn.o_proj.weight)
        assert torch.equal(ours.attention.kv_b.t(), theirs.self_attn.kv_b_proj.weight)
    for expert in range(8):
        assert torch.equal(
            model.layers[2].mlp.gate_up[expert].t(), oracle.model.layers[2].mlp.experts.gate_up_proj[expert]
        )
        assert torch.equal(model.layers[2].mlp.down[expert].t(), oracle.model.layers[2].mlp.experts.down_proj[expert])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ue8m0", [False, True])
def test_ragged_blocks_dequantised_or_kept_give_the_same_bits(tmp_path: Path, dtype: torch.dtype, ue8m0: bool):
    quantised, plain = write_fp8(tmp_path, ue8m0=ue8m0, **RAGGED)
    expected = logits(plain, dtype, keeps_fp8=False)
    assert torch.equal(logits(quantised, dtype, keeps_fp8=False), expected)
    assert torch.equal(logits(quantised, dtype, keeps_fp8=True), expected)


def test_a_matrix_without_its_scales_or_with_too_few_is_named(tmp_path: Path):
    quantised, _ = write_fp8(tmp_path, **RAGGED)
    tensors = load_file(quantised / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
    tensors["model.layers.1.self_attn.o_proj.weight_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, quantised / "model.safetensors")
    with pytest.raises(CannotStart) as refused:
        load_model(Checkpoint.open(quantised), torch.float32, CPU)
    assert "1 tensors missing: model.layers.0.mlp.up_proj.weight_scale_inv" in refused.value.detail
    assert "model.layers.1.self_attn.o_proj.weight_scale_inv [1, 1], not [2, 2]" in refused.value.detail


def test_fp8_that_the_config_does_not_speak_of_is_refused(tmp_path: Path):
    quantised, _ = write_fp8(tmp_path, **RAGGED)
    edit_config(quantised, quantization_config=None)
    with pytest.raises(CannotStart, match=r"unexpected.*weight_scale_inv.*of a dtype other than.*F8_E4M3"):
        load_model(Checkpoint.open(quantised), torch.float32, CPU)


@pytest.mark.parametrize(
    ("field", "value"), [("weight_block_size", [64, 64]), ("fmt", "e5m2"), ("quant_method", "awq")]
)
def test_other_quantisations_are_refused_by_name(tmp_path: Path, field: str, value: object):
    folder = write_model(tmp_path / "model", "v3")
    edit_config(folder, quantization_config={**QUANTISED, field: value})
    with pytest.raises(CannotStart) as refused:
        Checkpoint.open(folder)
    assert f"quantization_config.{field} is {value!r}" in refused.value.detail
