"""Waiting for a place: who waits for one role's room never holds up what would free the other's. In virtual time."""

from collections.abc import Iterator

import pytest

from isthmus.errors import IsthmusError, NoFreeBlocks
from isthmus.v1 import decode_pb2
from router.pool.policy import MAX_TOKENS_AHEAD
from tests.router.fakes import Cluster, RouterUnderTest, ask


@pytest.fixture
def router() -> Iterator[RouterUnderTest]:
    cluster = Cluster()
    cluster.add_decode()
    cluster.add_prefill()
    router = RouterUnderTest(cluster, queue_timeout_s=3.0).meet_workers()
    yield router
    router.is_quiet()


def test_requests_short_of_both_kinds_of_room_pass_one_by_one(router: RouterUnderTest) -> None:
    """The one that waits for blocks holds the whole prefill queue, which the one behind it waits for."""
    decode = router.cluster.decode[0]
    decode.refuse = lambda reserve: NoFreeBlocks("full") if decode.streams else None
    decode.token_interval_s = 0.005

    calls = [router.call(ask(str(i) * MAX_TOKENS_AHEAD, max_tokens=20)) for i in range(6)]

    assert {len(call.to_the_end().token_ids) for call in calls} == {20}


def test_small_requests_do_not_starve_a_large_one(router: RouterUnderTest) -> None:
    """Blocks for a small one are free all the time; for the large one only once the small ones let it pass."""
    decode = router.cluster.decode[0]
    decode.token_interval_s = 0.005

    def refuse(reserve: decode_pb2.Reserve) -> IsthmusError | None:
        is_large = len(reserve.request.prompt_token_ids) > 100
        return NoFreeBlocks("full") if len(decode.streams) >= (1 if is_large else 3) else None

    decode.refuse = refuse
    calls = {f"before {i}": router.call(ask(f"small {i}", max_tokens=20)) for i in range(2)}
    router.time.run_until(lambda: len(decode.streams) == 2, "the first small ones run")
    calls["large"] = router.call(ask("L" * 200, max_tokens=20))
    router.time.run_until(lambda: not router.admission.reserving.num_free, "the large one has asked, and waits")
    for i in range(12):
        calls[f"behind {i}"] = router.call(ask(f"small, later {i}", max_tokens=20))

    for call in calls.values():
        call.to_the_end()
    order = sorted(calls, key=lambda name: calls[name].told_at[-1])
    assert set(order[:2]) == {"before 0", "before 1"}
    assert order[2] == "large"
