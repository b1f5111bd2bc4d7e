"""The router's connections: sessions and Prefill calls over gRPC, the registry's view. They decide nothing."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine

import grpc.aio

from isthmus.clock import LoopClock
from isthmus.errors import IsthmusError, RequestCancelled, WorkerLost
from isthmus.log import get_logger
from isthmus.process.rpc_errors import error_from_rpc
from isthmus.routine import Answer
from isthmus.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from kv_transfer.ownership.store import OwnershipStore, StoreUnavailable, WorkerRecord
from router.pool.decode_stream import Failed
from router.pool.session import Session
from router.pool.worker_pool import PrefillListener, WorkerPool

MAX_OUTGOING = 4096  # messages to a worker that does not read; beyond it the session is given up
FIND_TIMEOUT_S = 1.0
HINT_TIMEOUT_S = 0.1
CHANNEL_CLOSE_S = 0.5
WATCH_INTERVAL_S = 0.25
STORE_TIMEOUT_S = 1.0
Connect = Callable[[str], grpc.aio.Channel]
SessionCall = grpc.aio.StreamStreamCall[decode_pb2.SessionRequest, decode_pb2.SessionResponse]
PrefillCall = grpc.aio.UnaryStreamCall[prefill_pb2.PrefillRequest, prefill_pb2.PrefillResponse]
_log = get_logger("router.drivers")


class Tasks:
    """Background tasks of one owner: kept until they end, cancelled with it."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def end(self, timeout_s: float) -> None:
        self.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)


class GrpcWorkerLinks:
    """Opens connections to workers; event loop only. `close` ends what is left of them."""

    def __init__(self, connect: Connect, clock: LoopClock):
        self._connect = connect
        self._clock = clock
        self._tasks = Tasks()

    def open_decode(self, record: WorkerRecord, session: Session) -> "GrpcSessionLink":
        link = GrpcSessionLink(self._connect(record.grpc_address), session, self._clock, self._tasks)
        link.start(record.name)
        return link

    def open_prefill(self, record: WorkerRecord) -> "GrpcPrefillLink":
        return GrpcPrefillLink(self._connect(record.grpc_address), self._clock, self._tasks)

    async def close(self) -> None:
        await self._tasks.end(CHANNEL_CLOSE_S)


class GrpcSessionLink:
    """Connects a session again and again, carries its messages both ways, and tells it when a connection ends."""

    def __init__(self, channel: grpc.aio.Channel, session: Session, clock: LoopClock, tasks: Tasks):
        self._channel = channel
        self._stub: decode_pb2_grpc.DecodeServiceAsyncStub = decode_pb2_grpc.DecodeServiceStub(channel)
        self._session = session
        self._clock = clock
        self._tasks = tasks
        self._outgoing: asyncio.Queue[decode_pb2.SessionRequest] = asyncio.Queue(MAX_OUTGOING)
        self._hung_up = asyncio.Event()  # of the present connection
        self._running: asyncio.Task[None] | None = None

    def start(self, name: str) -> None:
        self._running = self._tasks.start(self._run(), name=f"session {name}")

    def send(self, message: decode_pb2.SessionRequest) -> bool:
        try:
            self._outgoing.put_nowait(message)
        except asyncio.QueueFull:
            return False
        return True

    def find(self, request_id: str, answer: Answer[int | None]) -> None:
        self._tasks.start(self._find(request_id, answer), name="find")

    def hang_up(self) -> None:
        self._hung_up.set()

    def close(self) -> None:
        if self._running is not None:
            self._running.cancel()
        self._tasks.start(self._channel.close(CHANNEL_CLOSE_S), name="close")

    async def _run(self) -> None:
        while True:
            problem = await self._connect_once()
            waited_s = self._session.broke(problem, self._clock.now())
            await self._clock.sleep(waited_s)

    async def _connect_once(self) -> str:
        """One connection's life; why it ended."""
        try:
            await self._converse(await self._connect())
        except grpc.aio.AioRpcError as error:
            return error.details() or error.code().name
        except (TimeoutError, WorkerLost) as error:
            return str(error) or "no hello in time"
        except Exception as error:  # noqa: BLE001 - the session's root: one worker's nonsense must not end the others'
            _log.exception("session.failed", error, worker=self._session.peer.decode_name)
            return type(error).__name__
        return "closed by the worker"

    async def _connect(self) -> SessionCall:
        call: SessionCall = self._stub.Session()
        opening = self._session.opening()
        try:
            async with self._clock.timeout(opening.timeout_s):
                await call.write(decode_pb2.SessionRequest(hello=opening.hello))
                first = await call.read()
        except BaseException:
            call.cancel()  # gRPC does it only for some of the moments at which a wait is cancelled
            raise
        self._outgoing = asyncio.Queue(MAX_OUTGOING)
        self._hung_up = asyncio.Event()
        self._session.connected(first if isinstance(first, decode_pb2.SessionResponse) else None, self._clock.now())
        return call

    async def _converse(self, call: SessionCall) -> None:
        """Reads and writes until either fails or the session hangs up."""
        parts = [
            asyncio.create_task(self._read_all(call), name="session-reader"),
            asyncio.create_task(self._write_all(call), name="session-writer"),
            asyncio.create_task(self._wait_for_hang_up(), name="session-end"),
        ]
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # Cancelling the tasks ends the call; cancelling the call would look like their own cancellation.
            for task in parts:
                task.cancel()
            # No task group: it drops a cancellation that comes while one of its tasks fails.
            try:
                outcomes = await asyncio.gather(*parts, return_exceptions=True)
            finally:
                call.cancel()
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    async def _wait_for_hang_up(self) -> None:
        await self._hung_up.wait()

    async def _read_all(self, call: SessionCall) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            while isinstance(message := await call.read(), decode_pb2.SessionResponse):
                self._session.hear(message, self._clock.now())

    async def _write_all(self, call: SessionCall) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await call.write(await self._outgoing.get())

    async def _find(self, request_id: str, answer: Answer[int | None]) -> None:
        try:
            request = decode_pb2.FindRequest(request_id=request_id)
            found = await self._stub.Find(request, timeout=FIND_TIMEOUT_S)
        except (grpc.aio.AioRpcError, grpc.aio.UsageError):
            answer.put(None)
        else:
            answer.put(found.next_index if found.found else None)


