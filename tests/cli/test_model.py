"""`isthmus model`: run as a command, on directories and on a hub over loopback."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from isthmus.checkpoint.directory import Checkpoint
from isthmus.checkpoint.model_config import parse_config
from isthmus.checkpoint.tensor_names import model_shapes
from isthmus.cli import arguments
from isthmus.cli.model import run
from isthmus.cli.model_check import Report, ServingPlan, check_model, shown_bytes
from isthmus.kv.planes import kv_layout
from isthmus.model import load_model
from tests.model.hub_server import HubModel, serving
from tools.checkpoints import Recipe, write_checkpoint
from tools.checkpoints.recipe import raw_config

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30


def check(model: object, *flags: str) -> Report:
    parsed = arguments.parse(["model", "check", str(model), *flags])
    plan = ServingPlan(parsed.dtype, parsed.device, parsed.block_size, parsed.memory, cache_dtype=parsed.cache_dtype)
    return check_model(parsed.model, plan)


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "isthmus.cli", *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("models") / "v3", Recipe("deepseek-v3", dtype="fp32"))


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    for file in written.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_the_bundled_model_is_served_and_torch_is_not_imported():
    program = (
        "import sys; from isthmus.cli import main; status = main(['model', 'check', 'bundled']); "
        "sys.exit(99 if {'torch', 'transformers', 'numpy'} & {*sys.modules} else status)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "served: yes"
    told = {line[:14].strip(): line[14:] for line in lines}
    assert told["architecture"] == "deepseek_v3"
    assert told["layers"] == "4: 1 dense, 3 with experts"
    assert told["experts"] == "16 of width 128, 2 a token from 2 of 4 groups by sigmoid; 1 shared"
    assert told["kept aside"] == "66 tensors, 2.7 MiB of draft (MTP) layers"
    assert told["tokenizer"] == "present; chat template present"
    assert told["ends with"] == "1"


@pytest.mark.parametrize("like", ["deepseek-v3", "deepseek-v2-lite", "minicpm3-4b", "mistral-small-4"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sizes_are_those_of_the_loaded_model(like: str, dtype: Any, tmp_path: Path):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, Recipe(like)))
    report = check(tmp_path, "--dtype", dtype, "--block-size", "32")
    model = load_model(checkpoint, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], torch.device("cpu"))
    layout = kv_layout(model.config, "", dtype=dtype, block_size=32)
    assert report.serving.cache_bytes_per_token == layout.bytes_per_token
    assert report.serving.block_bytes == layout.block_bytes
    assert report.parameters.total == sum(map(math.prod, model_shapes(checkpoint.config).values()))
    assert report.weights.num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in load_all(tmp_path))
    if dtype == "fp32":
        assert report.serving.weight_bytes == 4 * report.parameters.total


def load_all(folder: Path) -> list[torch.Tensor]:
    return [tensor for file in folder.glob("*.safetensors") for tensor in load_file(file).values()]


def test_active_parameters_leave_out_the_experts_not_chosen(written: Path):
    parameters = check(written).parameters
    idle = 2 * (16 - 4) * 3 * 128 * 64  # layers, experts, matrices, hidden size, width
    assert parameters.total - parameters.active == idle


def test_room_is_what_the_weights_leave(written: Path):
    serving = check(written).serving
    needed = serving.weight_bytes + 3 * serving.block_bytes
    assert check(written, "--memory", f"{needed}").serving.num_blocks == 3
    assert check(written, "--memory", f"{needed - 1}").serving.num_tokens == 2 * 16
    small = check(written, "--memory", "1MiB")
    needs = f"{shown_bytes(serving.weight_bytes)} of weights in fp32"
    assert small.reasons == [f"a worker needs room for {needs} and one block, the memory is 1.0 MiB"]


def test_fp8_is_counted_as_stored_where_it_stays_so(tmp_path: Path):
    write_checkpoint(tmp_path, Recipe("deepseek-v3", fp8="float"))
    report = check(tmp_path, "--dtype", "bf16", "--device", "cuda", "--memory", "80GiB")
    assert report.reasons == []
    assert report.weights.dtypes.keys() == {"F8_E4M3", "BF16", "F32"}
    router = 2 * 16 * 128 * 2  # two layers of gates, kept in fp32 when served
    assert report.serving.weight_bytes == report.weights.num_bytes + router
    dequantised = check(tmp_path, "--dtype", "bf16").serving
    assert dequantised.weight_bytes == 2 * report.parameters.total + router + 2 * 16 * 2  # and the correction bias


def test_fp8_rows_of_the_cache_are_counted_as_the_engine_counts_them(tmp_path: Path):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, Recipe("deepseek-v3", dtype="bf16")))
    flags = ["--dtype", "bf16", "--device", "cuda", "--memory", "80GiB"]
    report = check(tmp_path, *flags, "--cache-dtype", "fp8")
    layout = kv_layout(checkpoint.config, "", dtype="fp8", block_size=16)
    serving = report.serving
    assert report.reasons == []
    assert (serving.cache_dtype, serving.cache_bytes_per_token) == ("fp8", layout.bytes_per_token)
    assert serving.block_bytes == layout.block_bytes
    assert serving.num_blocks == (80 * GIB - serving.weight_bytes) // layout.block_bytes
    assert serving.cache_bytes_per_token < check(tmp_path, *flags).serving.cache_bytes_per_token
    done = command("model", "check", str(tmp_path), *flags, "--cache-dtype", "fp8")
    assert "rows in fp8" in done.stdout


def test_fp8_rows_that_no_worker_would_store_are_a_reason(written: Path):
    (reason,) = check(written, "--cache-dtype", "fp8").reasons
    assert reason == "cache_dtype: fp8 rows need --device cuda and --dtype bf16, not cpu and fp32"


def test_every_reason_is_given_at_once(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.gate.weight"]
    tensors["model.norm.weight"] = torch.ones(7)
    tensors["model.layers.0.self_attn.sinks"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float64)
    save_file(tensors, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("{")
    answer = command("model", "check", str(folder), "--memory", "2MiB")
    assert answer.returncode == 1, answer.stderr
    last = answer.stdout.splitlines()[-1]
    assert last.startswith("served: no - ")
    for reason in (
        "1 tensors missing: model.layers.1.mlp.gate.weight",
        "1 tensors unexpected: model.layers.0.self_attn.sinks",
        "1 tensors of wrong shape: model.norm.weight [7], not [128]",
        "lm_head.weight F64",
        "tokenizer.json: not JSON",
        "the memory is 2.0 MiB",
    ):
        assert reason in last


def test_an_architecture_that_is_not_served_is_named(folder: Path):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "model_type": "deepseek_v32"}))
    (folder / "tokenizer.json").write_text("[]")
    answer = check(folder)
    assert "model_type is 'deepseek_v32'" in answer.reasons[0]
    assert any("tokenizer.json" in reason for reason in answer.reasons)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_incomplete_directories(folder: Path, missing: str):
    (folder / missing).unlink()
    (reason,) = check(folder).reasons
    assert missing.removeprefix("model") in reason


def test_what_is_neither_directory_nor_id_cannot_be_looked_at():
    done = command("model", "check", "./no/such/directory")
    assert done.returncode == 2
    assert "org/name" in done.stderr


def test_the_memory_of_a_gpu_is_said():
    done = command("model", "check", "bundled", "--device", "cuda")
    assert done.returncode == 2
    assert "--memory 80GiB" in done.stderr


def test_json_says_the_same(written: Path):
    done = command("model", "check", str(written), "--json", "--memory", "24GiB")
    told = json.loads(done.stdout)
    assert done.returncode == 0
    assert told["served"] is True
    assert told["reasons"] == []
    assert told["serving"]["memory_bytes"] == 24 * GIB
    assert told["config"]["experts"]["num_experts"] == 16
    assert told["parameters"]["total"] > told["parameters"]["active"]


def test_a_checkpoint_larger_than_memory_is_checked_by_its_headers(tmp_path: Path):
    """31 GB that take no room: the file is a header and a hole."""
    raw = raw_config(Recipe("deepseek-v2-lite", scale="full"))
    header = {}
    end = 0
    for name, shape in model_shapes(parse_config(raw)).items():
        start = end
        end += 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    report = check(tmp_path, "--dtype", "bf16", "--memory", "80GB")
    assert [reason for reason in report.reasons if "tokenizer" not in reason] == []
    assert report.parameters.total / 1e9 == pytest.approx(15.7, abs=0.05)
    assert report.parameters.active / 1e9 == pytest.approx(2.66, abs=0.05)
    assert report.serving.cache_bytes_per_token == 31_104
    assert report.serving.num_tokens == (80 * 10**9 - report.serving.weight_bytes) // (16 * 31_104) * 16


def test_a_hub_model_is_checked_without_its_weights(written: Path, tmp_path: Path):
    files = {file.name: file.read_bytes() for file in written.iterdir()}
    with serving({"org/model": HubModel.of(files)}) as hub:
        environment = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = command("model", "check", "org/model", "--memory", "1GiB", **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert hub.num_bytes_sent < 300_000 < len(files["model.safetensors"])
        [commit] = hub.models["org/model"].commits
        assert done.stdout.splitlines()[0].split()[-1] == f"org/model@{commit}"
        path = command("model", "path", "org/model", **environment)
        assert path.stdout.strip().endswith(f"snapshots/{commit}")
    offline = command("model", "check", "org/model", "--memory", "1GiB", HF_HUB_OFFLINE="1", **environment)
    assert offline.stdout.splitlines()[2:] == done.stdout.splitlines()[2:]


def test_a_stack_fetches_its_model_first(tmp_path: Path):
    with serving({}) as hub:
        environment = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
        done = command("up", "--model", "org/model", **environment)
    assert done.returncode == 2
    assert "'org/model' is neither a directory here nor a model" in done.stderr


def test_a_running_router_has_its_own_model():
    parsed = arguments.parse(["generate", "Hello", "--router", "127.0.0.1:1", "--model", "org/model"])
    arguments.pin_model(parsed)
    assert parsed.model == "org/model"


def test_model_is_a_command_without_a_loop(capsys: pytest.CaptureFixture[str]):
    assert run(arguments.parse(["model", "path", "bundled"])) == 0
    assert Path(capsys.readouterr().out.strip()) == ROOT / "isthmus/bundled"
