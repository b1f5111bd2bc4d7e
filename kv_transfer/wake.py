"""Wakes a thread that waits in zmq_poll, from any thread, at once and without a socket."""

import os


class Waker:
    """A pipe; `fd` becomes readable after `wake` until `clear`."""

    def __init__(self) -> None:
        self.fd, self._write_fd = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._write_fd, False)
        self._closed = False

    def wake(self) -> None:
        """Any thread; a full pipe is a wake-up already under way."""
        if not self._closed:
            try:
                os.write(self._write_fd, b"\0")
            except BlockingIOError:
                return

    def clear(self) -> None:
        try:
            while len(os.read(self.fd, 4096)) == 4096:
                pass
        except BlockingIOError:
            return

    def close(self) -> None:
        """After the waiting thread has ended."""
        self._closed = True
        os.close(self.fd)
        os.close(self._write_fd)
