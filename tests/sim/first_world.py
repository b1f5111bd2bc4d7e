"""The first simulated world: two routers, two prefill workers, two decode workers, three requests and one crash.

Every core is the real one. The model's next token is a hash of everything before it, so a token that is lost, repeated
or replaced changes all that follow. One seed decides every delay, which process dies, when, and whether it comes back.
"""

from collections.abc import Sequence
from typing import Any

from isthmus.errors import IsthmusError
from isthmus.testing.hash_model import FAKE_LAYOUT, VOCAB_SIZE, next_token
from isthmus.testing.memory_wire import Body, MemoryNetwork
from isthmus.testing.virtual_time import VirtualTime
from isthmus.types import Request, SamplingParams
from isthmus.v1 import inference_pb2, types_pb2
from kv_transfer.ownership.memory import MemoryOwnership
from router.client.validate import check_request
from tests.sim.network import MAX_DELAY_S, MIN_DELAY_S, Stream
from tests.sim.routers import SimRouter
from tests.sim.workers import SimDecode, SimPrefill

NUM_REQUESTS = 3
SILENCE_S = 20.0  # longer than any recovery: a stream that says nothing for so long hangs
TIMEOUT_S = 60.0


class FirstWorld:
    def __init__(self, seed: int):
        self.time = VirtualTime(seed)
        self.dice = self.time.random
        self.store = MemoryOwnership(self.time)
        self._arrives_at: dict[bytes, float] = {}  # the latest message's, by link
        self.network = MemoryNetwork(self.time, self._fate)
        self.dead: list[Any] = []
        self.processes: dict[str, Any] = {}  # by name; a name keeps its address over lives
        for name in ("prefill-0", "prefill-1", "decode-0", "decode-1", "router-0", "router-1"):
            self.start(name)
        self.clients = [SimClient(self, number) for number in range(NUM_REQUESTS)]

    def start(self, name: str) -> None:
        """A new life of the process, with another incarnation."""
        if name.startswith("router"):
            self.processes[name] = SimRouter(self.time, self.store, self.find, name, FAKE_LAYOUT.model_digest)
        else:
            kind = SimPrefill if name.startswith("prefill") else SimDecode
            self.processes[name] = kind(self.time, self.store, self.network, name)

    def _fate(self, link: bytes, message: Sequence[Body]) -> list[float]:
        """As on ZeroMQ: nothing is lost on a connection that is open, and nothing overtakes."""
        at = max(self._arrives_at.get(link, 0.0), self.time.now() + self.dice.uniform(MIN_DELAY_S, MAX_DELAY_S))
        self._arrives_at[link] = at
        return [at - self.time.now()]

    def find(self, address: str) -> Any:
        process = self.processes.get(address.partition(":")[0])
        return process if process is not None and process.is_alive else None

    def routers(self) -> list[SimRouter]:
        return [process for name, process in self.processes.items() if name.startswith("router") and process.is_alive]

    def crash(self, name: str) -> None:
        """Its peers' connections are reset; nothing that it was about to say is said."""
        process = self.processes[name]
        self.dead.append(process)
        process.die()
        for connection in process.connections:
            connection.end()

    def run(self) -> None:
        """Three streams, one of which at least runs when a process dies."""
        for client in self.clients:
            self.time.after(1.0 + self.dice.uniform(0.0, 0.1), client.begin)
        name = self.dice.choice(list(self.processes))
        self.time.after(1.0 + self.dice.uniform(0.0, 0.25), lambda: self.crash(name))
        if self.dice.random() < 0.5:
            self.time.after(1.4 + self.dice.uniform(0.0, 1.0), lambda: self.start(name))
        self.time.run_until(lambda: all(client.is_over for client in self.clients), "every stream ends", 2 * TIMEOUT_S)
        for client in self.clients:
            client.check()
        self.time.run_for(4.0)  # what is let go of with a delay
        self.check_nothing_is_left()

    def check_nothing_is_left(self) -> None:
        for name, process in self.processes.items():
            if not process.is_alive:
                continue
            if isinstance(process, SimRouter):
                assert (len(process.lives), process.admission.num_streams) == (0, 0), name
                assert not any(worker.reserved_blocks for worker in process.pool.decode.values()), name
                assert not any(worker.num_tokens_ahead for worker in process.pool.prefill.values()), name
            else:
                counts = process.engine.pool.counts()
                assert (counts.referenced, counts.draining, process.num_streams()) == (0, 0, 0), (name, counts)


