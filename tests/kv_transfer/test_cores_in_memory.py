"""Both cores joined by wires in memory: one seed decides delays, losses, copies, order and who gives up when."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from isthmus.clock import SystemClock
from isthmus.ledger import Ledger
from isthmus.testing.memory_wire import Body, MemoryNetwork
from isthmus.types import Extent, Token, TransferTarget
from kv_transfer.frames import FrameHeader, FrameKind
from kv_transfer.outgoing import TransferOutcome
from kv_transfer.receiver_events import ClaimedTransfer, FailedTransfer, ReceiverOptions, TransferEvents
from kv_transfer.sender_options import SenderOptions
from kv_transfer.transfers import Reservation
from tests.kv_transfer.test_planes import DRAFTING
from tests.kv_transfer.timed_transfers import PlainTimer, TimedReceiver, TimedSender
from tests.kv_transfer.world import POISON, Pool

NUM_BLOCKS = 12
TOKENS = (Token(7, -0.5),)


class Network:
    """Fates by a seed: a share is lost, a share is doubled; in order as TCP keeps it, or in any order."""

    def __init__(self, rng: random.Random, loss: float, doubles: float, in_order: bool):
        self._rng = rng
        self._loss = loss
        self._doubles = doubles
        self._in_order = in_order
        self._last: dict[tuple[bytes, bool], float] = {}
        self.timer = PlainTimer()
        self.wires = MemoryNetwork(self.timer, self.fate)

    def fate(self, link: bytes, message: Sequence[Body]) -> Sequence[float]:
        if self._rng.random() < self._loss:
            return []
        delays = [self._rng.expovariate(1000) for _ in range(2 if self._rng.random() < self._doubles else 1)]
        if not self._in_order:
            return delays
        is_answer = FrameHeader.decode(message[0]).kind in (FrameKind.ACK, FrameKind.CREDIT) or len(message) == 0
        now, way = self.timer.time(), (link, is_answer)
        first = max(now + delays[0], self._last.get(way, 0.0))
        self._last[way] = first
        return [first - now] * len(delays)


@dataclass
class Prompt:
    """One transfer: where it lies on both sides, and what became of it."""

    transfer_id: str
    ours: list[int]
    theirs: list[int]
    missing: tuple[Extent, ...]
    fate: str
    outcomes: list[TransferOutcome]
    attempt: int = 1


class World:
    """A receiver, the sender and another one for second attempts; each prompt has blocks of its own."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        rng = self.rng
        harm = rng.choice([0.0, 0.02, 0.1])
        network = Network(rng, rng.choice([0.0, harm]), rng.choice([0.0, 0.1]), in_order=rng.random() < 0.5)
        self.network = network
        self.timer = network.timer
        self.landing = Pool(POISON, layout=DRAFTING, num_blocks=NUM_BLOCKS)
        self.news: list[ClaimedTransfer | FailedTransfer] = []
        self.states: list[str] = []
        options = ReceiverOptions(credit_bytes=rng.choice([200, 2000, 2**20]))
        events = TransferEvents(self._claimed, self._failed, lambda change: self.states.append(change.cause))
        self.ids = (f"{rng.getrandbits(128):032x}" for _ in range(100))
        self.incarnation = next(self.ids)
        self.receiver = TimedReceiver(
            self.incarnation, self.landing.memory, Ledger(SystemClock()), events, network.wires, options
        )
        self.pools = [Pool(seed=seed + number, layout=DRAFTING, num_blocks=NUM_BLOCKS) for number in (1, 1)]
        self.source = {place: rows.copy() for place, rows in self.pools[0].rows.items()}
        self.senders = [self._sender(pool) for pool in self.pools]
        self.prompts: dict[str, Prompt] = {}
        self.frozen: dict[str, dict] = {}  # rows of cancelled transfers, which nothing may change any more

    def _sender(self, pool: Pool) -> TimedSender:
        options = SenderOptions(staging_bytes=8192, max_frame_bytes=self.rng.choice([100, 500]), ack_timeout_s=0.5)
        return TimedSender(next(self.ids), pool.memory, Ledger(SystemClock()), self.network.wires, options)

    def begin(self, number: int) -> None:
        rng = self.rng
        theirs = [number * 4 + block for block in rng.sample(range(4), 3)]
        ours = [number * 4 + block for block in rng.sample(range(4), 3)]
        first, end = sorted(rng.sample(range(49), 2))
        missing = tuple(Extent(*place, first, end - first) for place in DRAFTING.places)
        fate = rng.choice(["sent", "sent", "sent", "aborted", "cancelled", "finished", "abandoned", "cut"])
        prompt = Prompt(next(self.ids), ours, theirs, missing, fate, [])
        self.prompts[prompt.transfer_id] = prompt
        self.receiver.reserve(
            Reservation(prompt.transfer_id, 1, "request", tuple(theirs), missing, self.timer.time() + 3)
        )
        self.send(prompt, missing, 0)

    def send(self, prompt: Prompt, missing: tuple[Extent, ...], sender: int) -> None:
        """Layer after layer, advisory ones with the others; whoever sends last may be late or leave them out."""
        rng, later = self.rng, self.timer.call_later
        target = TransferTarget(
            prompt.transfer_id,
            prompt.attempt,
            self.receiver.endpoint,
            self.incarnation,
            DRAFTING.fingerprint,
            missing,
        )
        transfer = self.senders[sender].open(target, prompt.ours, partial(self._done, prompt, sender))
        when = 0.0
        offered = [(place, start) for start in range(0, 48, 16) for place in DRAFTING.places]
        late = [(place, start) for place, start in offered if place[0] == "draft" and rng.random() < 0.3]
        for place, start in [*[offer for offer in offered if offer not in late], "commit", *late]:  # type: ignore[misc]
            when += rng.expovariate(2000)
            if place == "commit":
                later(when, lambda: self._commit(prompt, transfer))
            else:
                later(when, lambda place=place, start=start: transfer.rows_ready(*place, start, 16))

    def run(self) -> None:
        for number in range(3):
            self.timer.call_later(self.rng.random() * 0.01, partial(self.begin, number))
        self.timer.run()
        for sender in self.senders:
            sender.close()


"""A placeholder that is replaced below."""
