"""Throughput of kv_transfer against raw pyzmq with the same frames: `python -m benchmarks.transfer`.

Sender and receiver are separate processes on loopback TCP. The raw baseline sends the same [header, body] messages with
copy=False from preallocated memory; its receiver copies every body into a preallocated pool and acknowledges the last.
It checks nothing. Ours takes rows from blocks, seals, verifies (xxh3-128) before it writes, scatters into shuffled
blocks, acknowledges each frame and keeps within credit. Pairs alternate which goes first. The sender's blocks are
neighbours, as in a pool that is not fragmented (sent where they lie), or shuffled (gathered into staging first).
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import zmq

from benchmarks.machine import describe
from isthmus.clock import SystemClock
from isthmus.ids import SystemIds
from isthmus.kv.layout import KvLayout, Plane, PlaneKind
from isthmus.ledger import Ledger
from isthmus.types import Extent, Token, TransferTarget
from kv_transfer.frames import HEADER_BYTES
from kv_transfer.outgoing import TransferOutcome
from kv_transfer.pool_memory import PoolMemory
from kv_transfer.receiver import Receiver
from kv_transfer.receiver_events import ClaimedTransfer, TransferEvents
from kv_transfer.sender import Sender
from kv_transfer.transfers import Reservation

ROW_ELEMENTS = 576  # DeepSeek-V3: kv_lora_rank 512 + qk_rope_head_dim 64, bf16
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Load:
    """One transfer: `num_layers` frames of `num_tokens` rows each."""

    num_layers: int
    num_tokens: int
    is_shuffled: bool  # the sender's blocks; the receiver's always are

    @property
    def layout(self) -> KvLayout:
        plane = Plane("latent", PlaneKind.APPEND_ONLY, self.num_layers, ROW_ELEMENTS, "bf16")
        return KvLayout("benchmark", (plane,), BLOCK_SIZE)

    @property
    def frame_bytes(self) -> int:
        return self.num_tokens * self.layout.planes[0].row_bytes

    @property
    def blocks(self) -> str:
        return "shuffled" if self.is_shuffled else "neighbours"

    @property
    def num_bytes(self) -> int:
        return self.frame_bytes * self.num_layers

    @property
    def sender_table(self) -> list[int]:
        return self.receiver_table if self.is_shuffled else list(range(self.num_tokens // BLOCK_SIZE))

    @property
    def receiver_table(self) -> list[int]:
        return np.random.default_rng(0).permutation(self.num_tokens // BLOCK_SIZE).tolist()

    @property
    def extents(self) -> tuple[Extent, ...]:
        return tuple(Extent("latent", layer, 0, self.num_tokens) for layer in range(self.num_layers))

    def pool(self, fill: int) -> list[Any]:
        return [np.full(self.frame_bytes, fill, dtype=np.uint8) for _ in range(self.num_layers)]


def memory_of(load: Load, pool: list[Any]) -> PoolMemory:
    return PoolMemory(load.layout, {("latent", layer): memoryview(rows) for layer, rows in enumerate(pool)})


def tell(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def receive(load: Load) -> None:
    """The receiving process: obeys one JSON line per round on stdin."""
    pool = load.pool(0xAB)
    claimed: list[ClaimedTransfer] = []
    events = TransferEvents(on_ready=claimed.append, on_failed=lambda failed: tell(failed=failed.reason))
    incarnation = SystemIds().incarnation()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    raw = context.socket(zmq.ROUTER)
    raw.bind("tcp://127.0.0.1:*")
    threading.Thread(target=receive_raw, args=(raw, load, load.pool(0)), daemon=True).start()
    with closing(
        Receiver(incarnation, memory_of(load, pool), Ledger(SystemClock()), events, SystemClock()).start()
    ) as receiver:
        tell(endpoint=receiver.endpoint, incarnation=incarnation, raw=raw.getsockopt_string(zmq.LAST_ENDPOINT))
        for line in sys.stdin:
            transfer_id = json.loads(line)["transfer_id"]
            table = tuple(load.receiver_table)
            reservation = Reservation(transfer_id, 1, "", table, load.extents, time.monotonic() + 60)
            if claimed:
                receiver.release(claimed.pop().transfer_id)
            receiver.reserve(reservation)
            tell(reserved=transfer_id)


def receive_raw(socket: "zmq.Socket[bytes]", load: Load, pool: list[Any]) -> None:
    while True:
        for layer in range(load.num_layers):
            link, _, body = socket.recv_multipart(copy=False)
            np.copyto(pool[layer], np.frombuffer(body.buffer, dtype=np.uint8))
        socket.send_multipart([link.bytes, b"done"])


def send(load: Load, places: dict[str, str]) -> None:
    """The sending process: one JSON line on stdin starts a round, one on stdout ends it."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    raw = context.socket(zmq.DEALER)
    raw.connect(places["raw"])
    source = [np.random.default_rng(layer).bytes(load.frame_bytes) for layer in range(load.num_layers)]
    pool = [np.frombuffer(rows, dtype=np.uint8) for rows in source]
    with closing(
        Sender(SystemIds().incarnation(), memory_of(load, pool), Ledger(SystemClock()), SystemClock()).start()
    ) as sender:
        for line in sys.stdin:
            command = json.loads(line)
            begin = time.perf_counter()
            if command["kind"] == "raw":
                send_raw(raw, pool)
            else:
                send_ours(sender, load, command["transfer_id"], places)
            tell(seconds=time.perf_counter() - begin)


