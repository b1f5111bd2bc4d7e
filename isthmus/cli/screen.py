"""Shows the texts of several requests at once: one moving line each on a terminal, else one block each at its end."""

import shutil
import textwrap
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol, TextIO

from isthmus.clock import Clock, SystemClock

_UP = "\x1b[A"
_CLEAR_BELOW = "\x1b[J"
_REDRAW_S = 0.05
_TITLE_WIDTH = 14
_WIDTH = 100


class Screen(Protocol):
    """Where a demo writes while its requests run."""

    def progress(self, title: str, text: str) -> None:
        """Shows a running request; `text` is all that it has so far."""
        ...

    def finished(self, title: str, question: str, text: str) -> None:
        """Shows a whole answer. Requests finish in the order in which they are shown."""
        ...


@contextmanager
def open_screen(out: TextIO) -> Generator[Screen]:
    if not out.isatty():
        yield PlainScreen(out)
        return
    screen = LiveScreen(out, shutil.get_terminal_size().columns)
    try:
        yield screen
    finally:
        screen.close()


class PlainScreen:
    """For pipes and logs: each answer once, when it is whole."""

    def __init__(self, out: TextIO):
        self._out = out

    def progress(self, title: str, text: str) -> None:
        pass

    def finished(self, title: str, question: str, text: str) -> None:
        self._out.write(_block(title, question, text, _WIDTH))
        self._out.flush()


class LiveScreen:
    """For terminals: below the finished answers one line for each running request, showing the end of its text."""

    def __init__(self, out: TextIO, columns: int, clock: Clock = SystemClock()):
        self._out = out
        self._columns = columns
        self._clock = clock
        self._running: dict[str, str] = {}
        self._num_drawn = 0
        self._drawn_at = 0.0

    def progress(self, title: str, text: str) -> None:
        self._running[title] = text
        if self._clock.now() - self._drawn_at >= _REDRAW_S:
            self._redraw("")

    def finished(self, title: str, question: str, text: str) -> None:
        self._running.pop(title, None)
        self._redraw(_block(title, question, text, min(self._columns, _WIDTH)))

    def close(self) -> None:
        self._running.clear()
        self._redraw("")

    def _redraw(self, above: str) -> None:
        lines = [_tail(title, text, self._columns) for title, text in self._running.items()]
        below = "".join(f"{line}\n" for line in lines)
        self._out.write(_UP * self._num_drawn + "\r" + _CLEAR_BELOW + above + below)
        self._out.flush()
        self._num_drawn = len(lines)
        self._drawn_at = self._clock.now()


def _block(title: str, question: str, text: str, width: int) -> str:
    indent = " " * _TITLE_WIDTH
    lines = textwrap.wrap(_printable(text), max(20, width - _TITLE_WIDTH)) or ["(no text)"]
    return f"{title.ljust(_TITLE_WIDTH)}{question}\n" + "".join(f"{indent}{line}\n" for line in lines)


def _tail(title: str, text: str, columns: int) -> str:
    room = max(10, columns - _TITLE_WIDTH - 1)
    return title.ljust(_TITLE_WIDTH) + _printable(text)[-room:]


def _printable(text: str) -> str:
    """One line; a model's control characters must not steer the terminal."""
    return "".join(character if character.isprintable() else " " for character in " ".join(text.split()))
