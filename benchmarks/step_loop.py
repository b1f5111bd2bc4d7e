"""Does receiving blocks slow the step loop? p99 of a decode step with the receiver idle and with it busy.

    python -m benchmarks.step_loop [--steps 200] [--rounds 5] [--batch 8] [--mib-per-s 16 64 0]

One process decodes a batch on the bundled checkpoint while a second one sends its receiver transfers of 1,024 tokens,
at stated rates (0: as fast as they are acknowledged, which takes every core there is). Idle and busy rounds alternate.
Goal: p99 busy <= 1.3 x p99 idle. A prefill worker of this checkpoint makes about 6 MiB/s on one core.
"""

import argparse
import contextlib
import json
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

from benchmarks.machine import describe, quantile
from isthmus.checkpoint.directory import Checkpoint, resolve_model
from isthmus.clock import SystemClock
from isthmus.engine.engine import Engine
from isthmus.ids import SystemIds
from isthmus.ledger import Ledger
from isthmus.steps import DecodeRow, PrefillChunk
from isthmus.types import Extent, Token, TransferTarget
from isthmus.worker.engine_start import transfer_memory
from kv_transfer.pool_memory import PoolMemory
from kv_transfer.receiver import Receiver
from kv_transfer.receiver_events import ClaimedTransfer, FailedTransfer, TransferEvents
from kv_transfer.sender import Sender
from kv_transfer.transfers import Reservation

NUM_TOKENS = 1024
NUM_TRANSFERS = 4
CONTEXT = 200


def open_engine() -> Engine:
    checkpoint = Checkpoint.open(resolve_model("bundled"))
    return Engine.open(checkpoint, dtype="fp32", device="cpu", block_size=16, num_blocks=1024)


def extents(engine: Engine) -> tuple[Extent, ...]:
    return tuple(Extent("latent", layer, 0, NUM_TOKENS) for layer in range(engine.layout.planes[0].num_layers))


class Feed:
    """Sends this process transfers at a rate while `running`; at most NUM_TRANSFERS are under way."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._free: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        for _ in range(NUM_TRANSFERS):
            self._free.put(engine.pool.allocate(NUM_TOKENS // engine.layout.block_size))
        self._table_of: dict[str, list[int]] = {}
        self._incarnation = SystemIds().incarnation()
        events = TransferEvents(on_ready=self._claimed, on_failed=self._failed)
        memory = PoolMemory(engine.layout, transfer_memory(engine))
        self.receiver = Receiver(self._incarnation, memory, Ledger(SystemClock()), events, SystemClock()).start()
        self._child = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, "--send"], stdin=subprocess.PIPE, text=True
        )
        self._stopping = threading.Event()
        self.num_claimed = 0

    @contextlib.contextmanager
    def running(self, mib_per_s: float) -> Iterator[None]:
        transfer_mib = NUM_TOKENS * self._engine.layout.bytes_per_token / 2**20
        interval_s = transfer_mib / mib_per_s if mib_per_s else 0.0
        self._stopping.clear()
        thread = threading.Thread(target=self._feed, args=(interval_s,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            thread.join()

    def close(self) -> None:
        self._child.stdin.close()
        self._child.wait(10)
        self.receiver.close()

    def _feed(self, interval_s: float) -> None:
        while not self._stopping.wait(interval_s):
            self._reserve(self._free.get())
        while self._table_of:
            time.sleep(0.01)

    def _reserve(self, table: list[int]) -> None:
        transfer_id = SystemIds().transfer_id()
        self._table_of[transfer_id] = table
        reservation = Reservation(transfer_id, 1, "bench", tuple(table), extents(self._engine), time.monotonic() + 30)
        self.receiver.reserve(reservation)
        order = {"transfer_id": transfer_id, "endpoint": self.receiver.endpoint, "incarnation": self._incarnation}
        self._child.stdin.write(json.dumps(order) + "\n")
        self._child.stdin.flush()

    def _claimed(self, claim: ClaimedTransfer) -> None:
        self.receiver.release(claim.transfer_id)
        self.num_claimed += 1
        self._free.put(self._table_of.pop(claim.transfer_id))

    def _failed(self, failure: FailedTransfer) -> None:
        self._table_of.pop(failure.transfer_id, None)
        raise SystemExit(f"a transfer failed: {failure.reason}")


def send() -> None:
    """The other process: sends every transfer it is told of, whole."""
    engine = open_engine()
    table = engine.pool.allocate(NUM_TOKENS // engine.layout.block_size)
    with contextlib.closing(
        Sender(
            SystemIds().incarnation(),
            PoolMemory(engine.layout, transfer_memory(engine)),
            Ledger(SystemClock()),
            SystemClock(),
        ).start()
    ) as sender:
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


def compare(step: Callable[[], None], feed: Feed, mib_per_s: float, *, steps: int, rounds: int) -> str:
    """One row: p50 and p99 idle and busy, and the median ratio of the rounds' p99."""
    idle = []
    busy = []
    claimed = feed.num_claimed
    began = time.monotonic()
    for _ in range(rounds):
        idle.append(time_steps(step, steps))
        with feed.running(mib_per_s):
            time.sleep(0.2)
            busy.append(time_steps(step, steps))
    ratio = statistics.median(quantile(b, 0.99) / quantile(a, 0.99) for a, b in zip(idle, busy, strict=True))
    times = [[value for values in rounds_ms for value in values] for rounds_ms in (idle, busy)]
    shown = "".join(f"{quantile(values, q):9.2f}" for values in times for q in (0.5, 0.99))
    rate = f"{mib_per_s:g} MiB/s" if mib_per_s else "flat out"
    return f"{rate:>10}{shown}{ratio:9.2f}   {feed.num_claimed - claimed} transfers in {time.monotonic() - began:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--mib-per-s", type=float, nargs="+", default=[16.0, 64.0, 0.0])
    parser.add_argument("--send", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.setswitchinterval(5e-4)  # as the services do
    if args.send:
        send()
        return
    engine = open_engine()
    step = prepare_batch(engine, args.batch)
    feed = Feed(engine)
    time_steps(step, 50)
    print(f"step loop, batch {args.batch}, context {CONTEXT}, {args.rounds} x {args.steps} steps; {describe()}")
    print(f"{'receiving':>10}{'idle p50':>9}{'p99 ms':>9}{'busy p50':>9}{'p99 ms':>9}{'p99 ratio':>10}")
    for mib_per_s in args.mib_per_s:
        print(compare(step, feed, mib_per_s, steps=args.steps, rounds=args.rounds))
    feed.close()


if __name__ == "__main__":
    main()