class SimClient:
    """Asks a router, and when its connection breaks another one, with the tokens it has; checks every token."""

    def __init__(self, world: FirstWorld, number: int):
        self._world = world
        dice = world.dice
        self.prompt = [dice.randrange(VOCAB_SIZE) for _ in range(dice.randrange(10, 100))]
        self.seed = dice.getrandbits(64)
        self.max_tokens = dice.randrange(1, 24)
        self.token_ids: list[int] = []
        self.is_over = False
        self.error: BaseException | None = None
        self.number = number
        self.num_calls = 0
        self._caller: SimCaller | None = None

    def begin(self) -> None:
        """A call that goes on after the tokens so far: generation is a function of the request."""
        routers = self._world.routers()
        router = routers[self.num_calls % len(routers)]
        self.num_calls += 1
        assert self.num_calls < 20, "it does not come to an end"
        message = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=self.prompt),
            emitted_token_ids=self.token_ids,
            sampling=types_pb2.SamplingParams(max_tokens=self.max_tokens, seed=self.seed, ignore_eos=True),
        )
        self._caller = SimCaller(self._world.time, router, self)
        self._world.time.after(
            self._world.dice.uniform(MIN_DELAY_S, MAX_DELAY_S), lambda: self._arrive(router, message)
        )

    def hear(self, caller: "SimCaller", message: inference_pb2.GenerateResponse) -> None:
        if caller is not self._caller:
            return
        if message.HasField("tokens"):
            assert message.tokens.index == len(self.token_ids), "a gap or a repeated token"
            self.token_ids += [token.id for token in message.tokens.tokens]
        self.is_over = message.HasField("finished")

    def failed(self, caller: "SimCaller", error: BaseException | None) -> None:
        """The call is over without its end."""
        if caller is self._caller and not self.is_over:
            assert error is None or isinstance(error, IsthmusError), error
            self._world.time.after(self._world.dice.uniform(0.05, 0.3), self.begin)

    def check(self) -> None:
        request = Request("", self.seed, tuple(self.prompt), SamplingParams(self.max_tokens))
        expected: list[int] = []
        while len(expected) < self.max_tokens:
            expected.append(next_token(request, expected))
        assert self.token_ids == expected, f"stream {self.number}"

    def _arrive(self, router: SimRouter, message: inference_pb2.GenerateRequest) -> None:
        caller = self._caller
        assert caller is not None
        if not router.is_alive:
            self.failed(caller, None)
            return
        router.connections.append(caller)
        check_request(message, router.lives.opener.model)
        try:
            opened = router.lives.opener.open(message, self.prompt, self._world.time.now(), TIMEOUT_S)
        except IsthmusError as refusal:
            self.failed(caller, refusal)
            return
        caller.life = router.lives.begin(opened, caller)


class SimCaller:
    """The `Caller` port: messages reach the client in order, unless the router dies before."""

    def __init__(self, time: VirtualTime, router: SimRouter, client: SimClient):
        self._router = router
        self._client = client
        self._stream = Stream(time, self)
        self.is_alive = True  # the client lives as long as the world
        self.life: Any = None

    def tell(self, message: inference_pb2.GenerateResponse) -> None:
        def arrive() -> None:
            self._client.hear(self, message)
            self._router.later(0.0005, self.life.told)

        self._stream.send(arrive)

    def end(self, error: BaseException | None = None) -> None:
        """Of the life, or of the router's process."""
        self._stream.send(lambda: self._client.failed(self, error))
