"""A caller that leaves: the request is cancelled where it runs, and its call goes."""

import asyncio
import contextlib
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator

import grpc
import pytest

from isthmus.client import AsyncClient, Client
from isthmus.types import FinishReason
from isthmus.v1 import inference_pb2, types_pb2
from tests.client.routers import Router, Told, accepted, addresses, breaks, chunk, hangs, relayed

SOON_S = 3.0


async def assert_left(router: Router, *, request_id: str = "r-0", call: int = 0) -> None:
    await asyncio.wait_for(router.cancels.wait(), SOON_S)
    await asyncio.wait_for(router.asked[call].ended.wait(), SOON_S)
    assert router.cancelled == [request_id]


async def test_breaking_out_of_the_loop_cancels() -> None:
    router = Router(hangs(after=3))
    async with addresses(router) as routers, AsyncClient(routers) as client:
        stream = client.generate("Once")
        async for _ in stream:
            break
        await assert_left(router)
        assert stream.result.finish_reason is FinishReason.CANCELLED
        assert [piece async for piece in stream] == []


async def test_an_exception_in_the_loop_cancels() -> None:
    router = Router(hangs(after=3))

    async def fails(client: AsyncClient) -> None:
        async for _ in client.generate("Once"):
            raise RuntimeError("the caller's own")

    async with addresses(router) as routers, AsyncClient(routers) as client:
        with pytest.raises(RuntimeError, match="own"):
            await fails(client)
        await assert_left(router)


async def test_the_end_of_a_block_cancels_before_it_is_left() -> None:
    router = Router(hangs(after=3))
    async with addresses(router) as routers, AsyncClient(routers) as client:
        async with client.generate("Once") as stream:
            await anext(aiter(stream))
        assert router.cancelled == ["r-0"]


@pytest.mark.parametrize("after", [0, 3], ids=["waiting", "streaming"])
async def test_a_cancelled_task_cancels_its_request(after: int) -> None:
    router = Router(hangs(after=after))
    async with addresses(router) as routers, AsyncClient(routers) as client:
        task = asyncio.create_task(client.complete("Once"))
        await router.silent.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await assert_left(router)


async def test_a_request_accepted_while_its_caller_leaves_is_cancelled() -> None:
    asked = asyncio.Event()
    left = asyncio.Event()

    async def accepts_late(told: Told) -> AsyncIterator[inference_pb2.GenerateResponse]:
        asked.set()
        await left.wait()
        yield accepted(told.request_id, told.seed)
        await asyncio.Event().wait()

    router = Router(accepts_late)
    async with addresses(router) as routers, AsyncClient(routers) as client:
        task = asyncio.create_task(client.complete("Once"))
        await asked.wait()
        task.cancel()
        asyncio.get_running_loop().call_later(0.03, left.set)
        with pytest.raises(asyncio.CancelledError):
            await task
        await assert_left(router)


async def test_a_request_that_is_never_accepted_is_dropped() -> None:
    asked = asyncio.Event()

    async def never_accepts(told: Told) -> AsyncIterator[inference_pb2.GenerateResponse]:
        asked.set()
        await asyncio.Event().wait()
        yield chunk(0, 0, 0)

    router = Router(never_accepts)
    async with addresses(router) as routers, AsyncClient(routers) as client:
        task = asyncio.create_task(client.complete("Once"))
        await asked.wait()
        began = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert time.monotonic() - began < 0.5, "the caller does not wait for the router"
        await asyncio.wait_for(router.asked[0].ended.wait(), SOON_S)
    assert router.cancelled == []


async def test_leaving_a_broken_stream_asks_the_routers_that_are_left() -> None:
    gone = Router(breaks(grpc.StatusCode.UNAVAILABLE, after=2))
    router = Router(hangs(after=0), name="s")
    async with addresses(gone, router) as routers, AsyncClient(routers) as client:
        task = asyncio.create_task(client.complete("Once"))
        await router.silent.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (router.cancelled, gone.cancelled) == (["r-0"], [])


async def test_leaving_takes_no_longer_than_a_second_when_no_router_answers() -> None:
    router = Router(hangs(after=3))
    async with AsyncClient("127.0.0.1:1") as absent:
        async with relayed(router) as (relay, address), AsyncClient(address) as client:
            task = asyncio.create_task(client.complete("Once"))
            await router.silent.wait()
            relay.freeze()
            looking = asyncio.create_task(absent.complete("Once"))
            began = time.monotonic()
            task.cancel()
            looking.cancel()
            outcomes = await asyncio.gather(task, looking, return_exceptions=True)
            assert time.monotonic() - began < 1.5
        assert [type(outcome) for outcome in outcomes] == [asyncio.CancelledError] * 2


