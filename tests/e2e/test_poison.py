"""A request that takes its worker down with it, wherever it is computed: it ends, and the pool is there for others."""

import asyncio

import grpc
import pytest

from isthmus.process.rpc_errors import error_from_rpc
from isthmus.testing.stack import StackClient, request, running_stack


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_request_that_kills_two_workers_ends_and_says_so(role: str) -> None:
    async def check(router: str) -> None:
        async with StackClient(router) as client:
            result = await client.failing(request("Once upon a time", max_tokens=40, ignore_eos=True), 60.0)
        assert result.error is not None
        assert result.error.code() is grpc.StatusCode.INTERNAL
        assert error_from_rpc(result.error).reason == "REQUEST_KILLS_WORKERS"
        assert f"2 {role} workers were lost" in (result.error.details() or "")
        assert len(result.token_ids) == (0 if role == "prefill" else 1)

    with running_stack(f"--{role}", "2", env={"ISTHMUS_FAILPOINTS": f"{role}.step=kill@1"}) as stack:
        asyncio.run(check(stack.router))
