"""The hand-off goes through real Redis and real ZeroMQ, layer by layer. A twin in the place of either fails here."""

import asyncio
import json
import random
from typing import Any

import psutil
import pytest
import redis.asyncio

from isthmus.cli import main
from isthmus.kv.prefix import prefix_hashes, prefix_scope
from isthmus.testing.stack import Result, Stack, StackClient, ledger, request, status, until
from kv_transfer.ownership.redis import RedisOwnership


async def watch_states(url: str, seen: dict[str, set[bytes]], stop: asyncio.Event) -> None:
    """Reads every handoff: and stream: key there is, as fast as it can."""
    async with redis.asyncio.from_url(url) as client:
        while not stop.is_set():
            async for key in client.scan_iter(match="*", count=1000):
                if key.startswith(b"handoff:"):
                    state = await client.hget(key, "state")
                    seen.setdefault("handoff", set()).add(state or b"")
                elif key.startswith(b"stream:"):
                    seen.setdefault("stream", set()).add(key)
                else:
                    seen.setdefault(key.split(b":")[0].decode(), set()).add(key)
            await asyncio.sleep(0)


async def test_the_handoff_is_seen_in_redis_while_it_runs(stack: Stack) -> None:
    seen: dict[str, set[bytes]] = {}
    stop = asyncio.Event()
    watcher = asyncio.create_task(watch_states(stack.redis_url, seen, stop))
    async with StackClient(stack.router) as client:
        results = await asyncio.gather(
            *(client.generate(request("And God said " * 60, max_tokens=120, ignore_eos=True, seed=i)) for i in range(6))
        )
    stop.set()
    await watcher
    assert b"CLAIMED" in {state.upper() for state in seen["handoff"]}
    assert {f"stream:{result.accepted.request_id}".encode() for result in results} & seen["stream"]
    assert len(seen["w"]) == 2, "one lease per worker"
    assert set(seen) <= {"handoff", "stream", "w", "blocks"}, "no other keys"


async def explained(stack: Stack, request_id: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """What `isthmus explain` says that Redis holds of the request's transfers."""
    capsys.readouterr()
    assert await asyncio.to_thread(main, ["explain", request_id, "--router", stack.router, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["summary"]["stored"]


async def test_explain_shows_the_record_that_redis_holds_while_the_stream_runs_and_none_after_it(
    stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    (prefill,), (decode,) = stack.services("prefill"), stack.services("decode")
    result = Result()
    async with StackClient(stack.router) as client:
        stream = client.stream(request("And God said ", max_tokens=1500, ignore_eos=True, seed=1))
        while not result.token_ids:
            result.take(await anext(stream))
        assert result.accepted is not None
        request_id = result.accepted.request_id

        async def is_claimed() -> bool:
            found = await explained(stack, request_id, capsys)
            if not found or found[0]["cause"]:
                return False  # the store follows the worker a moment later; on a busy machine a look takes too long
            (stored,) = found
            assert (stored["asked"], stored["attempt"]) == (decode["name"], 1)
            assert (stored["decode"], stored["prefill"]) in {
                (decode["name"], "-"),
                (decode["name"], prefill["name"]),
            }
            return (stored["state"], stored["prefill"]) == ("CLAIMED", prefill["name"])

        await until(is_claimed, 10, "the handoff is seen as claimed")
        await stream.aclose()

    async def is_gone() -> bool:
        return [stored["cause"] for stored in await explained(stack, request_id, capsys)] == ["NOT_STORED"]

    await until(is_gone, 10, "the record went with the stream")


async def test_redis_lists_the_prompt_blocks_each_worker_holds(stack: Stack) -> None:
    new_to_every_cache = [random.randrange(8, 2048) for _ in range(100)]
    async with StackClient(stack.router) as client:
        await client.generate(request(new_to_every_cache, max_tokens=2, ignore_eos=True))
    workers = [*stack.services("prefill"), *stack.services("decode")]
    incarnations = [(await status(worker["grpc"])).incarnation for worker in workers]
    scope = prefix_scope((await status(workers[0]["grpc"])).layout.fingerprint)
    hashes = prefix_hashes(new_to_every_cache, 16, scope)
    store = RedisOwnership(stack.redis_url)

    async def all_listed() -> bool:
        held = [await store.blocks.find(incarnation) for incarnation in incarnations]
        return all(snapshot is not None and set(hashes) <= set(snapshot.hashes) for snapshot in held)

    await until(all_listed, 5, "the prompt's six full blocks are listed for both workers")
    await store.close()


async def test_blocks_cross_a_zeromq_connection(stack: Stack) -> None:
    (prefill,), (decode,) = stack.services("prefill"), stack.services("decode")
    layout = (await status(decode["grpc"])).layout
    bytes_per_token = sum(plane.num_layers * plane.row_elements * 4 for plane in layout.planes)
    new_to_every_cache = [random.randrange(8, 2048) for _ in range(203)]
    async with StackClient(stack.router) as client:
        result = await client.generate(request(new_to_every_cache, max_tokens=4, temperature=0.0, ignore_eos=True))
        timings = result.finished.timings
        assert timings.transfer_bytes == 203 * bytes_per_token
        assert timings.transfer_blocks == 13
        assert timings.transfer_frames >= layout.planes[0].num_layers
        port = int(decode["zmq"].rsplit(":", 1)[1])
        peers = [c for c in psutil.Process(prefill["pid"]).net_connections("tcp") if c.raddr and c.raddr.port == port]
    assert peers, "the prefill worker holds a connection to the decode worker's ZeroMQ port"


async def test_the_first_frame_arrives_before_the_last_layer_of_the_first_tile_ends(stack: Stack) -> None:
    """Layer-wise publishing, from recorded times; both processes read the same machine's monotonic clock."""
    (prefill,), (decode,) = stack.services("prefill"), stack.services("decode")
    early = 0
    async with StackClient(stack.router) as client:
        for number in range(5):
            prompt = f"{number} " + "Fellow citizens of the Senate and House of Representatives, " * 20
            result = await client.generate(request(prompt, max_tokens=3, ignore_eos=True))
            request_id = result.accepted.request_id
            at_prefill = {event.event: event.monotonic_ns for event in await ledger(prefill["grpc"], request_id)}
            at_decode = {event.event: event.monotonic_ns for event in await ledger(decode["grpc"], request_id)}
            early += at_decode["transfer.first_frame_received"] < at_prefill["prefill.first_chunk_stored"]
    assert early >= 4, "a busy machine may hold up one"