class GrpcPrefillLink:
    """Calls a prefill worker and passes on what it says."""

    def __init__(self, channel: grpc.aio.Channel, clock: LoopClock, tasks: Tasks):
        self._channel = channel
        self._stub: prefill_pb2_grpc.PrefillServiceAsyncStub = prefill_pb2_grpc.PrefillServiceStub(channel)
        self._clock = clock
        self._tasks = tasks

    def call(
        self, request: prefill_pb2.PrefillRequest, listener: PrefillListener, timeout_s: float
    ) -> Callable[[], None]:
        task = self._tasks.start(self._read(request, listener, timeout_s), name="prefill-call")

        def drop() -> None:
            task.cancel()

        return drop

    def close(self) -> None:
        self._tasks.start(self._channel.close(CHANNEL_CLOSE_S), name="close")

    async def _read(self, request: prefill_pb2.PrefillRequest, listener: PrefillListener, timeout_s: float) -> None:
        """Never raises but by cancellation: the listener learns everything."""
        error: IsthmusError = WorkerLost("the prefill worker ended the call early")
        call: PrefillCall | None = None
        try:
            call = self._stub.Prefill(request, timeout=timeout_s)
            async for response in call:
                listener.take(response, self._clock.now())
                if response.HasField("done"):
                    return
        except asyncio.CancelledError:
            if call is not None:
                call.cancel()  # gRPC does not do it for a reader that is cancelled while the request is being sent
            listener.failed(Failed(WorkerLost("the prefill call was dropped")), self._clock.now())  # if it still hears
            raise
        except grpc.aio.AioRpcError as rpc_error:
            said = error_from_rpc(rpc_error)
            # Cancelled by the worker's side, not by the client.
            error = WorkerLost("the prefill worker dropped the call") if isinstance(said, RequestCancelled) else said
        except grpc.aio.UsageError:  # the pool has closed the channel of a worker that left
            error = WorkerLost("the prefill worker has left")
        except Exception as unexpected:  # noqa: BLE001 - the task's root
            _log.exception("prefill.failed", unexpected, request_id=request.request.request_id)
            error = WorkerLost("the prefill worker's answer could not be read")
        listener.failed(Failed(error), self._clock.now())


class Registry:
    """Reads the store for the pool, again and again, and for requests that look for a stream."""

    def __init__(self, store: OwnershipStore, clock: LoopClock):
        self._store = store
        self._clock = clock
        self._tasks = Tasks()

    async def watch(self, pool: WorkerPool) -> None:
        """Until cancelled."""
        while True:
            try:
                async with self._clock.timeout(STORE_TIMEOUT_S):
                    records = await self._store.list_workers()
            except (StoreUnavailable, TimeoutError) as error:
                pool.miss_view(f"{type(error).__name__}: {error}", self._clock.now())
            else:
                pool.take_view(records, self._clock.now())
            await self._clock.sleep(WATCH_INTERVAL_S)

    def find_stream(self, request_id: str, answer: Answer[str | None]) -> None:
        """The incarnation that the store names as the stream's; None when it does not, or not in time."""
        self._tasks.start(self._find(request_id, answer), name="hint")

    async def close(self) -> None:
        await self._tasks.end(STORE_TIMEOUT_S)

    async def _find(self, request_id: str, answer: Answer[str | None]) -> None:
        try:
            async with self._clock.timeout(HINT_TIMEOUT_S):
                answer.put(await self._store.streams.find(request_id))
        except (StoreUnavailable, TimeoutError):
            answer.put(None)
