"""The blocking client: a driver of the client's cores for threads. It needs no event loop."""

import threading
import time
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from isthmus.client.blocking_stream import Stream
from isthmus.client.client_core import ClientCore
from isthmus.client.generation import Generation
from isthmus.client.options import GenerateOptions, Message
from isthmus.client.question import AnswerT, Question, detokenize, list_models, tokenize
from isthmus.client.retries import ROUTER_TIMEOUT_S
from isthmus.client.router_call import RouterCall
from isthmus.client.rpc_failure import failure_of
from isthmus.clock import Clock, SystemClock
from isthmus.ids import Ids, SystemIds
from isthmus.process.rpc import CHANNEL_OPTIONS
from isthmus.v1 import inference_pb2, inference_pb2_grpc


class Client:
    """A context manager that holds one connection to each router. Any thread may use it.

    `routers`: host:port addresses, a sequence or separated by commas. `router_timeout_s`: how long a request that no
    router has taken yet looks for one. Raises ValueError when no router is named.
    """

    def __init__(
        self,
        routers: str | Sequence[str],
        *,
        router_timeout_s: float = ROUTER_TIMEOUT_S,
        clock: Clock = SystemClock(),
        ids: Ids = SystemIds(),
    ):
        self._core = ClientCore(routers, ids, router_timeout_s=router_timeout_s)
        self._clock = clock
        # One thread at a time is in the cores. A garbage collection may end a stream within them: hence the RLock.
        self._lock = threading.RLock()
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._channels = {
            router.address: grpc.insecure_channel(router.address, options=CHANNEL_OPTIONS)
            for router in self._core.routers.all
        }
        self._stubs: dict[str, Any] = {
            address: inference_pb2_grpc.InferenceServiceStub(channel) for address, channel in self._channels.items()
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancels what still runs, whoever reads it, and closes the connections."""
        with self._lock:
            streams = list(self._streams)
        for stream in streams:
            stream.close()
        for channel in self._channels.values():
            channel.close()

    def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Stream:
        """A stream of one generation, sent to a router when the stream is first read.

        The timeout begins now. Raises InvalidRequest for what a request cannot hold.
        """
        with self._lock:
            life = self._core.generation(prompt, options, self._clock.now())
            stream = Stream(life, self._call, self._lock, self._clock)
            self._streams.add(stream)
        return stream

    def complete(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Generation:
        """Reads a stream to its end. Raises IsthmusError."""
        stream = self.generate(prompt, **options)
        for _ in stream:
            pass
        return stream.result

    def list_models(self) -> list[inference_pb2.Model]:
        """The models that the routers serve. Raises IsthmusError."""
        return self._ask(list_models())

    def tokenize(self, prompt: str | None = None, *, chat: Sequence[Message] | None = None) -> list[int]:
        """The token ids of a text, or of a chat's rendered text. Raises IsthmusError."""
        return self._ask(tokenize(prompt, chat))

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids. Raises IsthmusError."""
        return self._ask(detokenize(token_ids))

    def _call(self, call: RouterCall) -> Any:
        return getattr(self._stubs[call.address], call.method)(call.message, timeout=call.timeout_s)

    def _ask(self, question: Question[AnswerT]) -> AnswerT:
        with self._lock:
            life = self._core.question(question, self._clock.now())
        while True:
            with self._lock:
                call = life.next_call(self._clock.now())
            try:
                return question.read(self._call(call))
            except grpc.RpcError as error:
                with self._lock:
                    delay_s = life.failed(failure_of(error), self._clock.now())
            time.sleep(delay_s)
