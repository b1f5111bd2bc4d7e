"""One generation read by a thread: the driver of a GenerationLife over grpc."""

import contextlib
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

import grpc

from isthmus.client.generation import Chunk, Generation
from isthmus.client.generation_life import ID_TIMEOUT_S, DropCall, GenerationLife, Pause, ReadResponse, Step
from isthmus.client.router_call import RouterCall
from isthmus.client.rpc_failure import failure_of
from isthmus.clock import Clock


class Stream:
    """One generation, read by one thread. Iterating gives text, `chunks` gives tokens; leaving before the end cancels.

    `result` fills while it is read. As a context manager it is closed at the end of the block. `cancel` and `close`
    may come from any thread.
    """

    def __init__(self, life: GenerationLife, call: Callable[[RouterCall], Any], lock: threading.RLock, clock: Clock):
        """`lock` guards the life, which shares state with others of its client, and `_call`."""
        self._life = life
        self._make_call = call
        self._lock = lock
        self._clock = clock
        self._call: Any = None
        self._is_answered = threading.Event()  # the open call brought a response, or failed
        self._is_cancelled = threading.Event()

    @property
    def result(self) -> Generation:
        """What was delivered so far."""
        return self._life.generation

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
        try:
            while (step := self._next_step()) is not None:
                match step:
                    case ReadResponse():
                        chunk = self._read()
                        if chunk is not None:
                            yield chunk
                    case Pause():
                        self._is_cancelled.wait(step.seconds)
                    case DropCall():
                        self._drop()
                    case RouterCall():
                        pass  # made already
        finally:
            self.close()

    def cancel(self) -> None:
        """Ends the request wherever it runs. Who reads the stream gets what was made before, then its end."""
        with self._lock:
            is_first = self._life.cancel()
        if is_first:
            self._is_cancelled.set()
            self._await_id()
            self._tell_routers()

    def close(self) -> None:
        """Cancels the generation unless it has ended."""
        self.cancel()
        self._drop()

    def _next_step(self) -> Step | None:
        """A call is made under the same lock, so that who cancels meanwhile finds it."""
        with self._lock:
            step = self._life.next_step(self._clock.now())
            if isinstance(step, RouterCall):
                self._call = None
                self._is_answered.clear()
                self._call = self._make_call(step)
            return step

    def _read(self) -> Chunk | None:
        """Until the id is known, a read outlives its reader: without the id nobody could end the request.

        grpc cannot take up a read that Ctrl-C interrupted, so that read has a thread of its own.
        """
        if not self._life.awaits_id:
            return self._receive()
        outcome: Future[Chunk | None] = Future()
        threading.Thread(target=self._receive_into, args=(outcome,), daemon=True).start()
        return outcome.result()

    def _receive_into(self, outcome: "Future[Chunk | None]") -> None:
        try:
            outcome.set_result(self._receive())
        except BaseException as error:  # noqa: BLE001 - raised where the stream is read
            outcome.set_exception(error)
        finally:
            self._is_answered.set()

    def _receive(self) -> Chunk | None:
        try:
            response = next(self._call, None)
        except grpc.RpcError as error:
            with self._lock:
                self._life.call_ended(failure_of(error), self._clock.now())
            return None
        with self._lock:
            return self._life.received(response, self._clock.now())

    def _await_id(self) -> None:
        """The id may be on its way."""
        if self._call is not None and self._life.awaits_id:
            self._is_answered.wait(ID_TIMEOUT_S)

    def _tell_routers(self) -> None:
        """Lets go of the call when no router knew the request; else the router ends it."""
        with self._lock:
            cancellation = self._life.cancellation(self._clock.now())
        while (call := cancellation.next_call(self._clock.now())) is not None:
            with contextlib.suppress(grpc.RpcError, ValueError):  # ValueError: the client was closed
                cancellation.answered(self._make_call(call))
        if not cancellation.was_known:
            self._drop()

    def _drop(self) -> None:
        with self._lock:
            if self._call is not None:
                self._call.cancel()
