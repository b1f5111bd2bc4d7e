"""Wakes a thread that waits in zmq_poll, from any thread, at once and without a socket."""

import os
from contextlib import suppress


class Waker:
    """An eventfd; `fd` is readable from `wake` until `clear`."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = False

    def wake(self) -> None:
        """Any thread."""
        if not self._closed:
            os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def close(self) -> None:
        """After the waiting thread has ended."""
        self._closed = True
        os.close(self.fd)
