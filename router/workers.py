"""One worker as the router sees it: its record, how to reach it, and what this router has given it to do."""

import asyncio
from dataclasses import dataclass, field

import grpc.aio

from isthmus.errors import WorkerLost
from isthmus.v1 import prefill_pb2_grpc
from kv_transfer.ownership.store import WorkerRecord
from router.inbox import Failed, Source
from router.policy import LOST_S, NO_NEW_WORK_S, DecodeView, NumericsClass, PrefillView
from router.session import Session

SUSPECT_S = 1.0  # after a failed call
UNLISTED_S = 2.0  # a registry that lost its data hears of every worker again within a heartbeat or two
CHANNEL_CLOSE_S = 0.5


@dataclass(eq=False, slots=True)
class DecodeWorker:
    """Owned by the pool; `reserved_blocks` is changed by placements."""

    record: WorkerRecord
    numerics: NumericsClass  # of the record; the fingerprint in it is a hash, so it is computed once
    session: Session
    channel: grpc.aio.Channel
    task: asyncio.Task[None]
    listed_at: float  # on the router's clock
    has_lease: bool = True
    reserved_blocks: int = 0

    @property
    def takes_work(self) -> bool:
        """Its session is alive and says what the registry says; it neither drains nor hangs.

        Its lease is fresh too; while Redis is away the last view of it counts.
        """
        hello = self.session.hello
        is_away = not self.has_lease or self.session.is_leaving or self.session.is_silent
        if is_away or hello is None or not _is_well(self.record):
            return False
        said = (hello.layout.fingerprint, hello.numerics_digest)
        return said == (self.numerics.layout_fingerprint, self.numerics.numerics_digest)

    def view(self, num_prefix_tokens: int) -> DecodeView:
        blocks = self.record.load.blocks
        return DecodeView(
            incarnation=self.record.incarnation,
            numerics=self.numerics,
            block_size=self.record.layout.block_size,
            total_blocks=blocks.total,
            reported_free_blocks=blocks.free,
            reserved_blocks=self.reserved_blocks,
            num_prefix_tokens=num_prefix_tokens,
        )

    @property
    def is_busy(self) -> bool:
        return self.session.is_alive

    async def close(self) -> None:
        self.task.cancel()
        await self.channel.close(CHANNEL_CLOSE_S)

    def lose(self, why: str) -> None:
        if self.session.num_streams:  # an idle session may stay: it costs nothing and shows when the worker is back
            self.session.abandon(why)


@dataclass(eq=False, slots=True)
class PrefillWorker:
    """Owned by the pool; placements count `num_tokens_ahead` and enter their calls."""

    record: WorkerRecord
    numerics: NumericsClass
    channel: grpc.aio.Channel
    stub: "prefill_pb2_grpc.PrefillServiceAsyncStub"
    listed_at: float
    has_lease: bool = True
    num_tokens_ahead: int = 0  # prompts given to it and not yet computed
    suspect_until: float = 0.0
    calls: set[Source] = field(default_factory=set[Source])

    def takes_work(self, now: float) -> bool:
        return self.has_lease and now >= self.suspect_until and _is_well(self.record)

    def view(self, num_prefix_tokens: int) -> PrefillView:
        return PrefillView(
            incarnation=self.record.incarnation,
            numerics=self.numerics,
            num_tokens_ahead=self.num_tokens_ahead,
            num_queued=self.record.load.num_queued,
            num_prefix_tokens=num_prefix_tokens,
        )

    @property
    def is_busy(self) -> bool:
        return bool(self.calls)

    async def close(self) -> None:
        await self.channel.close(CHANNEL_CLOSE_S)

    def lose(self, why: str) -> None:
        lost = list(self.calls)
        for source in lost:
            source.put(Failed(WorkerLost(why), in_company=len(lost) > 1))


def numerics_class(record: WorkerRecord) -> NumericsClass:
    return NumericsClass(record.model_digest, record.layout.fingerprint, record.numerics_digest)


def is_hung(record: WorkerRecord) -> bool:
    return record.state == "stalled" or record.seconds_since_progress >= LOST_S


def _is_well(record: WorkerRecord) -> bool:
    return record.serving and record.seconds_since_progress < NO_NEW_WORK_S
