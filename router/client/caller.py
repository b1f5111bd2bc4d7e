"""The client's end of a call, as the core sees it: a port with a driver for each protocol (gRPC today)."""

from dataclasses import dataclass
from typing import Protocol

from isthmus.v1 import inference_pb2


class ClientGone(Exception):
    """The client left, and the request ends with it. Nobody is told."""


class Caller(Protocol):
    """Neither method waits."""

    def tell(self, message: inference_pb2.GenerateResponse) -> None:
        """One at a time: the life hears `told` before it tells the next."""
        ...

    def end(self, error: BaseException | None) -> None:
        """Nothing follows. None: the last message was `finished`."""
        ...


@dataclass(frozen=True, slots=True)
class ResumeWish:
    """What a Resume call asks for."""

    request_id: str
    next_index: int
    timeout_s: float
