"""Hub ids against a hub on loopback, each in a fresh process: huggingface_hub reads its settings when imported."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from isthmus.checkpoint.hub import HubId, model_name, parse_id
from isthmus.cli.hub_model import pinned
from tests.model.hub_server import Hub, HubModel, serving

ROOT = Path(__file__).resolve().parents[2]
MODEL = "org/small-model"


def weights(**shapes: list[int]) -> bytes:
    """A safetensors file of F32 zeros."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


OLD = {"config.json": b'{"version": 1}', "model.safetensors": weights(a=[2, 3])}
NEW = {
    "config.json": b'{"version": 2}',
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ bos_token }}",
    "model.safetensors": weights(a=[2, 3], b=[200, 500]),
}
LEFT_ALONE = {
    "README.md": b"# A model",
    "modeling_small.py": b"raise SystemExit('code of a model was run')",
    "pytorch_model.bin": b"a pickle",
    "consolidated.safetensors": b"the same weights again",
    "original/model-00001-of-00001.safetensors": b"and again",
}

PROGRAM = """
import json, resource, sys
from isthmus.checkpoint import hub
from isthmus.cli import hub_model
from isthmus.errors import CannotStart
call, model, max_file_bytes = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(max_file_bytes), int(max_file_bytes)))
name, revision = hub.parse_id(model)
try:
    match call:
        case "fetch": print(hub.fetch(name, revision=revision))
        case "pinned": print(hub_model.pinned(model))
        case "fetch_headers":
            headers = hub_model.fetch_headers(name, revision=revision)
            print(json.dumps({key: [str(e.file), e.dtype, e.shape, e.num_bytes] for key, e in headers.items()}))
except CannotStart as error:
    sys.exit(str(error))
"""