class Obedient(Router):
    """Ends a cancelled stream as a router does."""

    async def until_cancelled(self, told: Told) -> AsyncIterator[inference_pb2.GenerateResponse]:
        yield accepted(told.request_id, told.seed)
        yield chunk(told.seed, 0, 2)
        self.silent.set()
        await self.cancels.wait()
        usage = inference_pb2.Usage(num_generated_tokens=2)
        yield inference_pb2.GenerateResponse(
            finished=inference_pb2.Finished(finish_reason=types_pb2.FINISH_REASON_CANCELLED, usage=usage)
        )


def obedient() -> Obedient:
    router = Obedient()
    router.scripts.append(router.until_cancelled)
    return router


async def test_cancel_ends_the_stream_with_what_was_made() -> None:
    router = obedient()
    async with addresses(router) as routers, AsyncClient(routers) as client:
        stream = client.generate("Once")
        reading = asyncio.create_task(collect(stream))
        await router.silent.wait()
        await stream.cancel()
        assert await reading == "<0><1>"
    assert stream.result.finish_reason is FinishReason.CANCELLED
    assert stream.result.usage.num_generated_tokens == 2


async def collect(stream: AsyncIterator[str]) -> str:
    return "".join([piece async for piece in stream])


async def test_closing_the_client_ends_its_streams() -> None:
    router = Router(hangs(after=2))
    async with addresses(router) as routers:
        client = AsyncClient(routers)
        reading = asyncio.create_task(client.complete("Once"))
        await router.silent.wait()
        await client.close()
        assert (await reading).finish_reason is FinishReason.CANCELLED
        await assert_left(router)


async def test_leaving_the_loop_of_a_blocking_stream_cancels() -> None:
    router = Router(hangs(after=3))

    def leave(routers: list[str]) -> list[str]:
        with Client(routers) as client:
            for _ in client.generate("Once"):
                break
            return list(router.cancelled)  # by the time the next line runs

    async with addresses(router) as routers:
        assert await asyncio.to_thread(leave, routers) == ["r-0"]
        await assert_left(router)


async def test_an_exception_in_the_loop_of_a_blocking_stream_cancels() -> None:
    router = Router(hangs(after=3))

    def fail(routers: list[str]) -> None:
        with Client(routers) as client, contextlib.suppress(RuntimeError):
            for _ in client.generate("Once"):
                raise RuntimeError("the caller's own")

    async with addresses(router) as routers:
        await asyncio.to_thread(fail, routers)
        await assert_left(router)


async def test_another_thread_may_cancel_a_blocking_stream() -> None:
    router = obedient()
    async with addresses(router) as routers:
        with Client(routers) as client:
            stream = client.generate("Once")
            reading = asyncio.create_task(asyncio.to_thread(lambda: "".join(stream)))
            await router.silent.wait()
            await asyncio.to_thread(stream.cancel)
            assert await reading == "<0><1>"
    assert stream.result.usage.num_generated_tokens == 2


async def test_closing_a_blocking_client_ends_the_streams_of_all_threads() -> None:
    first = Router(hangs(after=2))
    second = Router(hangs(after=2), name="s")
    async with addresses(first, second) as routers:
        client = Client(routers)
        reading = [asyncio.create_task(asyncio.to_thread(client.complete, "Once")) for _ in range(2)]
        await asyncio.gather(first.silent.wait(), second.silent.wait())
        await asyncio.to_thread(client.close)
        assert [(await task).finish_reason for task in reading] == [FinishReason.CANCELLED] * 2
    assert (first.cancelled, second.cancelled) == (["r-0"], ["s-0"])


async def test_threads_share_a_blocking_client() -> None:
    router = Router()

    def work(client: Client, texts: list[str]) -> None:
        texts.extend(client.complete("Once").text for _ in range(5))

    async with addresses(router) as routers:
        texts: list[str] = []
        with Client(routers) as client:
            threads = [threading.Thread(target=work, args=(client, texts)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                await asyncio.to_thread(thread.join, 20)
    assert len(texts) == 20
    assert len(set(texts)) == 1


INTERRUPTED = """
import sys
from isthmus.client import Client
with Client(sys.argv[1]) as client:
    for piece in client.generate("Once"):
        print(piece, flush=True)
"""


async def test_an_interrupted_program_cancels_its_request() -> None:
    router = Router(hangs(after=2))
    async with addresses(router) as routers:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            INTERRUPTED,
            routers[0],
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"<0>\n"
        process.send_signal(signal.SIGINT)
        _, errors = await asyncio.wait_for(process.communicate(), 10)
        assert errors.decode().strip().endswith("KeyboardInterrupt")
        await assert_left(router)
