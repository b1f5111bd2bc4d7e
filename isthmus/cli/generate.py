"""`isthmus generate PROMPT`: streams text to standard output, or prints one JSON object."""

import argparse
import contextlib
import json
import sys

from isthmus.cli import arguments
from isthmus.cli.temporary_stack import temporary_stack
from isthmus.client import AsyncClient, AsyncStream


async def run(parsed: argparse.Namespace) -> int:
    async with contextlib.AsyncExitStack() as held:
        routers = parsed.router
        if routers is None:
            stack = await held.enter_async_context(temporary_stack(arguments.stack_flags(parsed)))
            routers = stack["routers"][0]["grpc"]
        client = await held.enter_async_context(AsyncClient(routers))
        await client.connect()
        stream = await held.enter_async_context(_stream(client, parsed))
        async for text in stream:
            if not parsed.json:
                sys.stdout.write(text)
                sys.stdout.flush()
        if parsed.json:
            sys.stdout.write(json.dumps(stream.result.as_dict()) + "\n")
        elif not stream.result.text.endswith("\n"):
            sys.stdout.write("\n")
        sys.stdout.flush()
    return 0


def _stream(client: AsyncClient, parsed: argparse.Namespace) -> AsyncStream:
    prompt = sys.stdin.read() if parsed.prompt == "-" else parsed.prompt
    return client.generate(
        None if parsed.chat else prompt,
        chat=[{"role": "user", "content": prompt}] if parsed.chat else None,
        timeout_s=parsed.timeout,
        max_tokens=parsed.max_tokens,
        temperature=parsed.temperature,
        top_p=parsed.top_p,
        top_k=parsed.top_k,
        seed=parsed.seed,
        logprobs=parsed.logprobs,
        stop=parsed.stop,
    )
