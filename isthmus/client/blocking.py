"""The blocking client: the same course of calls, for threads. It needs no event loop."""

import contextlib
import threading
import time
import weakref
from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from isthmus.client.attempts import (
    CANCEL_TIMEOUT_S,
    ID_TIMEOUT_S,
    ROUTER_TIMEOUT_S,
    UNARY_TIMEOUT_S,
    Attempts,
    Failure,
    Routers,
)
from isthmus.client.course import NO_END, Course, OutOfOrder
from isthmus.client.generation import Chunk, Generation
from isthmus.client.options import DEFAULT_TIMEOUT_S, GenerateOptions, Message, chat_of, request_of
from isthmus.clock import Clock, SystemClock
from isthmus.errors import WorkerLost
from isthmus.process.rpc import CHANNEL_OPTIONS
from isthmus.v1 import inference_pb2, inference_pb2_grpc


class Client:
    """A context manager holding one connection to each router. Any thread may use it; arguments as `AsyncClient`."""

    def __init__(
        self,
        routers: str | Sequence[str],
        *,
        router_timeout_s: float = ROUTER_TIMEOUT_S,
        clock: Clock = SystemClock(),
    ):
        self._routers = Routers(routers, clock)
        self._router_timeout_s = router_timeout_s
        self._clock = clock
        self._channels = {
            router.address: grpc.insecure_channel(router.address, options=CHANNEL_OPTIONS)
            for router in self._routers.all
        }
        self._stubs: dict[str, Any] = {
            address: inference_pb2_grpc.InferenceServiceStub(opened) for address, opened in self._channels.items()
        }
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what still runs, whoever reads it."""
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.close()
        for opened in self._channels.values():
            opened.close()

    def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> "Stream":
        """Sent when the stream is first read. Raises InvalidRequest for what a request cannot hold."""
        attempts = self._attempts(options.get("timeout_s", DEFAULT_TIMEOUT_S))
        stream = Stream(self, Course(request_of(prompt, options), attempts))
        with self._lock:
            self._streams.add(stream)
        return stream

    def complete(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Generation:
        """Reads a stream to its end."""
        stream = self.generate(prompt, **options)
        for _ in stream:
            pass
        return stream.result

    def list_models(self) -> list[inference_pb2.Model]:
        return list(self._ask("ListModels", inference_pb2.ListModelsRequest()).models)

    def tokenize(self, prompt: str | None = None, *, chat: Sequence[Message] | None = None) -> list[int]:
        sources: dict[str, Any] = {"prompt": prompt} if chat is None else {"chat": chat_of(chat)}
        return list(self._ask("Tokenize", inference_pb2.TokenizeRequest(**sources)).token_ids)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return self._ask("Detokenize", inference_pb2.DetokenizeRequest(token_ids=token_ids)).text

    def open(self, course: Course) -> Any:
        """The call that is next. For Stream."""
        message, attempts = course.next_message(), course.attempts
        stub = self._stubs[attempts.router.address]
        method = stub.Resume if isinstance(message, inference_pb2.ResumeRequest) else stub.Generate
        return method(message, timeout=attempts.remaining_s())

    def cancel(self, request_id: str, first: str) -> bool:
        """Asks `first`, then the other routers, to end a request, for at most a second; whether one knew it."""
        request = inference_pb2.CancelRequest(request_id=request_id)
        deadline = self._clock.now() + CANCEL_TIMEOUT_S
        for address in dict.fromkeys([first, *self._stubs]):
            with contextlib.suppress(grpc.RpcError, ValueError):  # ValueError: the client was closed
                if self._stubs[address].Cancel(request, timeout=max(0.001, deadline - self._clock.now())).found:
                    return True
        return False

    def _ask(self, method: str, request: Any) -> Any:
        attempts = self._attempts(UNARY_TIMEOUT_S)
        while True:
            try:
                call = getattr(self._stubs[attempts.router.address], method)
                return call(request, timeout=attempts.remaining_s())
            except grpc.RpcError as error:
                delay_s = attempts.failed(Failure.of(error))
            time.sleep(delay_s)

    def _attempts(self, timeout_s: float) -> Attempts:
        return Attempts(self._routers, timeout_s=timeout_s, router_timeout_s=self._router_timeout_s)


class Stream:
    """One generation, read by one thread. Iterating gives text, `chunks` gives tokens; leaving before the end cancels.

    `result` fills while it is read. As a context manager it is closed at the end of the block.
    """

    def __init__(self, client: Client, course: Course):
        self._client = client
        self._course = course
        self._call: Any = None
        self._is_reading = False
        self._has_id = threading.Event()
        self._left = threading.Event()

    @property
    def result(self) -> Generation:
        return self._course.generation

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Generator[str]:
        with contextlib.closing(self.chunks()) as chunks:
            for chunk in chunks:
                if chunk.text:
                    yield chunk.text

    def chunks(self) -> Generator[Chunk]:
        """Tokens with their logprobs, as they come. Raises IsthmusError."""
        course = self._course
        try:
            while not course.is_over:
                self._call = self._client.open(course)
                failure = NO_END
                try:
                    while (response := self._next()) is not None:
                        chunk = course.take(response)
                        self._has_id.set()
                        if chunk is not None:
                            yield chunk
                except grpc.RpcError as error:
                    failure = Failure.of(error)
                except OutOfOrder as error:
                    failure = Failure(WorkerLost(str(error)))
                self._call.cancel()
                if not course.is_over:
                    self._left.wait(course.failed(failure))
        finally:
            self.close()

    def cancel(self) -> None:
        """From any thread: ends the request. Who reads the stream gets what was made before, then its end."""
        course = self._course
        if not course.cancel():
            return
        self._left.set()
        request_id = self._known_id()
        if not request_id or not self._client.cancel(request_id, course.attempts.router.address):
            self._drop()

    def close(self) -> None:
        """Cancels it unless it has ended."""
        self.cancel()
        self._drop()

    def _next(self) -> Any:
        self._is_reading = True
        try:
            return next(self._call, None)
        finally:
            self._is_reading = False

    def _known_id(self) -> str:
        if self._course.live_id or self._call is None:
            return self._course.live_id
        if self._is_reading:  # another thread
            self._has_id.wait(ID_TIMEOUT_S)
        else:
            enough = threading.Timer(ID_TIMEOUT_S, self._call.cancel)
            enough.start()
            with contextlib.suppress(grpc.RpcError):
                response = next(self._call, None)
                if response is not None:
                    return response.accepted.request_id
            enough.cancel()
        return self._course.live_id

    def _drop(self) -> None:
        if self._call is not None:
            self._call.cancel()
