"""What carries a sender's frames: a connection to one receiver, whatever it is made of."""

from typing import Protocol

from kv_transfer.frames import Buffer


class LinkLost(Exception):
    """The receiver cannot be reached over this connection any more; says why."""


class Reading(Protocol):
    """The wire's hold on a body that it sends from where it lies."""

    @property
    def done(self) -> bool:
        """The wire reads the body no more: its memory may change."""
        ...


class Wire(Protocol):
    """Carries messages of two parts, in order, and never blocks. A wire that is lost is not mended."""

    def send(self, header: bytes, body: bytes) -> None:
        """A small frame. Raises LinkLost."""
        ...

    def send_rows(self, header: bytes, body: Buffer) -> Reading:
        """A frame whose body is read until the result is done. Raises LinkLost."""
        ...

    def close(self) -> None:
        """Nothing more is sent. Bodies may be read for a while yet."""
        ...


class OpenWire(Protocol):
    """Makes connections."""

    def __call__(self, endpoint: str) -> Wire:
        """Raises LinkLost for an endpoint that is none. That nobody is there shows later."""
        ...
