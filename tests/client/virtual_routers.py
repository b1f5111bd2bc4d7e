"""Routers that play what a test says to a client's core, in virtual time: no ports, no threads, no waiting."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
import grpc.aio

from isthmus.client import Chunk, Generation
from isthmus.client.cancellation import Cancellation
from isthmus.client.client_core import ClientCore
from isthmus.client.failure import CallFailure
from isthmus.client.generation_life import DropCall, GenerationLife, Pause, ReadResponse
from isthmus.client.router_call import RouterCall
from isthmus.client.rpc_failure import failure_of
from isthmus.errors import IsthmusError
from isthmus.process.rpc_errors import status_of
from isthmus.testing.virtual_time import SeededIds, VirtualTime
from isthmus.v1 import inference_pb2
from tests.client.routers import LENGTH, accepted, chunk, finished

SEED = 2**63 + 11


@dataclass(frozen=True)
class Silence:
    """Nothing comes for so long."""

    seconds: float


@dataclass
class Told:
    """What a script may use: the call, its seed, and how many tokens the client has."""

    call: RouterCall
    seed: int
    position: int
    request_id: str

    @property
    def is_resume(self) -> bool:
        return self.call.method == "Resume"


Event: TypeAlias = inference_pb2.GenerateResponse | CallFailure | Silence
Script: TypeAlias = Callable[[Told], Iterator[Event]]


def rpc_error(code: grpc.StatusCode, error: IsthmusError | None = None) -> grpc.aio.AioRpcError:
    """What gRPC raises: with details when a router told `error`, without when the C core made the status up."""
    details = () if error is None else (("grpc-status-details-bin", status_of(error).SerializeToString()),)
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*details), "made up")


def lost(code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> CallFailure:
    return failure_of(rpc_error(code))


def told(error: IsthmusError) -> CallFailure:
    return failure_of(rpc_error(grpc.StatusCode[error.grpc_status], error))


def to_the_end(told: Told) -> Iterator[Event]:
    yield accepted(told.request_id, told.seed)
    for index in range(told.position, LENGTH):
        yield chunk(told.seed, index, index + 1)
    yield finished()


def breaks(failure: CallFailure | None = None, *, after: int) -> Script:
    """The call fails after `accepted` and so many tokens; a lost connection unless it is said how."""

    def script(told: Told) -> Iterator[Event]:
        yield accepted(told.request_id, told.seed)
        if after:
            yield chunk(told.seed, told.position, told.position + after)
        yield failure or lost()

    return script


def refuses(error: IsthmusError, *, after: int | None = None) -> Script:
    """A typed error at once, or after `accepted` and so many tokens."""
    return breaks(told(error), after=after) if after is not None else lambda _: iter([told(error)])


def unanswered(_: Told) -> Iterator[Event]:
    """The connection is lost before a word came."""
    yield lost()


def hangs(*, after: int) -> Script:
    """Says nothing more after so many tokens."""

    def script(told: Told) -> Iterator[Event]:
        yield accepted(told.request_id, told.seed)
        for index in range(told.position, told.position + after):
            yield chunk(told.seed, index, index + 1)
        yield Silence(1e9)

    return script


class VirtualRouter:
    """Each call plays the next script; when none is left, the generation to its end."""

    def __init__(self, *scripts: Script, name: str = "r"):
        self.scripts = deque(scripts)
        self.name = name
        self.seed = SEED
        self.calls: list[RouterCall] = []
        self.called_at: list[float] = []
        self.cancelled: list[str] = []

    @property
    def kinds(self) -> str:
        return "".join(call.method[0] for call in self.calls)

    @property
    def requests(self) -> list[Any]:
        return [call.message for call in self.calls]

    def called(self, call: RouterCall, now: float) -> Iterator[Event]:
        request_id = f"{self.name}-{len(self.calls)}"
        position = 0
        if call.method == "Resume":
            request_id = call.message.request_id
            position = call.message.next_index
        else:
            self.seed = call.message.sampling.seed
            position = len(call.message.emitted_token_ids)
        self.calls.append(call)
        self.called_at.append(now)
        script = self.scripts.popleft() if self.scripts else to_the_end
        return script(Told(call, self.seed, position, request_id))


class VirtualClient:
    """Drives the lives of one client against virtual routers, whose addresses are their names."""

    def __init__(self, *routers: VirtualRouter, router_timeout_s: float = 10.0, chance: int = 0):
        self.time = VirtualTime(chance)
        self.routers = {router.name: router for router in routers}
        self.core = ClientCore(list(self.routers), SeededIds(self.time), router_timeout_s=router_timeout_s)
        self.num_dropped = 0

    def generate(self, **options: Any) -> GenerationLife:
        return self.core.generation("Once", {"seed": SEED, "timeout_s": 20, **options}, self.time.now())

    def complete(self, **options: Any) -> Generation:
        """Reads one generation to its end; as a stream it is cancelled when that raises."""
        life = self.generate(**options)
        try:
            self.read(life)
        finally:
            self.cancel(life)
        return life.generation

    def read(self, life: GenerationLife, until: Callable[[Generation], bool] = lambda _: False) -> list[Chunk]:
        """What is yielded until the end, or until a chunk after which `until` holds."""
        events: Iterator[Event] = iter(())
        deadline = 0.0
        chunks: list[Chunk] = []
        while (step := life.next_step(self.time.now())) is not None:
            match step:
                case RouterCall():
                    events = self.routers[step.address].called(step, self.time.now())
                    deadline = self.time.now() + step.timeout_s
                case ReadResponse():
                    one = self._receive(life, events, deadline)
                    if one is not None:
                        assert life.generation.text.endswith(one.text), "yielded before it is recorded"
                        chunks.append(one)
                        if until(life.generation):
                            return chunks
                case Pause():
                    self.time.run_for(step.seconds)
                case DropCall():
                    self.num_dropped += 1
        return checked(life.generation, chunks)

    def cancel(self, life: GenerationLife) -> Cancellation | None:
        """As a stream that is closed; the routers know every request. None: it had ended."""
        if not life.cancel():
            return None
        cancellation = life.cancellation(self.time.now())
        while (call := cancellation.next_call(self.time.now())) is not None:
            self.routers[call.address].cancelled.append(call.message.request_id)
            cancellation.answered(inference_pb2.CancelResponse(found=True))
        return cancellation

    def _receive(self, life: GenerationLife, events: Iterator[Event], deadline: float) -> Chunk | None:
        event = next(events, None)
        if isinstance(event, Silence):
            left_s = deadline - self.time.now()
            self.time.run_for(min(event.seconds, left_s))
            if event.seconds < left_s:
                return self._receive(life, events, deadline)
            event = lost(grpc.StatusCode.DEADLINE_EXCEEDED)
        if isinstance(event, CallFailure):
            life.call_ended(event, self.time.now())
            return None
        return life.received(event, self.time.now())


def checked(generation: Generation, chunks: Sequence[Chunk]) -> list[Chunk]:
    """What was yielded is what is recorded, in order and once."""
    assert [token for one in chunks for token in one.tokens] == generation.tokens
    assert "".join(one.text for one in chunks) == generation.text
    position = chunks[0].index if chunks else 0
    for one in chunks:
        assert one.index == position
        position += len(one.tokens)
    return list(chunks)
