"""A prefill worker that fails in the middle: what came stays, another brings the rest, the first is fenced."""

from isthmus.types import Request
from isthmus.v1 import decode_pb2
from tests.decode.world import Filling, Router, World, oracle, request, until, world


async def half_filled(here: World, router: Router, asked: Request) -> tuple[decode_pb2.Reserved, Filling]:
    """Rows of two layers have come."""
    reserved = await router.reserve(asked)
    filling = here.prefill.begin(asked, reserved)
    filling.rows([0, 2])
    await until(lambda: here.prefill.num_acked(filling) == 2, "rows of two layers are acknowledged")
    return reserved, filling


def rearm(router: Router, reserved: decode_pb2.Reserved, attempt: int = 2, counter: int = 1) -> decode_pb2.Rearm:
    return decode_pb2.Rearm(
        request_id=reserved.request_id,
        transfer_id=reserved.transfer_id,
        attempt=attempt,
        attach=router.key(counter),
    )


def rearmed_target(reserved: decode_pb2.Reserved, rearmed: decode_pb2.Rearmed) -> decode_pb2.Reserved:
    target = decode_pb2.Reserved()
    target.CopyFrom(reserved)
    target.attempt = rearmed.attempt
    del target.missing[:]
    target.missing.extend(rearmed.missing)
    return target


async def test_another_prefill_worker_brings_only_what_the_first_left() -> None:
    asked = request()
    async with world("d1") as here:
        router = await here.router()
        reserved, filling = await half_filled(here, router, asked)
        filling.transfer.abort("CANCELLED")
        failed = (await router.next("transfer_failed")).transfer_failed
        assert (failed.transfer_id, failed.attempt, failed.reason) == (reserved.transfer_id, 1, "CANCELLED")
        assert sorted(extent.layer for extent in failed.missing) == [1, 3]

        router.say(rearm=rearm(router, reserved))
        rearmed = (await router.next("rearmed")).rearmed
        assert list(rearmed.missing) == list(failed.missing)
        outcome = await here.prefill.fill(asked, rearmed_target(reserved, rearmed))
        assert outcome.acked
        assert outcome.frames == 2
        tokens, _ = await router.rest(asked.request_id, 0)
        assert tokens == oracle(asked)


async def test_a_prefill_worker_that_wakes_after_the_rearm_is_refused() -> None:
    asked = request()
    async with world("d1") as here:
        worker, router = here.workers[0], await here.router()
        reserved, zombie = await half_filled(here, router, asked)
        router.say(rearm=rearm(router, reserved))
        rearmed = (await router.next("rearmed")).rearmed
        zombie.rows([1, 3])
        zombie.transfer.commit(zombie.token)
        assert "old_attempt" in (await zombie.done).failure
        assert worker.receiver.counters["refused.old_attempt"] >= 1
        assert (await here.prefill.fill(asked, rearmed_target(reserved, rearmed))).acked
        tokens, _ = await router.rest(asked.request_id, 0)
        assert tokens == oracle(asked)


async def test_a_reservation_that_nobody_fills_again_ends_at_its_deadline() -> None:
    asked = request()
    async with world("d1") as here:
        worker, router = here.workers[0], await here.router()
        _, filling = await half_filled(here, router, asked)
        filling.transfer.abort("CANCELLED")
        await router.next("transfer_failed")
        assert worker.engine.pool.counts().referenced > 0
        here.clock.advance(10.0)
        failed = (await router.next("transfer_failed")).transfer_failed
        assert failed.reason == "fill_deadline"
        assert len(worker.table) == worker.engine.pool.counts().referenced == 0


async def test_a_rearm_starts_the_fill_time_anew() -> None:
    asked = request()
    async with world("d1") as here:
        router = await here.router()
        reserved, _ = await half_filled(here, router, asked)
        here.clock.advance(9.0)
        router.say(rearm=rearm(router, reserved))
        rearmed = (await router.next("rearmed")).rearmed
        here.clock.advance(9.0)
        assert (await here.prefill.fill(asked, rearmed_target(reserved, rearmed))).acked
        tokens, _ = await router.rest(asked.request_id, 0)
        assert tokens == oracle(asked)


async def test_a_rearm_of_what_is_claimed_or_unknown_is_refused() -> None:
    asked = request()
    async with world("d1") as here:
        worker, router = here.workers[0], await here.router()
        with worker.held():
            reserved = await router.start(here.prefill, asked)
            await router.tokens(asked.request_id, 0, 1)
            router.say(rearm=rearm(router, reserved))
            assert (await router.next("refused")).refused.reason == "STALE_OWNER"
            reserved.request_id = "unknown"
            router.say(rearm=rearm(router, reserved))
            refused = (await router.next("refused")).refused
            assert (refused.request_id, refused.reason) == ("unknown", "STALE_OWNER")


async def test_a_rearm_by_a_router_that_lost_the_stream_is_ignored() -> None:
    asked = request()
    async with world("d1") as here:
        worker, router, other = here.workers[0], await here.router(), await here.router()
        reserved, filling = await half_filled(here, router, asked)
        await other.attach(asked.request_id, 0)
        await router.next("detached")
        router.say(rearm=rearm(router, reserved))
        await until(lambda: "cancel.stale" in worker.events(asked.request_id), "the stale rearm is noted")
        filling.rows([1, 3])
        filling.transfer.commit(filling.token)
        assert (await filling.done).acked
        tokens, _ = await other.rest(asked.request_id, 0)
        assert tokens == oracle(asked)


async def test_a_prefill_worker_takes_over_from_a_decode_worker_that_was_to_bring_the_blocks() -> None:
    asked = request()
    async with world("d1") as here:
        router = await here.router()
        reserved = await router.reserve(asked, moves=True)
        assert {extent.num_tokens for extent in reserved.missing} == {50 + 40 - 1}
        router.say(rearm=rearm(router, reserved))
        rearmed = (await router.next("rearmed")).rearmed
        assert {extent.num_tokens for extent in rearmed.missing} == {50}
        assert (await here.prefill.fill(asked, rearmed_target(reserved, rearmed))).acked
        tokens, _ = await router.rest(asked.request_id, 0)
        assert tokens == oracle(asked)
