"""A core takes messages, the time and ids, and returns messages: nothing in it waits, reads a clock or rolls dice.

Every file of the packages is a core or plain data, unless it stands in DRIVERS: with what it uses of the outside, and
why. A file that uses more fails the test, and so does a permission that nobody needs any more.
"""

import ast
from pathlib import Path

import pytest

from tests.architecture_sources import dotted, name_of, sources, tree

PACKAGES = ("isthmus", "router", "prefill_service", "decode_service", "kv_transfer")
WHOLE_FOLDERS = ("isthmus/cli/", "isthmus/testing/")  # what a person runs, and what tests run

# What makes a file a driver: kind -> modules, and names as they are written.
KINDS: dict[str, set[str]] = {
    "loop": {"asyncio"},
    "thread": {"threading", "queue", "concurrent", "_thread"},
    "process": {"subprocess", "multiprocessing", "signal"},
    "clock": {"time", "datetime", "sched"},
    "chance": {"random", "secrets", "uuid"},
    "socket": {"socket", "select", "selectors", "socketserver", "zmq", "http", "urllib", "httpx", "huggingface_hub"},
    "grpc": {"grpc"},
    "redis": {"redis"},
    "server": {"uvicorn", "starlette"},
}
NAMES: dict[str, str] = {
    "SystemClock": "clock",
    "SystemIds": "chance",
    "os.urandom": "chance",
    "os.getrandom": "chance",
    "os.eventfd": "thread",
    "os.fork": "process",
    "os.kill": "process",
}
KIND_OF_MODULE = {module: kind for kind, modules in KINDS.items() for module in modules}

DRIVERS: dict[str, tuple[str, str]] = {  # file -> (kinds, why)
    # Roots: they make the real clock, ids, threads and servers, and give them to the cores.
    "decode_service/__main__.py": ("clock chance", "root"),
    "decode_service/app.py": ("loop grpc", "root"),
    "prefill_service/__main__.py": ("clock chance", "root"),
    "prefill_service/app.py": ("loop grpc", "root"),
    "router/app.py": ("loop clock chance", "root"),
    "isthmus/worker/app.py": ("loop grpc", "root of both workers"),
    "isthmus/process/serving.py": ("loop process grpc", "a process's start, signals and drain"),
    "isthmus/client/asyncio_client.py": ("loop grpc clock chance", "root of the client in an event loop"),
    "isthmus/client/blocking_client.py": ("thread grpc clock chance", "root of the client that blocks"),
    # What cores are given in place of the world.
    "isthmus/clock.py": ("loop clock", "the real clock"),
    "isthmus/ids.py": ("clock chance", "the real ids; a UUIDv7 holds the time"),
    "isthmus/process/loop_driver.py": ("loop", "drives a core's turns in an event loop"),
    "isthmus/worker/step_thread.py": ("thread", "drives a step loop in a thread of its own"),
    # Drivers of the router.
    "router/client/grpc_caller.py": ("loop grpc", "a caller's gRPC stream"),
    "router/pool/drivers.py": ("loop grpc", "sessions with workers"),
    # Drivers of the workers.
    "decode_service/server.py": ("loop grpc", "gRPC face"),
    "decode_service/event_loop_post.py": ("loop", "from the step thread into the event loop"),
    "prefill_service/server.py": ("loop grpc", "gRPC face"),
    # Drivers of the client.
    "isthmus/client/asyncio_stream.py": ("loop grpc", "calls on channels of grpc.aio"),
    "isthmus/client/blocking_stream.py": ("thread grpc", "calls on channels of grpc"),
    "isthmus/client/rpc_failure.py": ("grpc", "reads what grpc raises"),
    # Drivers of transfer and ownership.
    "kv_transfer/sender.py": ("thread", "a sender's thread"),
    "kv_transfer/receiver.py": ("thread socket", "a receiver's thread"),
    "kv_transfer/dealer_wire.py": ("socket", "a sender's ZeroMQ connections"),
    "kv_transfer/sockets.py": ("socket", "options of every ZeroMQ socket"),
    "kv_transfer/waker.py": ("thread", "wakes a thread that polls sockets"),
    "kv_transfer/selftest.py": ("thread", "a transfer to itself, before a worker serves"),
    "kv_transfer/ownership/redis.py": ("loop redis", "the store in Redis"),
    "kv_transfer/ownership/lease_thread.py": ("loop thread", "heartbeats beside a busy event loop"),
    "kv_transfer/ownership/membership_task.py": ("loop", "drives the joining of a worker"),
    "kv_transfer/ownership/mirror_task.py": ("loop thread", "drives the mirror"),
    # Faces that every process has.
    "isthmus/process/admin.py": ("loop thread grpc", "Admin service; names the threads that run"),
    "isthmus/process/grpc_health.py": ("loop grpc", "the standard health service"),
    "isthmus/process/http.py": ("loop server", "health and metrics over HTTP"),
    "isthmus/process/rpc.py": ("socket grpc", "channels, servers and their addresses"),
    "isthmus/process/rpc_errors.py": ("chance grpc", "errors as gRPC carries them; an id for those unforeseen"),
    # Guards around what several threads read; nothing waits for long.
    "isthmus/kv/block_pool.py": ("thread", "a lock: counts are read by the lease thread"),
    "isthmus/process/health.py": ("thread", "a lock: the step thread reports progress"),
    "kv_transfer/counters.py": ("thread", "a lock: every thread counts"),
    "isthmus/ledger.py": ("thread", "a lock: every thread records"),
    "isthmus/failpoints.py": ("thread process clock", "stops, delays or kills where a test says"),
    # The border with the machine.
    "isthmus/config.py": ("socket", "this machine's name"),
    "isthmus/log.py": ("clock", "a line carries its time"),
    "isthmus/checkpoint/directory.py": ("thread", "files are read side by side"),
    "isthmus/checkpoint/hub.py": ("socket", "downloads of the Hugging Face hub"),
    "isthmus/engine/engine.py": ("thread", "kernels compile side by side"),
    "isthmus/model/load.py": ("thread", "weights load side by side"),
    "isthmus/model/weights.py": ("thread", "a lock around open files"),
    "isthmus/text/text_threads.py": ("loop thread", "texts are encoded beside the event loop"),
    "isthmus/text/tokenizer.py": ("chance", "a nonce that no text can hold"),
    "isthmus/text/chat_template.py": ("clock", "templates of checkpoints ask for the date"),
}


