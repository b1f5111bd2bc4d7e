"""Garbage on a decode worker's ZeroMQ port: refused, counted, and nobody notices."""

import asyncio
import os
import random
import socket
import struct
import urllib.request

import zmq
import zmq.asyncio

from isthmus.testing.stack import Stack, StackClient, request, status

HEADER_GUESSES = [b"", b"\x00", b"ISTH", b"\x80\x04\x95" + os.urandom(20), os.urandom(200), b"A" * 5000]


async def refused(stack: Stack) -> int:
    seen = await status(stack.services("decode")[0]["grpc"])
    return sum(count for name, count in seen.counters.items() if "refused" in name)


async def send_garbage(endpoint: str, rng: random.Random) -> None:
    context = zmq.asyncio.Context()
    try:
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.LINGER, 500)
        dealer.connect(endpoint)
        for _ in range(300):
            parts = [rng.choice(HEADER_GUESSES) for _ in range(rng.randint(1, 4))]
            await dealer.send_multipart(parts)
        await dealer.send_multipart([struct.pack("<4sHHQQ", b"ISTH", 1, 1, 2**63, 2**63) + os.urandom(160), b"x"])
        dealer.close()
    finally:
        context.term()


def send_raw_bytes(endpoint: str) -> None:
    """Not even ZeroMQ: a half-open hand-shake, then noise."""
    host, port = endpoint.removeprefix("tcp://").rsplit(":", 1)
    for noise in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096)):
        with socket.create_connection((host, int(port)), timeout=2) as raw:
            raw.sendall(noise)


def scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as page:
        return page.read().decode()


async def test_garbage_is_refused_and_counted_and_streams_go_on(stack: Stack, client: StackClient) -> None:
    endpoint = stack.services("decode")[0]["zmq"]
    message = request("And it came to pass", max_tokens=200, temperature=0.9, seed=3, ignore_eos=True, logprobs=1)
    alone = await client.generate(message)
    before = await refused(stack)
    running = [asyncio.create_task(client.generate(message)) for _ in range(3)]
    await send_garbage(endpoint, random.Random(5))
    await asyncio.to_thread(send_raw_bytes, endpoint)
    for task in running:
        disturbed = await task
        assert (disturbed.token_ids, disturbed.logprobs) == (alone.token_ids, alone.logprobs)
    assert await refused(stack) >= before + 250
    shown = await asyncio.to_thread(scrape, stack.services("decode")[0]["http"])
    assert 'isthmus_events_total{event="refused.' in shown
    again = await client.generate(request("Hello", max_tokens=5, ignore_eos=True))
    assert len(again.token_ids) == 5
