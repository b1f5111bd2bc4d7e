"""Both cores joined by wires in memory: one seed decides delays, losses, copies, order and who gives up when."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from isthmus.errors import StaleOwner
from isthmus.ledger import Ledger
from isthmus.testing.manual_clock import ManualClock
from isthmus.testing.memory_wire import Body, MemoryNetwork
from isthmus.types import Extent, Place, Token, TransferTarget
from kv_transfer.outgoing import OutgoingTransfer, TransferOutcome
from kv_transfer.receiver_events import ClaimedTransfer, FailedTransfer, ReceiverOptions, TransferEvents
from kv_transfer.sender_options import SenderOptions
from kv_transfer.transfers import Reservation
from tests.kv_transfer.test_planes import DRAFTING
from tests.kv_transfer.timed_transfers import PlainTimer, TimedReceiver, TimedSender
from tests.kv_transfer.world import POISON, Pool

NUM_PROMPTS = 3
BLOCKS_EACH = 4
TOKENS = (Token(7, -0.5),)
TAKEN = 0xEE  # what a block holds whose request goes on, or that has another owner
STAGING_BYTES = 8192


class SeededNetwork:
    """A share of the messages is lost, a share comes twice; in order, as TCP keeps it, or in any order."""

    def __init__(self, rng: random.Random):
        self._rng = rng
        self._loss = rng.choice([0.0, 0.0, 0.02, 0.1])
        self._doubles = rng.choice([0.0, 0.0, 0.1])
        self._keeps_order = rng.random() < 0.5
        self._last: dict[bytes, float] = {}
        self.timer = PlainTimer()
        self.wires = MemoryNetwork(self.timer, self.fate)

    @property
    def is_faithful(self) -> bool:
        return self._keeps_order and not self._loss and not self._doubles

    def fate(self, link: bytes, message: Sequence[Body]) -> Sequence[float]:
        if self._rng.random() < self._loss:
            return []
        delays = [self._rng.expovariate(1000) for _ in range(2 if self._rng.random() < self._doubles else 1)]
        if self._keeps_order:
            now = self.timer.time()
            arrival = max(now + delays[0], self._last.get(link, 0.0))
            self._last[link] = arrival
            delays = [arrival - now] * len(delays)
        return delays


@dataclass(eq=False)
class Prompt:
    """One transfer: where it lies on both sides, what befalls it, and what became of it."""

    transfer_id: str
    ours: list[int]
    theirs: list[int]
    missing: tuple[Extent, ...]
    trouble: str
    num_opened: int = 0
    is_cancelled: bool = False
    outcomes: list[TransferOutcome] = field(default_factory=list)
    claims: list[ClaimedTransfer] = field(default_factory=list)
    failures: list[FailedTransfer] = field(default_factory=list)


class World:
    """A receiver, a sender, and another one for second attempts. Each prompt has blocks of its own everywhere."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.network = SeededNetwork(self.rng)
        self.timer = self.network.timer
        self._ids = (f"{self.rng.getrandbits(128):032x}" for _ in range(100))
        num_blocks = NUM_PROMPTS * BLOCKS_EACH
        self.landing = Pool(POISON, layout=DRAFTING, num_blocks=num_blocks)
        self.source = Pool(seed=seed, layout=DRAFTING, num_blocks=num_blocks)
        self.pools = [Pool(seed=seed, layout=DRAFTING, num_blocks=num_blocks) for _ in range(2)]
        self.ledger = Ledger(ManualClock())
        self.incarnation = next(self._ids)
        self.receiver = TimedReceiver(
            self.incarnation,
            self.landing.memory,
            self.ledger,
            TransferEvents(self._claimed, self._failed),
            self.network.wires,
            ReceiverOptions(credit_bytes=self.rng.choice([200, 2000, 2**20])),
        )
        self.senders = [self._sender(pool) for pool in self.pools]
        self.prompts: dict[str, Prompt] = {}

    def _sender(self, pool: Pool) -> TimedSender:
        frame_bytes = self.rng.choice([100, 500])
        options = SenderOptions(staging_bytes=STAGING_BYTES, max_frame_bytes=frame_bytes, ack_timeout_s=0.5)
        return TimedSender(next(self._ids), pool.memory, self.ledger, self.network.wires, options)

    def run(self) -> None:
        for number in range(NUM_PROMPTS):
            self.timer.call_later(self.rng.random() * 0.01, lambda number=number: self.begin(number))
        self.timer.run()

    def begin(self, number: int) -> None:
        rng = self.rng
        blocks = range(number * BLOCKS_EACH, (number + 1) * BLOCKS_EACH)
        first, end = sorted(rng.sample(range(BLOCKS_EACH * 16 + 1), 2))
        missing = tuple(Extent(*place, first, end - first) for place in DRAFTING.places)
        trouble = rng.choice(["", "", "", "abort", "finished", "cancel", "rearm", "cut"])
        ours, theirs = rng.sample(blocks, BLOCKS_EACH), rng.sample(blocks, BLOCKS_EACH)
        prompt = Prompt(next(self._ids), ours, theirs, missing, trouble)
        self.prompts[prompt.transfer_id] = prompt
        deadline = self.timer.time() + 3
        self.receiver.reserve(Reservation(prompt.transfer_id, 1, "request", tuple(theirs), missing, deadline))
        transfer = self.send(prompt, missing)
        self.timer.call_later(rng.expovariate(200), lambda: self.befall(prompt, transfer))

    def send(self, prompt: Prompt, missing: tuple[Extent, ...]) -> OutgoingTransfer:
        """Rows as a pass makes them; some of the drafting plane are late, and some never come."""
        rng, number = self.rng, prompt.num_opened
        prompt.num_opened += 1
        ends = (self.receiver.endpoint, self.incarnation, DRAFTING.fingerprint)
        target = TransferTarget(prompt.transfer_id, prompt.num_opened, *ends, missing)
        sender = self.senders[number]
        transfer = sender.open(target, prompt.ours, lambda outcome: self.done(prompt, number, outcome))
        rows = [(place, start) for start in range(0, BLOCKS_EACH * 16, 16) for place in DRAFTING.places]
        late = [(place, start) for place, start in rows if place[0] == "draft" and rng.random() < 0.3]
        when = 0.0
        for place, start in [row for row in rows if row not in late]:
            when += rng.expovariate(2000)
            self.timer.call_later(when, lambda place=place, start=start: transfer.rows_ready(*place, start, 16))
        self.timer.call_later(when, lambda: transfer.commit(*TOKENS))
        for place, start in late:
            when += rng.expovariate(2000)
            self.timer.call_later(when, lambda place=place, start=start: transfer.rows_ready(*place, start, 16))
        return transfer

    def befall(self, prompt: Prompt, transfer: OutgoingTransfer) -> None:
        match prompt.trouble:
            case "abort":
                transfer.abort("gave up")
            case "finished":
                transfer.abort("stop", finished=True)
            case "cancel":
                if self.receiver.cancel(prompt.transfer_id, "client left"):
                    prompt.is_cancelled = True
                    if not prompt.claims:
                        self.take_over(prompt)
            case "rearm":  # the first sender is thought dead and is not
                self.send_again(prompt)
            case "cut":
                self.network.wires.cut_all()

    def send_again(self, prompt: Prompt) -> None:
        """By the other sender, what is missing."""
        if prompt.num_opened == 1:
            try:
                missing = self.receiver.rearm(prompt.transfer_id, 2, self.timer.time() + 3)
            except StaleOwner:
                return  # claimed or ended
            self.send(prompt, missing)

    def done(self, prompt: Prompt, number: int, outcome: TransferOutcome) -> None:
        """The sender's blocks are free, and used for something else at once."""
        prompt.outcomes.append(outcome)
        for place in DRAFTING.places:
            self.pools[number].rows[place][self.slots(prompt.ours)] = TAKEN
        if not outcome.acked and not prompt.failures:
            self.timer.call_later(self.rng.expovariate(100), lambda: self.send_again(prompt))

    def _claimed(self, claim: ClaimedTransfer) -> None:
        """The rows are those of the source now, and the request goes on to write its own."""
        prompt = self.prompts[claim.transfer_id]
        prompt.claims.append(claim)
        assert not prompt.is_cancelled
        for extent in DRAFTING.required(prompt.missing):
            self.check_rows(prompt, extent.place, extent)
        self.take_over(prompt)

    def _failed(self, failure: FailedTransfer) -> None:
        prompt = self.prompts[failure.transfer_id]
        if failure.is_ended:
            prompt.failures.append(failure)
            self.take_over(prompt)
        else:
            self.timer.call_later(self.rng.expovariate(100), lambda: self.send_again(prompt))

    def take_over(self, prompt: Prompt) -> None:
        """The blocks are somebody else's; what was written until now is as the source has it, or not at all."""
        for place in DRAFTING.places:
            for extent in prompt.missing:
                if extent.place == place:
                    self.check_rows(prompt, place, extent, may_lack=True)
            outside = [position for position in range(BLOCKS_EACH * 16) if not self.is_missing(prompt, position)]
            rows = self.landing.rows[place]
            assert (rows[self.slots(prompt.theirs, outside)] == POISON).all(), "written outside the reservation"
            rows[self.slots(prompt.theirs)] = TAKEN

    def check_rows(self, prompt: Prompt, place: Place, extent: Extent, *, may_lack: bool = False) -> None:
        positions = list(range(extent.first_token, extent.end))
        came = self.landing.rows[place][self.slots(prompt.theirs, positions)]
        right = (came == self.source.rows[place][self.slots(prompt.ours, positions)]).all(axis=1)
        if may_lack:
            right |= (came == POISON).all(axis=1)
        assert right.all(), f"wrong rows in {place}"

    def is_missing(self, prompt: Prompt, position: int) -> bool:
        return prompt.missing[0].first_token <= position < prompt.missing[0].end

    def slots(self, table: list[int], positions: Sequence[int] = range(BLOCKS_EACH * 16)) -> list[int]:
        return [table[position // 16] * 16 + position % 16 for position in positions]


@pytest.mark.parametrize("batch", range(10))
def test_memory_ends_right_whatever_the_network_does(batch: int) -> None:
    for seed in range(batch * 30, batch * 30 + 30):
        world = World(seed)
        try:
            world.run()
            check(world)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error


def check(world: World) -> None:
    """At rest, when every deadline has passed."""
    for prompt in world.prompts.values():
        assert len(prompt.outcomes) == prompt.num_opened, "on_done comes exactly once"
        assert len(prompt.claims) <= 1
        assert all(claim.tokens == TOKENS for claim in prompt.claims)
        assert len(prompt.claims) >= sum(outcome.acked for outcome in prompt.outcomes), "acknowledged, and not claimed"
        assert (len(prompt.claims) == 1) + (len(prompt.failures) == 1) + prompt.is_cancelled in (1, 2)
        assert len(prompt.claims) + len(prompt.failures) <= 1
        if prompt.claims and not prompt.is_cancelled:
            assert world.receiver.release(prompt.transfer_id)
    for rows in world.landing.rows.values():
        assert (rows == TAKEN).all(), "written after the claim, the cancel or the end"
    counters = {**world.receiver.counters, **world.senders[0].counters, **world.senders[1].counters}
    for never in ("refused.bad_checksum", "refused.internal", "refused.malformed", "refused.bad_body"):
        assert never not in counters, counters
    if world.network.is_faithful:
        check_faithful(world)
    assert not [event for event in world.ledger.read() if event.event == "transfer.error"]
    for sender in world.senders:
        assert sender.core._bodies._staging.acquire(STAGING_BYTES) is not None, "staging was not given back"
        assert not sender.core._links
        assert not sender.core._transfers
    assert not len(world.receiver.core._transfers)


def check_faithful(world: World) -> None:
    """Messages came once and in order: nothing was refused but what senders said that were given up."""
    troubles = {prompt.trouble for prompt in world.prompts.values()}
    expected = {"refused.late", "refused.old_attempt"}
    if "cut" in troubles:  # the receiver forgets a link whose connection is gone, and hears what was under way on it
        expected.add("refused.no_credit")
    refused = {name for name in world.receiver.counters if name.startswith("refused")}
    assert refused <= expected, refused
    for prompt in world.prompts.values():
        failures = {outcome.failure for outcome in prompt.outcomes}
        assert not failures & {"no answer", "the commit was not acknowledged"}, failures
        if not prompt.trouble and "cut" not in troubles:
            assert [outcome.acked for outcome in prompt.outcomes] == [True], prompt.outcomes
