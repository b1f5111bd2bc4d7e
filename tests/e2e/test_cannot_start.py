"""A process that cannot start says which setting and how to mend it, and exits with status 2."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from isthmus.testing.stack import Stack, StackClient, request, running_stack, status, until

BUNDLED = Path(__file__).resolve().parents[2] / "isthmus" / "bundled"
WEIGHTS = "model.safetensors"


def drop_tensor(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    del tensors["model.layers.1.self_attn.kv_b_proj.weight"]
    save_file(tensors, model / WEIGHTS)


def reshape_tensor(model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, model / WEIGHTS)


def change_model_type(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))


def pickle_weights(model: Path) -> None:
    (model / WEIGHTS).rename(model / "pytorch_model.bin")


def truncate(model: Path) -> None:
    raw = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(raw[: len(raw) // 2])


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing tensor": (drop_tensor, "model.layers.1.self_attn.kv_b_proj.weight"),
    "wrong shape": (reshape_tensor, "model.norm.weight"),
    "unknown model_type": (change_model_type, "llama"),
    "pickle weights": (pickle_weights, "pytorch_model.bin"),
    "truncated safetensors": (truncate, WEIGHTS),
}


def run_decode(stack: Stack, *flags: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "decode_service", "--redis-url", stack.redis_url, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named(stack: Stack, tmp_path: Path, damage: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(BUNDLED, model)
    harm, named = DAMAGES[damage]
    harm(model)
    done = run_decode(stack, "--model", str(model))
    assert done.returncode == 2, done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--block-size", "17"], "block_size"),
        (["--dtype", "fp8"], "dtype"),
        (["--grpc-port", "70000"], "grpc_port"),
        (["--num-blocks", "4"], "num-blocks"),
        (["--device", "cuda"], "device"),
        (["--cache-dtype", "fp8"], "cache_dtype"),
        (["--model", "/no/such/directory"], "/no/such/directory"),
        (["--no-such-flag"], "no-such-flag"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_bad_setting_is_named(stack: Stack, flags: list[str], named: str) -> None:
    done = run_decode(stack, *flags)
    assert done.returncode == 2, done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_workers_that_share_a_gpu_are_told_how_much_each_may_take() -> None:
    command = [sys.executable, "-m", "isthmus.cli", "up", "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert "--cache-bytes" in done.stderr


def test_the_whole_stack_refuses_a_damaged_checkpoint(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(BUNDLED, model)
    truncate(model)
    command = [sys.executable, "-m", "isthmus.cli", "up", "--model", str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert WEIGHTS in done.stderr


def start_odd_worker(stack: Stack) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "decode_service", "--name", "odd", "--block-size", "64"]
    return subprocess.Popen([*command, "--redis-url", stack.redis_url], stderr=subprocess.DEVNULL)


async def test_a_worker_of_another_layout_stays_not_ready_and_names_the_field() -> None:
    with running_stack() as stack:
        odd = start_odd_worker(stack)
        try:

            async def is_listed() -> bool:
                return any(worker.name == "odd" for worker in (await status(stack.router)).workers)

            await until(is_listed, 30, "the odd worker registers")
            (listed,) = [worker for worker in (await status(stack.router)).workers if worker.name == "odd"]

            async def says_why() -> bool:
                return "block_size: 64 != 16" in (await status(listed.grpc_address)).reason

            await until(says_why, 10, "the odd worker names the field that differs")
            assert not listed.serving
            async with StackClient(stack.router) as client:
                result = await client.generate(request("Hello", max_tokens=4, ignore_eos=True))
            assert result.finished.workers.decode == "decode-0"
        finally:
            odd.terminate()
            odd.wait(10)
