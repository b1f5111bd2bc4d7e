"""Which files of the router one Generate runs through, counted by running it.

    python -m tools.trace_generate

Starts a stack, and a router of its own in this process over the stack's workers. Every Python function that runs in the
event loop's thread between the call and its last message is noted; the registry's view comes at intervals, and is
among them. Prints the files with their lines. Exit status 1 when they are more than MAX_FILES, or one is over
MAX_LINES.
"""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from isthmus.config import RouterConfig, load
from isthmus.process.rpc import channel
from isthmus.testing.stack import StackClient, request, running_stack, status, until
from kv_transfer.ownership.redis import RedisOwnership
from router.app import Router

ROOT = Path(__file__).resolve().parent.parent
MAX_FILES = 12
MAX_LINES = 300


@contextmanager
def noted_files() -> Iterator[set[Path]]:
    """The files of the router whose functions run in this thread meanwhile."""
    files: set[Path] = set()
    folder = str(ROOT / "router")

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            files.add(Path(frame.f_code.co_filename))

    sys.setprofile(note)
    try:
        yield files
    finally:
        sys.setprofile(None)


async def traced(redis_url: str) -> set[Path]:
    config = load(RouterConfig, ["--name", "traced", "--redis-url", redis_url])
    router = Router(config, RedisOwnership)
    running = asyncio.create_task(router.run())
    try:
        address = await _address_of(router, running)
        async with StackClient(address) as client, channel(address):
            await client.generate(request("Once upon a time", max_tokens=4))  # what is made once is made
            with noted_files() as files:
                await client.generate(request("Once upon a time", max_tokens=16))
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return files


async def _address_of(router: Router, running: "asyncio.Task[None]") -> str:
    """Once it has workers of both kinds."""

    async def serves() -> bool:
        if running.done():
            running.result()
        address = router.identity.grpc_address
        if not address:
            return False
        workers = (await status(address)).workers
        return {worker.role for worker in workers if worker.serving} == {"prefill", "decode"}

    await until(serves, 30, "the router has workers")
    return router.identity.grpc_address


def main() -> int:
    with running_stack() as stack:
        files = asyncio.run(traced(stack.redis_url))
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in files}
    for name, count in sorted(lines.items()):
        print(f"{count:5}  {name}")
    print(f"{len(lines)} files; at most {MAX_FILES} of at most {MAX_LINES} lines are wanted")
    return 1 if len(lines) > MAX_FILES or max(lines.values()) > MAX_LINES else 0


if __name__ == "__main__":
    sys.exit(main())
