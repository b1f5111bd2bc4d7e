"""The step thread: when its loops get turns and commands, and how it ends."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from isthmus.clock import SystemClock
from isthmus.worker.step_thread import Post, StepThread

WAIT_S = 10.0
NEVER_S = 3600.0


class Scripted:
    """Says what it is told, in the order of the calls; each turn asks for the next as its script says."""

    def __init__(self, turns: Callable[[float], float | None] = lambda _: None):
        self.said: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._turns = turns

    def take(self, command: str) -> None:
        self.said.put(command)

    def turn(self, now: float) -> float | None:
        self.said.put("turn")
        return self._turns(now)

    def close(self, now: float) -> None:
        self.said.put("close")

    def next(self) -> object:
        return self.said.get(timeout=WAIT_S)


@contextmanager
def driving(*loops: Scripted, idle_wait_s: float = NEVER_S) -> Iterator[tuple[list[Post[str]], list[BaseException]]]:
    crashes: list[BaseException] = []
    thread = StepThread("test-step", SystemClock(), idle_wait_s=idle_wait_s, on_crash=crashes.append)
    posts = [thread.add(loop) for loop in loops]
    thread.start()
    try:
        yield posts, crashes
    finally:
        thread.stop(WAIT_S)


def test_commands_are_taken_in_order_before_the_next_turn() -> None:
    loop = Scripted()
    thread = StepThread("test-step", SystemClock(), idle_wait_s=NEVER_S, on_crash=lambda _: None)
    post = thread.add(loop)
    post("first")
    post("second")
    thread.start()
    assert [loop.next() for _ in range(3)] == ["first", "second", "turn"]
    thread.stop(WAIT_S)
    assert loop.next() == "close"


def test_a_command_wakes_an_idle_thread() -> None:
    loop = Scripted()
    with driving(loop) as ((post,), _):
        assert loop.next() == "turn"
        post("go")
        assert [loop.next(), loop.next()] == ["go", "turn"]


def test_turns_follow_each_other_while_there_is_more_to_do() -> None:
    numbers = iter(range(3))
    loop = Scripted(lambda now: now if next(numbers) < 2 else None)
    with driving(loop):
        assert [loop.next() for _ in range(3)] == ["turn"] * 3
    assert loop.next() == "close"  # and no turn between


def test_a_turn_comes_at_the_moment_a_loop_asked_for() -> None:
    moments: list[float] = []
    clock = SystemClock()

    def soon(now: float) -> float | None:
        moments.append(now)
        return now + 0.02 if len(moments) == 1 else None

    loop = Scripted(soon)
    with driving(loop):
        assert [loop.next(), loop.next()] == ["turn", "turn"]
    assert 0.02 <= moments[1] - moments[0] <= clock.now() - moments[0]


def test_an_idle_thread_looks_again_after_its_idle_time() -> None:
    loop = Scripted()
    with driving(loop, idle_wait_s=0.01):
        assert [loop.next() for _ in range(3)] == ["turn"] * 3


def test_two_loops_take_turns_in_one_thread() -> None:
    threads: set[int] = set()
    order: queue.SimpleQueue[str] = queue.SimpleQueue()
    left = iter(range(4))

    def busy(name: str) -> Callable[[float], float | None]:
        def turn(now: float) -> float | None:
            threads.add(threading.get_ident())
            order.put(name)
            return now if next(left, None) is not None else None

        return turn

    first, second = Scripted(busy("first")), Scripted(busy("second"))
    with driving(first, second) as ((post_first, post_second), _):
        assert [order.get(timeout=WAIT_S) for _ in range(4)] == ["first", "second"] * 2
        post_second("for the second")
        post_first("for the first")
        while first.next() != "for the first":
            pass
        while second.next() != "for the second":
            pass
    assert len(threads) == 1


class Broken(Scripted):
    """Fails at a turn, or at a command."""

    def __init__(self, where: str):
        super().__init__(self._fail if where == "turn" else lambda _: None)

    def take(self, command: str) -> None:
        self._fail(0.0)

    def _fail(self, _: float) -> float | None:
        raise RuntimeError("broken")


@pytest.mark.parametrize("where", ["take", "turn"])
def test_a_loop_that_raises_ends_the_thread_and_its_owner_hears(where: str) -> None:
    loop = Broken(where)
    with driving(loop) as ((post,), crashes):
        post("anything")
    assert [str(error) for error in crashes] == ["broken"]
    said = [loop.said.get_nowait() for _ in range(loop.said.qsize())]
    assert "close" not in said


def test_stopping_a_thread_that_never_started_does_nothing() -> None:
    loop = Scripted()
    thread = StepThread("test-step", SystemClock(), idle_wait_s=NEVER_S, on_crash=lambda _: None)
    thread.add(loop)
    thread.stop(WAIT_S)
    assert loop.said.empty()
