"""The gRPC face of a prefill worker: one server stream per prompt."""

import asyncio
from collections.abc import AsyncIterator

import grpc.aio

from isthmus.clock import Clock
from isthmus.convert import request_from_proto, target_from_proto
from isthmus.errors import Draining, InvalidRequest, IsthmusError, LayoutMismatch, StaleOwner, WorkersUnavailable
from isthmus.process.serving import until_none_left
from isthmus.types import Request, TransferTarget
from isthmus.v1 import prefill_pb2, prefill_pb2_grpc
from isthmus.worker.engine_port import PrefillEngine
from prefill_service.sequence import Event, Sequence
from prefill_service.worker import PrefillLoop

Context = grpc.aio.ServicerContext[prefill_pb2.PrefillRequest, prefill_pb2.PrefillResponse]


class PrefillServer(prefill_pb2_grpc.PrefillServiceServicer):
    """Answers from the first moment; until `open` it refuses prompts."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._prefill_loop: PrefillLoop | None = None
        self._engine: PrefillEngine | None = None
        self.num_calls = 0
        self._is_draining = False

    def open(self, prefill_loop: PrefillLoop, engine: PrefillEngine) -> None:
        self._prefill_loop, self._engine = prefill_loop, engine

    async def Prefill(  # noqa: N802 - the proto's name
        self, request: prefill_pb2.PrefillRequest, context: Context
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        """Queued, Progress, FirstToken, Done(acked). A caller that leaves before Done cancels the work."""
        engine_request = request_from_proto(request.request)
        target = target_from_proto(request.target) if request.HasField("target") else None
        prefill_loop = self._admit(engine_request, target)
        # Bounded by the events of one prompt: one per chunk and four more.
        events: asyncio.Queue[Event] = asyncio.Queue()
        sequence = self._sequence(engine_request, target, events)
        self.num_calls += 1
        try:
            queued = prefill_pb2.Queued(num_ahead=prefill_loop.num_queued)
            yield prefill_pb2.PrefillResponse(queued=queued)  # first: the router knows who had it if this process dies
            prefill_loop.submit(sequence)
            while True:
                event = await events.get()
                if isinstance(event, IsthmusError):
                    raise event
                yield event
                if event.HasField("done"):
                    return
        finally:
            sequence.is_cancelled = True  # read between layers; too late to matter after Done
            self.num_calls -= 1

    async def drain(self, timeout_s: float) -> int:
        """Refuses new prompts; returns what is left when every block is acknowledged or the time is over."""
        self._is_draining = True
        return await until_none_left(self._num_left, timeout_s)

    def _num_left(self) -> int:
        """Calls, and blocks that a send still reads: of prompts whose caller has gone, too."""
        return self.num_calls + (0 if self._engine is None else self._engine.pool.counts().draining)

    def _sequence(self, request: Request, target: TransferTarget | None, events: asyncio.Queue[Event]) -> Sequence:
        loop = asyncio.get_running_loop()
        deadline = None if request.timeout_s is None else self._clock.now() + request.timeout_s

        def emit(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        return Sequence(request=request, target=target, emit=emit, deadline=deadline)

    def _admit(self, request: Request, target: TransferTarget | None) -> PrefillLoop:
        engine = self._engine
        if engine is None or self._prefill_loop is None:
            raise WorkersUnavailable("this prefill worker is starting", retry_after_s=0.2)
        if self._is_draining:
            raise Draining("this prefill worker is draining", retry_after_s=0.1)
        num_prompt_tokens = len(request.prompt_token_ids)
        if not 1 <= num_prompt_tokens < engine.context_length:
            raise InvalidRequest.of(
                "prompt_token_ids", f"{num_prompt_tokens} tokens", f"1 to {engine.context_length - 1}"
            )
        if request.numerics_digest and request.numerics_digest != engine.numerics_digest:
            raise StaleOwner("the request belongs to another numerics class")
        if target is not None and target.layout_fingerprint != engine.layout.fingerprint:
            raise LayoutMismatch("the decode worker's cache layout differs from this worker's")
        return self._prefill_loop
