"""Does receiving blocks slow the step loop? p99 of a decode step with the receiver idle and with it busy.

    python -m benchmarks.step_loop [--steps 300] [--rounds 5] [--batch 8]

One process decodes a batch on the bundled checkpoint while a second one keeps four transfers of 1,024 tokens under way
to its receiver, as fast as they are acknowledged. Idle and busy rounds alternate; goal: p99 busy <= 1.3 x p99 idle.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from benchmarks.machine import describe, quantile
from isthmus.checkpoint import Checkpoint, resolve_model
from isthmus.engine.engine import Engine
from isthmus.engine.runner import DecodeRow, PrefillChunk
from isthmus.ids import new_incarnation, new_transfer_id
from isthmus.ledger import Ledger
from isthmus.types import Extent, Token, TransferTarget
from isthmus.worker_engine import transfer_memory
from kv_transfer.events import ClaimedTransfer, FailedTransfer, TransferEvents
from kv_transfer.pool_memory import PoolMemory
from kv_transfer.receiver import Receiver
from kv_transfer.sender import Sender
from kv_transfer.transfers import Reservation

NUM_TOKENS = 1024
NUM_TRANSFERS = 4
CONTEXT = 200


def open_engine() -> Engine:
    checkpoint = Checkpoint.open(resolve_model("bundled"))
    return Engine.open(checkpoint, dtype="fp32", device="cpu", block_size=16, num_blocks=1024)


def extents(engine: Engine) -> tuple[Extent, ...]:
    return tuple(Extent(0, layer, 0, NUM_TOKENS) for layer in range(engine.layout.planes[0].num_layers))


class Feed:
    """Keeps NUM_TRANSFERS reservations open while `busy`, and tells the sending process of each."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._blocks = [engine.pool.allocate(NUM_TOKENS // engine.layout.block_size) for _ in range(NUM_TRANSFERS)]
        self._table_of: dict[str, list[int]] = {}
        self._incarnation = new_incarnation()
        events = TransferEvents(on_ready=self._next, on_failed=self._failed)
        memory = PoolMemory(engine.layout, transfer_memory(engine))
        self.receiver = Receiver(self._incarnation, memory, Ledger(), events)
        self._child = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, "--send"], stdin=subprocess.PIPE, text=True
        )
        self._lock = threading.Lock()
        self.busy = False
        self.num_claimed = 0

    def start(self) -> None:
        self.busy = True
        for table in self._blocks:
            self._reserve(table)

    def stop(self) -> None:
        """Returns when no transfer is open."""
        self.busy = False
        while self._table_of:
            time.sleep(0.01)

    def close(self) -> None:
        self._child.stdin.close()
        self._child.wait(10)
        self.receiver.close()

    def _reserve(self, table: list[int]) -> None:
        transfer_id = new_transfer_id()
        self._table_of[transfer_id] = table
        missing = extents(self._engine)
        deadline = time.monotonic() + 30
        self.receiver.reserve(Reservation(transfer_id, 1, "bench", tuple(table), missing, deadline))
        order = {"transfer_id": transfer_id, "endpoint": self.receiver.endpoint, "incarnation": self._incarnation}
        with self._lock:
            self._child.stdin.write(json.dumps(order) + "\n")
            self._child.stdin.flush()

    def _next(self, claim: ClaimedTransfer) -> None:
        self.receiver.release(claim.transfer_id)
        table = self._table_of.pop(claim.transfer_id)
        self.num_claimed += 1
        if self.busy:
            self._reserve(table)

    def _failed(self, failure: FailedTransfer) -> None:
        self._table_of.pop(failure.transfer_id, None)
        raise SystemExit(f"a transfer failed: {failure.reason}")


def send() -> None:
    """The other process: sends every transfer it is told of, whole."""
    engine = open_engine()
    table = engine.pool.allocate(NUM_TOKENS // engine.layout.block_size)
    with Sender(new_incarnation(), PoolMemory(engine.layout, transfer_memory(engine)), Ledger()) as sender:
        for line in sys.stdin:
            order = json.loads(line)
            target = TransferTarget(
                order["transfer_id"],
                1,
                order["endpoint"],
                order["incarnation"],
                engine.layout.fingerprint,
                extents(engine),
            )
            transfer = sender.open(target, table, lambda outcome: None)
            for extent in extents(engine):
                transfer.rows_ready(extent.plane, extent.layer, extent.first_token, extent.num_tokens)
            transfer.commit(Token(5))


def prepare_batch(engine: Engine, batch: int) -> Callable[[], None]:
    """Streams with CONTEXT tokens each; the returned function runs one step of them."""
    rows = []
    for row in range(batch):
        table = engine.pool.allocate(engine.layout.num_blocks(CONTEXT + 1))
        ids = [10 + (row * 37 + position) % 2000 for position in range(CONTEXT)]
        engine.runner.prefill([PrefillChunk(ids, 0, table, needs_logits=False)])
        rows.append(DecodeRow(5, CONTEXT, table))

    def step() -> None:
        engine.runner.decode(rows)

    return step


def time_steps(step: Callable[[], None], count: int) -> list[float]:
    times = []
    for _ in range(count):
        began = time.perf_counter()
        step()
        times.append((time.perf_counter() - began) * 1e3)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--send", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.setswitchinterval(5e-4)
    if args.send:
        send()
        return
    engine = open_engine()
    step = prepare_batch(engine, args.batch)
    feed = Feed(engine)
    time_steps(step, 50)
    idle, busy = [], []
    for _ in range(args.rounds):
        idle.append(time_steps(step, args.steps))
        feed.start()
        time.sleep(0.3)
        busy.append(time_steps(step, args.steps))
        feed.stop()
    feed.close()
    ratios = [quantile(b, 0.99) / quantile(a, 0.99) for a, b in zip(idle, busy, strict=True)]
    print(f"step loop, batch {args.batch}, context {CONTEXT}, {args.rounds} x {args.steps} steps; {describe()}")
    for name, rounds in (("idle", idle), ("busy", busy)):
        times = [value for values in rounds for value in values]
        print(f"{name}: p50 {quantile(times, 0.5):.2f} ms   p99 {quantile(times, 0.99):.2f} ms")
    print(f"{feed.num_claimed} transfers of {NUM_TOKENS} tokens received meanwhile")
    print(f"p99 busy / p99 idle, median of rounds: {statistics.median(ratios):.2f}   (goal: <= 1.3)")


if __name__ == "__main__":
    main()
