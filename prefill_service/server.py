"""The gRPC face of a prefill worker: one server stream per prompt."""

import asyncio
from collections.abc import AsyncIterator

import grpc.aio

from isthmus.clock import Clock
from isthmus.convert import request_from_proto, target_from_proto
from isthmus.errors import Draining, IsthmusError, WorkersUnavailable
from isthmus.process.serving import until_none_left
from isthmus.types import Request, TransferTarget
from isthmus.v1 import prefill_pb2, prefill_pb2_grpc
from prefill_service.prompt import Event, Prompt
from prefill_service.submissions import Submissions

Context = grpc.aio.ServicerContext[prefill_pb2.PrefillRequest, prefill_pb2.PrefillResponse]


class PrefillServer(prefill_pb2_grpc.PrefillServiceServicer):
    """Answers from the first moment; until `open` it refuses prompts. Owned by the event loop."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._submissions: Submissions | None = None
        self.num_calls = 0
        self._is_draining = False

    def open(self, submissions: Submissions) -> None:
        self._submissions = submissions

    async def Prefill(  # noqa: N802 - the proto's name
        self, request: prefill_pb2.PrefillRequest, context: Context
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        """Queued, Progress, FirstToken, Done(acked). A caller that leaves before Done cancels the work."""
        engine_request = request_from_proto(request.request)
        submissions = self._opened()
        target = target_from_proto(request.target, submissions.layout) if request.HasField("target") else None
        submissions.check(engine_request, target)
        # Bounded by the events of one prompt: one per chunk and four more.
        events: asyncio.Queue[Event] = asyncio.Queue()
        prompt = self._prompt(engine_request, target, events)
        self.num_calls += 1
        try:
            queued = prefill_pb2.Queued(num_ahead=submissions.num_queued)
            yield prefill_pb2.PrefillResponse(queued=queued)  # first: the router knows who had it if this process dies
            submissions.submit(prompt)
            while True:
                event = await events.get()
                if isinstance(event, IsthmusError):
                    raise event
                yield event
                if event.HasField("done"):
                    return
        finally:
            prompt.cancel()  # too late to matter after Done
            self.num_calls -= 1

    async def drain(self, timeout_s: float) -> int:
        """Refuses new prompts; returns what is left when every block is acknowledged or the time is over."""
        self._is_draining = True
        return await until_none_left(self._num_left, timeout_s)

    def _num_left(self) -> int:
        """Calls, and blocks that are not acknowledged."""
        return self.num_calls + (0 if self._submissions is None else self._submissions.num_draining_blocks)

    def _opened(self) -> Submissions:
        """Raises WorkersUnavailable or Draining."""
        if self._submissions is None:
            raise WorkersUnavailable("this prefill worker is starting", retry_after_s=0.2)
        if self._is_draining:
            raise Draining("this prefill worker is draining", retry_after_s=0.1)
        return self._submissions

    def _prompt(self, request: Request, target: TransferTarget | None, events: asyncio.Queue[Event]) -> Prompt:
        loop = asyncio.get_running_loop()
        deadline = None if request.timeout_s is None else self._clock.now() + request.timeout_s

        def emit(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        return Prompt(request=request, target=target, emit=emit, deadline=deadline)
