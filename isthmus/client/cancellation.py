"""How routers are told that a request is over. No I/O; the time is passed in."""

from collections.abc import Sequence

from isthmus.client.router_call import RouterCall
from isthmus.v1 import inference_pb2

CANCEL_TIMEOUT_S = 1.0


class Cancellation:
    """Asks one router after another to end a request, until one knew it. Written by the driver that makes the calls."""

    def __init__(self, request_id: str, addresses: Sequence[str], now: float):
        """`request_id`: empty when no router ever told one; then there is nobody to ask."""
        self._request = inference_pb2.CancelRequest(request_id=request_id)
        self._addresses = list(addresses) if request_id else []
        self._deadline = now + CANCEL_TIMEOUT_S
        self.was_known = False

    def next_call(self, now: float) -> RouterCall | None:
        """The next router to ask; None when one knew the request, all were asked, or a second has passed."""
        remaining_s = self._deadline - now
        if self.was_known or not self._addresses or remaining_s <= 0:
            return None
        return RouterCall(self._addresses.pop(0), "Cancel", self._request, remaining_s)

    def answered(self, response: inference_pb2.CancelResponse) -> None:
        """A router's answer; a call that failed is not reported."""
        self.was_known = response.found