class Machine:
    """One user's cache; each call is a process of its own."""

    def __init__(self, home: Path, endpoint: str):
        self.cache = home / "hub"
        self._environment = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}

    def run(
        self, call: str, model: str, *, max_file_bytes: int = -1, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", PROGRAM, call, model, str(max_file_bytes)],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], **self._environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def fetch(self, model: str = MODEL, **environment: str) -> Path:
        return Path(self.said("fetch", model, **environment))

    def said(self, call: str, model: str = MODEL, **environment: str) -> str:
        done = self.run(call, model, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def refusal(self, model: str = MODEL, *, max_file_bytes: int = -1, **environment: str) -> str:
        done = self.run("fetch", model, max_file_bytes=max_file_bytes, **environment)
        assert done.returncode == 1, done.stdout + done.stderr
        last_line = done.stderr.strip().splitlines()[-1]
        assert last_line.startswith("cannot start: model: ")
        assert "To mend it: " in last_line
        return last_line


@pytest.fixture
def hub() -> Generator[Hub]:
    with serving({MODEL: HubModel.of(OLD, {**NEW, **LEFT_ALONE})}) as hub:
        yield hub


@pytest.fixture
def machine(hub: Hub, tmp_path: Path) -> Machine:
    return Machine(tmp_path, hub.url)


def commits(hub: Hub) -> list[str]:
    return list(hub.models[MODEL].commits)


def content(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_fetches_weights_tokenizer_and_configuration_and_nothing_else(hub: Hub, machine: Machine):
    folder = machine.fetch()
    assert content(folder) == NEW
    assert folder.name == commits(hub)[-1]
    assert not [request for request in hub.requests for name in LEFT_ALONE if request.endswith("/" + name)]


def test_a_revision_is_written_after_the_at(hub: Hub, machine: Machine):
    old, new = commits(hub)
    hub.models[MODEL].refs["release/v1"] = old
    assert content(machine.fetch(f"{MODEL}@release/v1")) == OLD
    assert content(machine.fetch(f"{MODEL}@{old}")) == OLD
    assert machine.fetch(f"{MODEL}@{new}").name == new


def test_a_pinned_model_in_the_cache_is_opened_without_a_request(hub: Hub, machine: Machine):
    """What the processes of one stack rely on: the branch moves on, they stay together."""
    pin = machine.said("pinned")
    assert pin == f"{MODEL}@{commits(hub)[-1]}"
    hub.requests.clear()
    hub.models[MODEL].refs["main"] = commits(hub)[0]
    assert content(machine.fetch(pin)) == NEW
    assert hub.requests == []
    assert content(machine.fetch(MODEL)) == OLD


def test_files_in_the_cache_are_not_sent_again(hub: Hub, machine: Machine):
    machine.fetch()
    hub.requests.clear()
    machine.fetch()
    assert hub.requests == [f"GET /api/models/{MODEL}/revision/main"]


def test_offline_the_cache_is_enough(hub: Hub, machine: Machine):
    folder = machine.fetch()
    hub.requests.clear()
    assert machine.fetch(HF_HUB_OFFLINE="1") == folder
    assert hub.requests == []


def test_a_cache_filled_by_hand_is_used_offline(tmp_path: Path):
    """As after copying it to a machine without a network: snapshots and refs, no listing of the tree."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    stored = tmp_path / "hub" / "models--org--small-model"
    folder = stored / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(NEW["config.json"])
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(commit)
    machine = Machine(tmp_path, "http://127.0.0.1:1")
    assert machine.fetch(HF_HUB_OFFLINE="1") == folder
    assert machine.fetch(f"{MODEL}@{commit}", HF_HUB_OFFLINE="1") == folder


def test_a_hub_that_is_gone_leaves_the_cache(hub: Hub, machine: Machine):
    folder = machine.fetch()
    hub.failing = 503
    assert machine.fetch() == folder
    assert machine.fetch(HF_ENDPOINT="http://127.0.0.1:1") == folder


def test_offline_and_not_cached(hub: Hub, machine: Machine):
    refusal = machine.refusal(HF_HUB_OFFLINE="1")
    assert f"'{MODEL}' is not whole in {machine.cache}, and HF_HUB_OFFLINE forbids" in refusal
    assert f"isthmus model path {MODEL}" in refusal
    assert hub.requests == []


def test_offline_and_half_cached(machine: Machine):
    (machine.fetch() / "model.safetensors").unlink()
    assert "is not whole in" in machine.refusal(HF_HUB_OFFLINE="1")


def test_what_is_half_cached_is_completed(hub: Hub, machine: Machine):
    folder = machine.fetch()
    (folder / "model.safetensors").unlink()
    assert content(machine.fetch(f"{MODEL}@{folder.name}")) == NEW


def test_unreachable_and_not_cached(machine: Machine):
    refusal = machine.refusal(HF_ENDPOINT="http://127.0.0.1:1")
    assert "http://127.0.0.1:1 does not answer (ConnectError)" in refusal


def test_a_hub_that_never_answers(machine: Machine):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = "http://{}:{}".format(*silent.getsockname())
        refusal = machine.refusal(HF_ENDPOINT=endpoint, HF_HUB_ETAG_TIMEOUT="1")
        folder = machine.fetch()
        assert machine.fetch(HF_ENDPOINT=endpoint, HF_HUB_ETAG_TIMEOUT="1") == folder
    assert f"{endpoint} does not answer (ReadTimeout)" in refusal


def test_no_such_model(hub: Hub, machine: Machine):
    refusal = machine.refusal("org/smal-model")
    assert f"'org/smal-model' is neither a directory here nor a model that {hub.url} shows you" in refusal


def test_no_such_revision(machine: Machine):
    refusal = machine.refusal(f"{MODEL}@v9")
    assert f"{MODEL} has no revision 'v9'" in refusal


def test_gated(hub: Hub, machine: Machine):
    hub.models[MODEL].is_gated = True
    refusal = machine.refusal()
    assert "is gated" in refusal
    assert f"accept its terms at {hub.url}/{MODEL}" in refusal


def test_out_of_order(hub: Hub, machine: Machine):
    hub.failing = 500
    assert f"{hub.url} answers 500" in machine.refusal()


def test_no_room(machine: Machine):
    """A limit on the size of files stands for a full disk: both end a write half way."""
    refusal = machine.refusal(max_file_bytes=100_000)
    assert f"could not be stored in {machine.cache}" in refusal
    assert "HF_HOME" in refusal
    assert content(machine.fetch()) == NEW


def test_headers_are_read_without_the_weights(hub: Hub, machine: Machine):
    large = {f"layer_{index}": [100, 1000] for index in range(8)}
    hub.models[MODEL] = HubModel.of({"config.json": b"{}", "model.safetensors": weights(**large)})
    headers = json.loads(machine.said("fetch_headers"))
    assert headers == {name: ["model.safetensors", "F32", shape, 400_000] for name, shape in large.items()}
    assert hub.num_bytes_sent < 200_000 < len(hub.models[MODEL].commits[commits(hub)[0]]["model.safetensors"])


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("deepseek-ai/DeepSeek-V2-Lite", HubId("deepseek-ai/DeepSeek-V2-Lite", None)),
        ("org/name@refs/pr/7", HubId("org/name", "refs/pr/7")),
        ("org/name@v1.0", HubId("org/name", "v1.0")),
        ("bundled", None),
        ("org/name@", None),
        ("org/name@../../secret", None),
        ("org/name@a/../b", None),
        ("org/name@/etc", None),
        ("/org/name", None),
        ("./org/name", None),
        ("../org", None),
        ("a/b/c", None),
        ("org/näme", None),
        ("org/name\n", None),
    ],
)
def test_what_an_id_is(text: str, parsed: HubId | None):
    assert parse_id(text) == parsed


def test_a_directory_wins_over_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert parse_id("org/name") is not None
    (tmp_path / "org/name").mkdir(parents=True)
    assert parse_id("org/name") is None
    assert pinned("org/name") == "org/name"
    assert model_name("org/name") == "name"


def test_clients_name_a_hub_model_by_its_id():
    assert model_name("org/name@0123") == "org/name"
    assert model_name("/models/deepseek") == "deepseek"
    assert model_name("bundled") == "bundled"
