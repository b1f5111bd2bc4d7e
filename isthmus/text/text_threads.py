"""Text work off the event loop, in a few threads with a bounded line: a megabyte of prompt takes seconds."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from isthmus.errors import Overloaded
from isthmus.text.tokenizer import Tokenizer
from isthmus.v1 import inference_pb2

NUM_THREADS = 2
MAX_WAITING = 256
ResultT = TypeVar("ResultT")


class TextThreads:
    """Threads for a tokenizer. A context manager: leaving it waits for them. Written by one event loop."""

    def __init__(self, tokenizer: Tokenizer, *, max_prompt_bytes: int, max_tokens: int):
        self.tokenizer = tokenizer
        self._max_prompt_bytes = max_prompt_bytes
        self._max_tokens = max_tokens
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="text")
        self._num_pending = 0  # also what a cancelled call left to its thread

    def __enter__(self) -> "TextThreads":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def encode(self, prompt: str) -> list[int]:
        """As Tokenizer.encode, within the limits given. Raises InvalidRequest, Overloaded."""
        limits = {"max_bytes": self._max_prompt_bytes, "max_tokens": self._max_tokens}
        return await self._run(lambda: self.tokenizer.encode(prompt, **limits))

    async def encode_chat(self, chat: inference_pb2.Chat) -> list[int]:
        """As Tokenizer.encode_chat, within the limits given. Raises InvalidRequest, Overloaded."""
        return await self._run(lambda: self.tokenizer.encode_chat(chat.messages, max_bytes=self._max_prompt_bytes))

    async def decode(self, token_ids: Sequence[int]) -> str:
        """As Tokenizer.decode. Raises InvalidRequest, Overloaded."""
        return await self._run(lambda: self.tokenizer.decode(token_ids))

    async def _run(self, work: Callable[[], ResultT]) -> ResultT:
        """Raises Overloaded at once when too much waits; the call's own deadline bounds the rest."""
        if self._num_pending >= MAX_WAITING:
            raise Overloaded("too many prompts wait to be tokenised", retry_after_s=0.5)
        self._num_pending += 1
        future = self._threads.submit(work)
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._done))
        return await asyncio.wrap_future(future)

    def _done(self) -> None:
        self._num_pending -= 1
