"""The blocking stream as a driver: who cancels finds the call and its id, whatever the reading thread does then."""

import signal
import threading
from typing import Any

import grpc
import pytest

from isthmus.client.blocking_stream import Stream
from isthmus.client.client_core import ClientCore
from isthmus.client.router_call import RouterCall
from isthmus.clock import SystemClock
from isthmus.ids import SystemIds
from isthmus.v1 import inference_pb2
from tests.client.routers import accepted
from tests.client.virtual_routers import rpc_error

SOON_S = 10.0


class Call:
    """A call that is accepted when a test lets it, and says nothing more until it is cancelled."""

    def __init__(self) -> None:
        self.is_read = threading.Event()
        self.may_accept = threading.Event()
        self.is_cancelled = threading.Event()
        self._num_read = 0

    def __next__(self) -> inference_pb2.GenerateResponse:
        self._num_read += 1
        if self._num_read == 1:
            self.is_read.set()
            assert self.may_accept.wait(SOON_S)
            return accepted("r-0", 7)
        assert self.is_cancelled.wait(SOON_S)
        raise rpc_error(grpc.StatusCode.CANCELLED)

    def cancel(self) -> None:
        self.is_cancelled.set()


class Router:
    """Makes one such call, and notes what it is told to cancel, which ends the call."""

    def __init__(self) -> None:
        self.call = Call()
        self.cancelled: list[str] = []
        self.is_called = threading.Event()
        self.may_return = threading.Event()
        self.may_return.set()

    def __call__(self, call: RouterCall) -> Any:
        if call.method == "Cancel":
            self.cancelled.append(call.message.request_id)
            self.call.cancel()
            return inference_pb2.CancelResponse(found=True)
        self.is_called.set()
        assert self.may_return.wait(SOON_S)
        return self.call


def stream_from(router: Router) -> Stream:
    clock = SystemClock()
    core = ClientCore("a:1", SystemIds(), router_timeout_s=5)
    return Stream(core.generation("Once", {}, clock.now()), router, threading.RLock(), clock)


def in_thread(function: Any) -> threading.Thread:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    return thread


def test_ctrl_c_before_the_id_is_known_ends_the_request() -> None:
    router = Router()
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        assert router.call.is_read.wait(SOON_S)
        signal.pthread_kill(main, signal.SIGINT)
        router.call.may_accept.set()

    helper = in_thread(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(stream_from(router))
    helper.join(SOON_S)
    assert router.cancelled == ["r-0"]


def test_a_cancel_while_the_call_is_made_finds_it() -> None:
    router = Router()
    router.may_return.clear()
    stream = stream_from(router)
    reading = in_thread(lambda: list(stream))
    assert router.is_called.wait(SOON_S)
    cancelling = in_thread(stream.cancel)
    router.may_return.set()
    router.call.may_accept.set()
    for thread in (reading, cancelling):
        thread.join(SOON_S)
        assert not thread.is_alive()
    assert router.cancelled == ["r-0"]


def test_a_cancel_while_the_id_is_on_its_way_waits_for_it() -> None:
    router = Router()
    stream = stream_from(router)
    reading = in_thread(lambda: list(stream))
    assert router.call.is_read.wait(SOON_S)
    cancelling = in_thread(stream.cancel)
    router.call.may_accept.set()
    for thread in (reading, cancelling):
        thread.join(SOON_S)
        assert not thread.is_alive()
    assert router.cancelled == ["r-0"]
    assert stream.result.is_cancelled


def test_a_request_that_is_never_accepted_is_dropped() -> None:
    router = Router()
    stream = stream_from(router)
    reading = in_thread(lambda: list(stream))
    assert router.call.is_read.wait(SOON_S)
    stream.cancel()
    assert router.call.is_cancelled.is_set()
    assert router.cancelled == []
    router.call.may_accept.set()
    reading.join(SOON_S)
    assert not reading.is_alive()