def uses(path: Path) -> dict[str, int]:
    """Kinds of what the file imports or names, each with a line where it does."""
    found: dict[str, int] = {}
    for node in ast.walk(tree(path)):
        named: list[str] = []
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            named = [node.module or "", *(alias.name for alias in node.names if alias.name in NAMES)]
        elif isinstance(node, ast.Attribute):
            named = [dotted(node)] if dotted(node) in NAMES else []
        for name in named:
            kind = NAMES.get(name) or KIND_OF_MODULE.get(name.partition(".")[0])
            if kind is not None:
                found.setdefault(kind, getattr(node, "lineno", 0))
    return found


def test_only_drivers_wait_read_clocks_or_roll_dice() -> None:
    faults: list[str] = []
    for path in sources(*PACKAGES):
        name = name_of(path)
        if not name.startswith(WHOLE_FOLDERS):
            allowed = set(DRIVERS[name][0].split()) if name in DRIVERS else set[str]()
            faults += [f"{name}:{line} uses {kind}" for kind, line in uses(path).items() if kind not in allowed]
    assert faults == []


@pytest.mark.parametrize("name", DRIVERS)
def test_a_driver_needs_what_it_is_allowed(name: str) -> None:
    kinds = set(DRIVERS[name][0].split())
    assert kinds <= KINDS.keys()
    assert kinds == uses(Path(__file__).parent.parent / name).keys()


def test_what_is_forbidden_is_found(tmp_path: Path) -> None:
    source = tmp_path / "core.py"
    source.write_text("import os\nfrom time import monotonic\nimport concurrent.futures\nx = os.urandom(8)\n")
    assert uses(source) == {"clock": 2, "thread": 3, "chance": 4}
