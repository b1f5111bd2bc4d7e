"""Who is told that a request is over, in which order, and for how long."""

from isthmus.client.cancellation import CANCEL_TIMEOUT_S, Cancellation
from isthmus.v1 import inference_pb2

NOW = 1000.0
KNOWN = inference_pb2.CancelResponse(found=True)
UNKNOWN = inference_pb2.CancelResponse(found=False)


def test_routers_are_asked_until_one_knew_the_request() -> None:
    cancellation = Cancellation("x", ["b:2", "a:1", "c:3"], NOW)
    first = cancellation.next_call(NOW)
    assert first is not None
    assert (first.address, first.method, first.message.request_id) == ("b:2", "Cancel", "x")
    cancellation.answered(UNKNOWN)
    second = cancellation.next_call(NOW)
    assert second is not None
    assert second.address == "a:1"
    cancellation.answered(KNOWN)
    assert cancellation.next_call(NOW) is None
    assert cancellation.was_known


def test_all_routers_together_get_one_second() -> None:
    cancellation = Cancellation("x", ["a:1", "b:2", "c:3"], NOW)
    first = cancellation.next_call(NOW)
    second = cancellation.next_call(NOW + 0.75)  # the first call failed
    assert first is not None
    assert first.timeout_s == CANCEL_TIMEOUT_S
    assert second is not None
    assert second.timeout_s == 0.25
    assert cancellation.next_call(NOW + CANCEL_TIMEOUT_S) is None
    assert not cancellation.was_known


def test_a_request_without_an_id_is_told_to_nobody() -> None:
    assert Cancellation("", ["a:1"], NOW).next_call(NOW) is None