def send_raw(socket: "zmq.Socket[bytes]", pool: list[Any]) -> None:
    header = bytes(HEADER_BYTES)
    for rows in pool:
        socket.send(header, zmq.SNDMORE)
        socket.send(rows, copy=False)
    socket.recv()


def send_ours(sender: Sender, load: Load, transfer_id: str, places: dict[str, str]) -> None:
    outcomes: list[TransferOutcome] = []
    done = threading.Event()
    target = TransferTarget(
        transfer_id, 1, places["endpoint"], places["incarnation"], load.layout.fingerprint, load.extents
    )
    transfer = sender.open(target, load.sender_table, lambda outcome: (outcomes.append(outcome), done.set()))
    for layer in range(load.num_layers):
        transfer.rows_ready("latent", layer, 0, load.num_tokens)
    transfer.commit(Token(0))
    if not done.wait(60) or not outcomes[0].acked:
        raise SystemExit(f"transfer failed: {outcomes}")


class Child:
    """A role of this benchmark in a process of its own, spoken to in JSON lines."""

    def __init__(self, *arguments: str):
        command = [sys.executable, "-m", "benchmarks.transfer", *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **message: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        return self.hear()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)


def measure(load: Load, num_pairs: int) -> list[tuple[float, float]]:
    """GB/s of (ours, raw) per pair, after one warm-up of each."""
    shape = ["--layers", str(load.num_layers), "--tokens", str(load.num_tokens), "--blocks", load.blocks]
    receiver = Child("--role", "receive", *shape)
    places = receiver.hear()
    sender = Child("--role", "send", "--places", json.dumps(places), *shape)

    def run(kind: str) -> float:
        transfer_id = SystemIds().transfer_id()
        if kind == "ours":
            receiver.ask(transfer_id=transfer_id)
        return load.num_bytes / sender.ask(kind=kind, transfer_id=transfer_id)["seconds"] / 1e9

    pairs: list[tuple[float, float]] = []
    for number in range(num_pairs + 1):
        order = ("ours", "raw") if number % 2 else ("raw", "ours")
        rates = {kind: run(kind) for kind in order}
        pairs.append((rates["ours"], rates["raw"]))
    sender.stop()
    receiver.stop()
    return pairs[1:]


def report(load: Load, pairs: list[tuple[float, float]]) -> None:
    frame_mib = load.frame_bytes / 2**20
    transfer_mb = load.num_bytes / 1e6
    print(f"\nframes of {frame_mib:.2f} MiB, {transfer_mb:.0f} MB a transfer, sender's blocks {load.blocks}")
    print("  ours GB/s  raw GB/s  ratio")
    for ours, raw in pairs:
        print(f"  {ours:9.2f}  {raw:8.2f}  {ours / raw:5.2f}")
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    ratio = statistics.median(ours / raw for ours, raw in pairs)
    print(f"  {medians[0]:9.2f}  {medians[1]:8.2f}  {ratio:5.2f}  median")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--role", choices=("receive", "send"), help=argparse.SUPPRESS)
    parser.add_argument("--places", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--tokens", type=int, nargs="+", default=[912, 1808, 3632], help="rows of a frame")
    parser.add_argument("--blocks", nargs="+", choices=("neighbours", "shuffled"), default=["neighbours", "shuffled"])
    parser.add_argument("--pairs", type=int, default=10)
    options = parser.parse_args()
    kinds = [blocks == "shuffled" for blocks in options.blocks]
    loads = [Load(options.layers, tokens, kind) for kind in kinds for tokens in options.tokens]
    if options.role:
        sys.setswitchinterval(5e-4)  # as the services do
        receive(loads[0]) if options.role == "receive" else send(loads[0], options.places)
        return
    print(describe())
    for load in loads:
        report(load, measure(load, options.pairs))


if __name__ == "__main__":
    main()
