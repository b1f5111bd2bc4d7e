"""Which router reads a stream, and how far the stream has been sent to it."""

from dataclasses import dataclass

from decode_service.sink import SessionMessage, Sink


@dataclass(frozen=True, slots=True)
class AttachKey:
    """The attach counter fences routers: of two routers, the one with the higher counter has the stream."""

    router_incarnation: str
    counter: int

    def is_stale(self, held: "AttachKey") -> bool:
        """Whether a message with this key comes from a router that no longer has the stream held by `held`."""
        return self.counter < held.counter or (self.counter == held.counter and self != held)


@dataclass(eq=False, slots=True)
class Reader:
    """The router that a stream is attached to. Written in the event loop, through the methods."""

    attach: AttachKey
    sink: Sink | None  # None: nobody is to hear of the stream any more
    retention_s: float | None  # how long the stream lives without a session; None: on_disconnect is abort
    num_sent: int  # the sink has the tokens below this index, or is being sent them
    keep_until: float | None = None  # seconds; set while the router has no session, or the stream has ended

    def tell(self, message: SessionMessage) -> None:
        if self.sink is not None:
            self.sink.send(message)

    def take_over(self, router_incarnation: str) -> None:
        """Another router has the stream from now on. Its session follows by `bind`."""
        self.attach = AttachKey(router_incarnation, self.attach.counter + 1)

    def bind(self, sink: Sink, next_index: int) -> None:
        """The router reads through this session, from this token on."""
        self.sink = sink
        self.num_sent = next_index
        self.keep_until = None

    def keep(self, until: float | None) -> None:
        """Nobody reads, or the stream has ended: it is kept until then. None: the time is over."""
        self.keep_until = until

    def silence(self) -> None:
        """Nobody is told anything more."""
        self.sink = None

    def count_sent(self, num_tokens: int) -> None:
        self.num_sent += num_tokens
