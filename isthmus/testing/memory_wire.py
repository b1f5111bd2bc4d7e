"""Connections in memory and in virtual time: what happens to each message is decided by whoever makes the network.

A listener hears messages by link and answers on it, as a ZeroMQ ROUTER does; whoever connects has a wire, as a DEALER.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

Parts = list[bytes]
Body = bytes | bytearray | memoryview
HearAt = Callable[[bytes, Parts], None]  # link, message
LOSS_NOTICE_S = 0.001  # from a connection's end until the other side knows


class Timer(Protocol):
    """Time and calls at a later moment; an asyncio event loop is one."""

    def time(self) -> float: ...

    def call_later(self, delay: float, callback: Callable[[], object], /) -> object: ...


class Fate(Protocol):
    """What the network does to a message."""

    def __call__(self, link: bytes, message: Sequence[Body]) -> Sequence[float]:
        """Seconds until each copy arrives; none: it is lost. Copies may overtake those of other messages."""
        ...


@dataclass(eq=False, slots=True)
class Sending:
    """A body on its way, read where it lies until its first copy arrives. Written by the network only."""

    done: bool = False


@dataclass(eq=False, slots=True)
class MemoryWire:
    """One connection, from its beginning to the first close of either end. Written by the network only."""

    link: bytes
    endpoint: str
    network: "MemoryNetwork"
    hear: Callable[["MemoryWire", Parts], None]
    lost: Callable[["MemoryWire", str], None]
    is_open: bool = True

    def send(self, header: bytes, body: Body) -> None:
        """To the listener. On a connection that is gone it is dropped."""
        self.network.carry(self, [header, bytes(body)], Sending())

    def send_rows(self, header: bytes, body: Body) -> Sending:
        """The same; the body is read later, until the result is done."""
        sending = Sending()
        self.network.carry(self, [header, body], sending)
        return sending

    def close(self) -> None:
        """What is under way still arrives."""
        self.network.end(self)


@dataclass(eq=False, slots=True)
class MemoryNetwork:
    """Every listener and connection of one simulated world. One thread. Calls others only from the timer."""

    timer: Timer
    fate: Fate
    _listeners: dict[str, HearAt] = field(default_factory=dict[str, HearAt], init=False)  # by endpoint
    _wires: dict[bytes, MemoryWire] = field(default_factory=dict[bytes, MemoryWire], init=False)  # open ones, by link
    _num_links: int = field(default=0, init=False)

    def listen(self, endpoint: str, hear: HearAt) -> None:
        """Messages to the endpoint go to `hear` from now on."""
        assert endpoint not in self._listeners, "one listener an endpoint"
        self._listeners[endpoint] = hear

    def stop_listening(self, endpoint: str) -> None:
        """Its connections are lost, and what is under way to it."""
        del self._listeners[endpoint]
        for wire in [wire for wire in self._wires.values() if wire.endpoint == endpoint]:
            self.cut(wire)

    def connect(
        self,
        endpoint: str,
        *,
        hear: Callable[[MemoryWire, Parts], None],
        lost: Callable[[MemoryWire, str], None],
    ) -> MemoryWire:
        """A wire at once; that nobody listens shows a little later, in `lost`."""
        self._num_links += 1
        wire = MemoryWire(self._num_links.to_bytes(5), endpoint, self, hear, lost)
        self._wires[wire.link] = wire
        if endpoint not in self._listeners:
            self.cut(wire)
        return wire

    def answer(self, link: bytes, message: Parts) -> bool:
        """To whoever has the other end of the link. False: it is gone."""
        wire = self._wires.get(link)
        if wire is None:
            return False
        for delay in self.fate(link, message):
            self.timer.call_later(delay, lambda: wire.hear(wire, list(message)) if wire.is_open else None)
        return True

    def cut(self, wire: MemoryWire) -> None:
        """The connection breaks; the side that made it is told."""
        if wire.is_open:
            self.end(wire)
            self.timer.call_later(LOSS_NOTICE_S, lambda: wire.lost(wire, "connection lost (cut)"))

    def cut_all(self) -> None:
        """Every connection of the moment breaks."""
        for wire in list(self._wires.values()):
            self.cut(wire)

    def end(self, wire: MemoryWire) -> None:
        """For the wire's own `close`."""
        wire.is_open = False
        self._wires.pop(wire.link, None)

    def carry(self, wire: MemoryWire, message: list[Body], sending: Sending) -> None:
        """For the wire's own `send`."""
        delays = self.fate(wire.link, message) if wire.is_open else []
        if not delays:
            sending.done = True
        copied: Parts = []

        def arrive() -> None:
            if not copied:
                copied.extend(bytes(part) for part in message)
                sending.done = True
            hear = self._listeners.get(wire.endpoint)
            if hear is not None:
                hear(wire.link, copied)

        for delay in delays:
            self.timer.call_later(delay, arrive)
