"""`isthmus generate PROMPT`: streams text to standard output, or prints one JSON object."""

import argparse
import contextlib
import json
import sys

from isthmus.cli import arguments
from isthmus.cli.temporary import temporary_stack
from isthmus.client import Client, Generation
from isthmus.errors import InvalidRequest
from isthmus.v1 import inference_pb2, types_pb2


async def run(parsed: argparse.Namespace) -> int:
    request = _request(parsed)
    generation = Generation()
    async with contextlib.AsyncExitStack() as held:
        address = parsed.router
        if address is None:
            stack = await held.enter_async_context(temporary_stack(arguments.stack_flags(parsed)))
            address = stack["routers"][0]["grpc"]
        client = await held.enter_async_context(Client(address))
        await client.connect()
        async with contextlib.aclosing(client.generate(request, generation, timeout_s=parsed.timeout)) as texts:
            async for text in texts:
                if not parsed.json:
                    sys.stdout.write(text)
                    sys.stdout.flush()
        if parsed.json:
            sys.stdout.write(json.dumps(generation.as_dict()) + "\n")
        elif not generation.text.endswith("\n"):
            sys.stdout.write("\n")
        sys.stdout.flush()
    return 0


def _request(parsed: argparse.Namespace) -> inference_pb2.GenerateRequest:
    """What is allowed is the router's to say; here only what the message cannot hold is refused."""
    prompt = sys.stdin.read() if parsed.prompt == "-" else parsed.prompt
    try:
        sampling = types_pb2.SamplingParams(
            max_tokens=parsed.max_tokens,
            temperature=parsed.temperature,
            top_p=parsed.top_p,
            top_k=parsed.top_k,
            seed=parsed.seed,
            logprobs=parsed.logprobs,
            stop=parsed.stop,
        )
        if parsed.chat:
            chat = inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content=prompt)])
            return inference_pb2.GenerateRequest(chat=chat, sampling=sampling)
        return inference_pb2.GenerateRequest(prompt=prompt, sampling=sampling)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
