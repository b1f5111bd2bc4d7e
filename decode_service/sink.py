"""Where the messages about a stream go, and which messages those are."""

from typing import Protocol

from isthmus.v1 import decode_pb2

# Everything that a SessionResponse carries.
SessionMessage = (
    decode_pb2.DecodeHello
    | decode_pb2.Reserved
    | decode_pb2.Refused
    | decode_pb2.StepTokens
    | decode_pb2.StreamEnded
    | decode_pb2.TransferFailed
    | decode_pb2.Rearmed
    | decode_pb2.Attached
    | decode_pb2.Detached
    | decode_pb2.Moved
    | decode_pb2.Leaving
)


class Sink(Protocol):
    """The session of the router that a stream is attached to, whether it is alive or was lost."""

    def send(self, message: SessionMessage) -> None:
        """Returns at once. A sink whose session is over drops the message."""
        ...
