"""One suite over both stores: what Redis with its Lua answers, the in-memory twin answers too."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest
import redis

from isthmus.clock import SystemClock
from isthmus.types import BlockCounts
from kv_transfer.ownership.handoff import HandoffState
from kv_transfer.ownership.memory import MemoryOwnership
from kv_transfer.ownership.records import encode_handoff, encode_worker
from kv_transfer.ownership.redis import RedisOwnership
from kv_transfer.ownership.store import (
    BlockSnapshot,
    HandoffRecord,
    Renewed,
    StoreUnavailable,
    Transition,
    TransitionResult,
    WorkerLoad,
    WorkerRecord,
)
from tests.kv_transfer.conftest import free_port
from tests.kv_transfer.world import LAYOUT

D1, D2, P1 = "d" * 32, "e" * 32, "1" * 32
RESERVED, FILLING, CLAIMED = HandoffState.RESERVED, HandoffState.FILLING, HandoffState.CLAIMED
RELEASED, ABORTED = HandoffState.RELEASED, HandoffState.ABORTED
APPLIED, REFUSED, UNKNOWN = TransitionResult.APPLIED, TransitionResult.REFUSED, TransitionResult.UNKNOWN

WORKER = WorkerRecord(
    incarnation=D1,
    role="decode",
    name="decode-0",
    pid=42,
    grpc_address="127.0.0.1:1",
    zmq_endpoint="tcp://127.0.0.1:2",
    http_address="127.0.0.1:3",
    layout=LAYOUT,
    numerics_digest="abc",
    numerics_ingredients={"torch": "2.13"},
    model_digest="model",
    load=WorkerLoad(BlockCounts(10, 8, 2, 2, 1), 3, 4),
    serving=True,
    state="idle",
    seconds_since_progress=0.25,
)
HANDOFF = HandoffRecord("t" * 32, "request", D1)


@pytest.fixture(params=["redis", "memory"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[RedisOwnership | MemoryOwnership]:
    if request.param == "memory":
        yield MemoryOwnership(SystemClock())
        return
    store = RedisOwnership(request.getfixturevalue("redis_url"))
    yield store
    await store.close()


@pytest.fixture
async def redis_store(redis_url: str) -> AsyncIterator[RedisOwnership]:
    store = RedisOwnership(redis_url, timeout_s=5.0)
    yield store
    await store.close()


@pytest.fixture
def plant(
    store: RedisOwnership | MemoryOwnership, request: pytest.FixtureRequest
) -> Callable[[str, str, bytes | dict[bytes, bytes]], None]:
    """Writes what a hostile or newer writer would."""

    def write(kind: str, name: str, value: bytes | dict[bytes, bytes]) -> None:
        if isinstance(store, MemoryOwnership):
            keys = store.keys
            kinds = {"w": keys.workers, "blocks": keys.blocks, "handoff": keys.handoffs, "stream": keys.streams}
            kinds[kind].put(name, value, 60)
            return
        with redis.Redis.from_url(request.getfixturevalue("redis_url")) as client:
            if isinstance(value, dict):
                client.hset(f"{kind}:{name}", mapping=value)
            else:
                client.set(f"{kind}:{name}", value)

    return write


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 - a key expires in Redis, which tells nobody
            await asyncio.sleep(0.01)


def step(before: HandoffState, after: HandoffState, attempt: int = 1, prefill: str | None = None) -> Transition:
    return Transition(HANDOFF.transfer_id, before, after, attempt, prefill)


async def test_a_worker_is_listed_as_it_registered(store: RedisOwnership | MemoryOwnership) -> None:
    other = replace(WORKER, incarnation=P1, role="prefill", zmq_endpoint=None, serving=False)
    await store.put_worker(WORKER, 60)
    await store.put_worker(other, 60)
    assert sorted(await store.list_workers(), key=lambda w: w.role) == [WORKER, other]
    await store.put_worker(replace(WORKER, state="stepping"), 60)
    await store.drop_worker(P1)
    assert await store.list_workers() == [replace(WORKER, state="stepping")]


async def test_a_lease_ends_with_its_blocks_unless_renewed(store: RedisOwnership | MemoryOwnership) -> None:
    await store.put_worker(WORKER, 0.2)
    await store.blocks.publish(D1, BlockSnapshot(1, (b"h" * 16,)), 0.2)

    async def renewed_then_gone() -> bool:
        return await store.list_workers() == [] and await store.blocks.find(D1) is None

    for _ in range(6):
        await asyncio.sleep(0.05)
        await store.put_worker(WORKER, 0.2)
    assert await store.list_workers() == [WORKER]
    assert await store.blocks.find(D1) is not None
    await until(renewed_then_gone)


async def test_a_block_snapshot_is_what_its_worker_published_last(store: RedisOwnership | MemoryOwnership) -> None:
    hashes = tuple(bytes([number]) * 16 for number in range(200))
    assert await store.blocks.find(D1) is None
    for snapshot in (BlockSnapshot(2**40, hashes), BlockSnapshot(5, hashes[:1]), BlockSnapshot(6, ())):
        await store.blocks.publish(D1, snapshot, 60)
        assert await store.blocks.find(D1) == snapshot
    with pytest.raises(ValueError, match="hashes"):
        await store.blocks.publish(D1, BlockSnapshot(9, (b"short",)), 60)


async def test_a_renewal_tells_what_the_store_held_until_then(
    store: RedisOwnership | MemoryOwnership, plant: Callable[[str, str, bytes], None]
) -> None:
    first, second = replace(WORKER, renewal=1), replace(WORKER, renewal=2, seconds_since_progress=0.1 + 0.2)
    snapshots = [BlockSnapshot(2**40, (b"h" * 16,) * 3), BlockSnapshot(7, ())]
    assert await store.put_worker(first, 60) == Renewed(None, (0, 0))
    await store.blocks.publish(D1, snapshots[0], 60)
    assert await store.put_worker(second, 60) == Renewed(first, snapshots[0].stamp)
    await store.blocks.publish(D1, snapshots[1], 60)
    assert await store.put_worker(first, 60) == Renewed(second, snapshots[1].stamp)
    plant("w", D1, b"{}")
    plant("blocks", D1, b"1234567")
    found = await store.put_worker(second, 60)
    assert found.record is None
    assert found.blocks not in {snapshot.stamp for snapshot in snapshots}
    assert await store.list_workers() == [second]


async def test_a_handoff_runs_its_course_and_leaves_nothing(store: RedisOwnership | MemoryOwnership) -> None:
    assert await store.begin_handoff(HANDOFF, 60) is APPLIED
    assert await store.find_handoff(HANDOFF.transfer_id) == HANDOFF
    assert await store.advance_handoff(step(RESERVED, FILLING, prefill=P1)) is APPLIED
    assert await store.advance_handoff(step(FILLING, CLAIMED)) is APPLIED
    assert await store.find_handoff(HANDOFF.transfer_id) == replace(HANDOFF, prefill=P1, state=CLAIMED)
    assert await store.advance_handoff(step(CLAIMED, RELEASED)) is APPLIED
    assert await store.find_handoff(HANDOFF.transfer_id) is None
    assert await store.advance_handoff(step(CLAIMED, RELEASED)) is UNKNOWN


@pytest.mark.parametrize("before", list(HandoffState))
@pytest.mark.parametrize("after", list(HandoffState))
async def test_every_pair_of_states_obeys_the_table(
    store: RedisOwnership | MemoryOwnership, before: HandoffState, after: HandoffState
) -> None:
    paths = {RESERVED: [], FILLING: [FILLING], CLAIMED: [FILLING, CLAIMED]}
    if before not in paths:
        return  # final states have no record
    await store.begin_handoff(HANDOFF, 60)
    at = RESERVED
    for state in paths[before]:
        assert await store.advance_handoff(step(at, state)) is APPLIED
        at = state
    allowed = {(RESERVED, FILLING), (RESERVED, ABORTED), (FILLING, CLAIMED), (FILLING, ABORTED), (CLAIMED, RELEASED)}
    expected = APPLIED if (before, after) in allowed or before is after else REFUSED
    assert await store.advance_handoff(step(before, after)) is expected


async def test_a_step_from_a_state_the_record_has_left_is_refused(store: RedisOwnership | MemoryOwnership) -> None:
    await store.begin_handoff(HANDOFF, 60)
    await store.advance_handoff(step(RESERVED, FILLING))
    await store.advance_handoff(step(FILLING, CLAIMED))
    assert await store.advance_handoff(step(RESERVED, ABORTED)) is REFUSED
    assert await store.advance_handoff(step(FILLING, ABORTED)) is REFUSED
    assert await store.find_handoff(HANDOFF.transfer_id) == replace(HANDOFF, state=CLAIMED)


async def test_attempts_fence_and_a_rearm_raises_them(store: RedisOwnership | MemoryOwnership) -> None:
    await store.begin_handoff(HANDOFF, 60)
    assert await store.advance_handoff(step(RESERVED, FILLING)) is APPLIED
    assert await store.advance_handoff(step(FILLING, FILLING, attempt=2, prefill=D2)) is APPLIED
    assert await store.advance_handoff(step(FILLING, CLAIMED, attempt=1)) is REFUSED
    assert await store.advance_handoff(step(FILLING, CLAIMED, attempt=2)) is APPLIED
    assert await store.find_handoff(HANDOFF.transfer_id) == replace(HANDOFF, prefill=D2, attempt=2, state=CLAIMED)


async def test_beginning_and_stepping_twice_is_one(store: RedisOwnership | MemoryOwnership) -> None:
    for _ in range(2):
        assert await store.begin_handoff(HANDOFF, 60) is APPLIED
    for _ in range(2):
        assert await store.advance_handoff(step(RESERVED, FILLING)) is APPLIED
    assert await store.begin_handoff(replace(HANDOFF, decode=D2), 60) is REFUSED
    assert await store.find_handoff(HANDOFF.transfer_id) == replace(HANDOFF, state=FILLING)


@pytest.mark.parametrize("known", [None, RESERVED, FILLING, CLAIMED])
@pytest.mark.parametrize("said", [RESERVED, FILLING, CLAIMED])
async def test_an_owner_asserts_its_handoff_again_whatever_the_store_has_made_of_it(
    store: RedisOwnership | MemoryOwnership, known: HandoffState | None, said: HandoffState
) -> None:
    if known is not None:
        await store.begin_handoff(replace(HANDOFF, state=known, prefill=P1), 60)
    record = replace(HANDOFF, state=said, prefill=D2, attempt=2)
    for _ in range(2):
        assert await store.begin_handoff(record, 60) is APPLIED
        assert await store.find_handoff(HANDOFF.transfer_id) == record
    assert await store.begin_handoff(replace(record, attempt=1), 60) is REFUSED
    assert await store.find_handoff(HANDOFF.transfer_id) == record


async def test_a_handoff_ends_with_its_time_and_a_step_renews_it(store: RedisOwnership | MemoryOwnership) -> None:
    await store.begin_handoff(HANDOFF, 0.3)
    await asyncio.sleep(0.2)
    await store.advance_handoff(step(RESERVED, FILLING))
    await asyncio.sleep(0.2)
    assert await store.find_handoff(HANDOFF.transfer_id) is not None

    async def gone() -> bool:
        return await store.find_handoff(HANDOFF.transfer_id) is None

    await until(gone)


async def test_a_stream_hint_belongs_to_its_last_holder(store: RedisOwnership | MemoryOwnership) -> None:
    await store.streams.put("request", D1, 60)
    await store.streams.put("request", D2, 60)
    assert not await store.streams.drop("request", D1)
    assert await store.streams.find("request") == D2
    assert await store.streams.drop("request", D2)
    assert await store.streams.find("request") is None


async def test_values_that_make_no_sense_are_skipped_and_counted(
    store: RedisOwnership | MemoryOwnership, plant: Callable[[str, str, bytes], None]
) -> None:
    good = json.loads(encode_worker(WORKER))
    hostile = [
        b"",
        b"\x80\x04\x95.",
        b"[" * 100_000,
        b"null",
        b"[]",
        json.dumps({}).encode(),
        json.dumps(good | {"pid": "1"}).encode(),
        json.dumps(good | {"pid": -1}).encode(),
        json.dumps(good | {"role": "router"}).encode(),
        json.dumps(good | {"serving": 1}).encode(),
        json.dumps(good | {"layout": {"planes": [1]}}).encode(),
        json.dumps(good | {"layout": good["layout"] | {"planes": [{"kind": "x"}]}}).encode(),
        json.dumps(good | {"seconds_since_progress": 1e400}).encode(),
        json.dumps(good | {"load": []}).encode(),
        encode_worker(WORKER),  # somebody else's lease
        b"x" * 100_000,
    ]
    for number, value in enumerate(hostile):
        plant("w", f"{number:032x}", value)
    plant("blocks", D2, b"1234567")
    await store.put_worker(WORKER, 60)
    assert await store.list_workers() == [WORKER]
    assert await store.blocks.find(D2) is None
    assert store.counters == {"bad_record.worker": len(hostile), "bad_record.blocks": 1}


STORED_HANDOFF = encode_handoff(replace(HANDOFF, prefill=P1, attempt=2, state=FILLING)) | {b"ttl_ms": b"60000"}
# What it holds; what a step of attempt 2 is answered; what its owner is answered that says it again.
HOSTILE_HANDOFFS: dict[str, tuple[dict[bytes, bytes], TransitionResult, TransitionResult]] = {
    "no state": ({name: value for name, value in STORED_HANDOFF.items() if name != b"state"}, UNKNOWN, APPLIED),
    "no attempt": ({name: value for name, value in STORED_HANDOFF.items() if name != b"attempt"}, REFUSED, APPLIED),
    "a state of no version": (STORED_HANDOFF | {b"state": b"LENT"}, REFUSED, APPLIED),
    "an attempt that is no number": (STORED_HANDOFF | {b"attempt": b"many"}, REFUSED, APPLIED),
    "an attempt of other digits": (STORED_HANDOFF | {b"attempt": "２".encode()}, REFUSED, APPLIED),
    "an attempt beyond 32 bits": (STORED_HANDOFF | {b"attempt": b"4294967296"}, REFUSED, REFUSED),
    "an endless attempt": (STORED_HANDOFF | {b"attempt": b"9" * 10_000}, REFUSED, REFUSED),
    "a negative attempt": (STORED_HANDOFF | {b"attempt": b"-1"}, APPLIED, APPLIED),
    "a decode worker that is none": (STORED_HANDOFF | {b"decode": b"decode-0"}, APPLIED, REFUSED),
    "a prefill worker that is none": (STORED_HANDOFF | {b"prefill": b"\x1b[2J"}, APPLIED, APPLIED),
    "no text": (STORED_HANDOFF | {b"request_id": b"\xff\xfe"}, APPLIED, APPLIED),
    "too long": (STORED_HANDOFF | {b"request_id": b"x" * 100_000}, APPLIED, APPLIED),
}


@pytest.mark.parametrize("kind", HOSTILE_HANDOFFS)
async def test_a_handoff_that_makes_no_sense_is_not_found_and_counted(
    store: RedisOwnership | MemoryOwnership,
    plant: Callable[[str, str, bytes | dict[bytes, bytes]], None],
    kind: str,
) -> None:
    held, stepped, said_again = HOSTILE_HANDOFFS[kind]
    plant("handoff", HANDOFF.transfer_id, held)
    assert await store.find_handoff(HANDOFF.transfer_id) is None
    assert store.counters == {"bad_record.handoff": 1}
    assert await store.advance_handoff(step(FILLING, CLAIMED, attempt=2)) is stepped
    said = replace(HANDOFF, attempt=2**32 - 1)
    assert await store.begin_handoff(said, 60) is said_again
    if said_again is APPLIED:
        assert await store.find_handoff(HANDOFF.transfer_id) == said


async def test_a_handoff_is_found_with_fields_that_a_newer_version_adds(
    store: RedisOwnership | MemoryOwnership, plant: Callable[[str, str, bytes | dict[bytes, bytes]], None]
) -> None:
    plant("handoff", HANDOFF.transfer_id, STORED_HANDOFF | {b"colour": b"blue"})
    assert await store.find_handoff(HANDOFF.transfer_id) == replace(HANDOFF, prefill=P1, attempt=2, state=FILLING)
    plant("stream", "request", b"\xff\xfe")
    assert await store.streams.find("request") is None
    assert store.counters == {"bad_record.stream": 1}


async def test_only_the_four_kinds_of_key_exist_and_all_expire(redis_store: RedisOwnership, redis_url: str) -> None:
    store = redis_store
    await store.put_worker(WORKER, 60)
    await store.blocks.publish(D1, BlockSnapshot(1, ()), 60)
    await store.begin_handoff(HANDOFF, 60)
    await store.advance_handoff(step(RESERVED, FILLING))
    await store.streams.put("request", D1, 60)
    with redis.Redis.from_url(redis_url) as client:
        keys = sorted(key.decode() for key in client.scan_iter())
        assert keys == [f"blocks:{D1}", f"handoff:{HANDOFF.transfer_id}", "stream:request", f"w:{D1}"]
        assert all(0 < client.pttl(key) <= 60_000 for key in keys)


async def test_garbage_under_a_handoff_key_is_refused_not_followed(redis_store: RedisOwnership, redis_url: str) -> None:
    store = redis_store
    with redis.Redis.from_url(redis_url) as client:
        client.hset(f"handoff:{HANDOFF.transfer_id}", mapping={"state": "FILLING", "attempt": "many"})
        client.set("handoff:text", "not a hash")
        client.set("stream:request", b"\xff\xfe")
    assert await store.advance_handoff(step(FILLING, CLAIMED)) is REFUSED
    assert await store.find_handoff(HANDOFF.transfer_id) is None
    assert await store.streams.find("request") is None
    assert await store.find_handoff("text") is None
    assert await store.advance_handoff(Transition("text", FILLING, CLAIMED, 1)) is UNKNOWN
    assert (store.counters["bad_record.handoff"], store.counters["bad_record.stream"]) == (2, 1)


async def test_cancelled_callers_never_get_one_another_s_answers(redis_store: RedisOwnership) -> None:
    store = redis_store
    names = [f"{number:032x}" for number in range(40)]
    for name in names:
        await store.streams.put(name, name, 60)
    for turn in range(15):
        tasks = [asyncio.create_task(store.streams.find(name)) for name in names]
        await asyncio.sleep(turn * 0.0002)
        for task in tasks[::2]:
            task.cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        for name, answer in zip(names, answers, strict=True):
            assert answer == name or isinstance(answer, asyncio.CancelledError)


async def test_a_server_that_is_away_or_silent_is_an_error_in_time() -> None:
    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    silent = await asyncio.start_server(swallow, "127.0.0.1", 0)
    ports = [free_port(), silent.sockets[0].getsockname()[1]]
    for port in ports:
        store = RedisOwnership(f"redis://127.0.0.1:{port}", timeout_s=0.2)
        async with asyncio.timeout(2):
            with pytest.raises(StoreUnavailable):
                await store.list_workers()
        await store.close()
    silent.close()
