"""A router's cores over scripted workers, in virtual time: nothing waits, and the same seed gives the same run."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from isthmus.config import RouterConfig
from isthmus.errors import IsthmusError, NoFreeBlocks
from isthmus.failpoints import Failpoints
from isthmus.ledger import Ledger
from isthmus.metrics import RequestMetrics
from isthmus.routine import Answer
from isthmus.testing.virtual_time import SeededIds, VirtualTime
from isthmus.text.detokenizer import Detokenizer
from isthmus.text.vocabulary import Vocabulary
from isthmus.types import BlockCounts
from isthmus.v1 import decode_pb2, inference_pb2, types_pb2
from kv_transfer.ownership.store import WorkerLoad, WorkerRecord
from router.client.caller import ResumeWish
from router.client.opened_request import RequestOpener, count_request
from router.client.validate import ModelFacts, check_request
from router.life.locate import Locator
from router.life.parts import LifeParts
from router.life.request_life import Lives, RequestLife
from router.pool.admission import Admission
from router.pool.placement import Placement
from router.pool.worker_pool import WorkerPool
from tests.router.scripted_decode import EOS, LAYOUT, MODEL_DIGEST, NUMERICS, ScriptedDecode
from tests.router.scripted_links import LATENCY_S, ScriptedLinks
from tests.router.scripted_prefill import ScriptedPrefill

VOCAB_SIZE = 300  # bytes, then ids without text
MODEL = ModelFacts("tiny", "deepseek_v3", MODEL_DIGEST, VOCAB_SIZE, context_length=4096, eos_token_ids=(EOS,))
VIEW_INTERVAL_S = 0.25  # of the registry


class ByteTokenizer:
    """Token ids are bytes."""

    vocab_size = VOCAB_SIZE

    def __init__(self) -> None:
        self._vocabulary = Vocabulary(tuple(bytes([i]) for i in range(256)) + (b"",) * (VOCAB_SIZE - 256), False)

    def encode(self, text: str, *, max_bytes: int = 0, max_tokens: int | None = None) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: Any, *, max_bytes: int = 0) -> list[int]:
        return [byte for message in messages for byte in f"<{message.role}>{message.content}".encode()]

    def decode(self, token_ids: Any) -> str:
        return bytes(token_ids).decode("utf-8", "replace")

    def detokenizer(self, stop: Any = (), *, include_stop: bool = False) -> Detokenizer:
        return Detokenizer(self._vocabulary, stop, include_stop=include_stop)


class Cluster:
    """Workers and the registry that lists them. Written by itself; tests set how it behaves."""

    def __init__(self, seed: int = 0, time: Any = None, ids: Any = None) -> None:
        self.time: Any = time or VirtualTime(seed)
        self.ids = ids or SeededIds(self.time)
        self.decode: list[ScriptedDecode] = []
        self.prefill: list[ScriptedPrefill] = []
        self.records: dict[str, WorkerRecord] = {}
        self.ledger = Ledger(self.time)
        self.is_registry_down = False
        self.most_latency_s: float | None = None  # then each message takes its own time, up to so much

    def latency_s(self) -> float:
        return LATENCY_S if self.most_latency_s is None else self.time.random.uniform(0, self.most_latency_s)

    def commit(self, transfer_id: str, attempt: int, num_tokens: int = 0) -> bool:
        return any(worker.commit(transfer_id, attempt, num_tokens) for worker in self.decode)

    def abort(self, transfer_id: str) -> None:
        for worker in self.decode:
            worker.drop_transfer(transfer_id)

    def add_decode(self, name: str = "d0", address: str = "") -> ScriptedDecode:
        incarnation = self.ids.incarnation()
        worker = ScriptedDecode(self, name, incarnation, address or f"decode:{incarnation}")
        self.decode.append(worker)
        self.records[incarnation] = _record(worker, "decode")
        return worker

    def add_prefill(self, name: str = "p0", address: str = "") -> ScriptedPrefill:
        incarnation = self.ids.incarnation()
        worker = ScriptedPrefill(self, name, incarnation, address or f"prefill:{incarnation}")
        self.prefill.append(worker)
        self.records[incarnation] = _record(worker, "prefill")
        return worker

    def change(self, incarnation: str, **changes: Any) -> None:
        self.records[incarnation] = replace(self.records[incarnation], **changes)

    def kill(self, worker: ScriptedDecode | ScriptedPrefill) -> None:
        self.records.pop(worker.incarnation, None)
        worker.go_down()

    def serving(self) -> ScriptedDecode:
        return next(worker for worker in self.decode if worker.streams)

    def other(self, worker: ScriptedDecode) -> ScriptedDecode:
        (one,) = (other for other in self.decode if other is not worker)
        return one


@dataclass(eq=False)
class Result:
    """What a client was told. Checks that it could be told so."""

    accepted: inference_pb2.Accepted | None = None
    finished: inference_pb2.Finished | None = None
    first_index: int | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""

    @property
    def start(self) -> inference_pb2.Accepted:
        assert self.accepted is not None
        return self.accepted

    @property
    def end(self) -> inference_pb2.Finished:
        assert self.finished is not None
        return self.finished

    @property
    def tokens(self) -> bytes:
        return bytes(self.token_ids)

    def take(self, response: inference_pb2.GenerateResponse) -> None:
        assert self.finished is None, "nothing follows the end"
        match response.WhichOneof("event"):
            case "accepted":
                assert self.accepted is None
                self.accepted = response.accepted
            case "tokens":
                assert self.accepted is not None
                self.first_index = response.tokens.index if self.first_index is None else self.first_index
                assert response.tokens.index == self.first_index + len(self.token_ids)
                self.token_ids += [token.id for token in response.tokens.tokens]
                self.text += response.tokens.text
            case _:
                self.finished = response.finished
                self.text += response.finished.text


class ScriptedCaller:
    """A client's end of a call: a Caller that keeps what it was told. Each message takes `delay_s` to pass on."""

    def __init__(self, time: VirtualTime, delay_s: float = 0.0):
        self.result = Result()
        self._time = time
        self._life: RequestLife | None = None
        self.delay_s = delay_s
        self.reads = True
        self.is_telling = False
        self.has_left = False
        self.is_over = False
        self.error: BaseException | None = None
        self.told_at: list[float] = []

    def attend(self, life: RequestLife) -> "ScriptedCaller":
        self._life = life
        return self

    def tell(self, message: inference_pb2.GenerateResponse) -> None:
        assert not self.is_telling, "one message at a time"
        assert not self.is_over, "nothing follows the end"
        self.is_telling = True
        if self.reads:
            self._time.after(self.delay_s, partial(self._pass_on, message))

    def end(self, error: BaseException | None) -> None:
        assert not self.is_over, "a call ends once"
        self.is_over = True
        self.error = error

    def leave(self) -> None:
        self.has_left = True
        assert self._life is not None
        self._life.left(self._time.now())

    @property
    def request_id(self) -> str:
        """Once it was told."""
        return self.result.start.request_id

    def read(self, num_tokens: int) -> Result:
        """Runs until so many tokens have come; 0: until `accepted` has."""

        def has_come() -> bool:
            return self.result.accepted is not None and len(self.result.token_ids) >= num_tokens

        self._time.run_until(lambda: has_come() or self.is_over, f"{num_tokens} tokens")
        assert has_come(), self.error
        return self.result

    def until_over(self) -> "ScriptedCaller":
        self._time.run_until(lambda: self.is_over, "the call's end", 700.0)
        return self

    def to_the_end(self) -> Result:
        """Raises what the call ended with."""
        self.until_over()
        if self.error is not None:
            raise self.error
        assert self.result.finished is not None, "it ended without `finished`, and without an error"
        return self.result

    def _pass_on(self, message: inference_pb2.GenerateResponse) -> None:
        if self.has_left:
            return
        self.is_telling = False
        self.result.take(message)
        self.told_at.append(self._time.now())
        assert self._life is not None
        self._life.told()


class RouterUnderTest:
    """The router's own cores, wired as its composition root does, over the cluster's registry."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        links: Any = None,
        max_buffered_tokens: int = 4096,
        failpoints: str = "",
        **settings: Any,
    ):
        self.cluster = cluster
        self.time: Any = cluster.time
        self.config = RouterConfig(name="r0", **settings)
        self.metrics = RequestMetrics()
        self.admission = Admission(self.config.max_streams, self.config.max_queue)
        self.pool = WorkerPool(cluster.ids.incarnation(), MODEL_DIGEST, links or ScriptedLinks(cluster), cluster.ledger)
        parts = LifeParts(
            Placement(self.pool, self.admission),
            cluster.ledger,
            "router-0",
            self.config.queue_timeout_s,
            Failpoints.parse(failpoints),
            max_buffered_tokens,
        )
        self.hint: Callable[[str], str | None] = lambda request_id: None  # the registry's
        locator = Locator(self.pool, self)
        opener = RequestOpener(MODEL, ByteTokenizer().detokenizer, cluster.ids)
        self.lives = Lives(
            parts, self.admission, locator, opener, cluster.time.drive, partial(count_request, self.metrics)
        )
        self._watch()

    def find_stream(self, request_id: str, answer: Answer[str | None]) -> None:
        self.time.after(LATENCY_S, lambda: answer.put(self.hint(request_id)))

    def meet_workers(self) -> "RouterUnderTest":
        """Runs until the router has a session with every decode worker that lives."""
        alive = [worker for worker in self.cluster.decode if worker.is_up]
        self.time.run_until(lambda: len(self.pool.usable_decode(self.time.now())) == len(alive) > 0, "sessions")
        return self

    def call(
        self, message: inference_pb2.GenerateRequest, timeout_s: float = 20.0, delay_s: float = 0.0
    ) -> ScriptedCaller:
        """Begins a request. Raises InvalidRequest at once."""
        check_request(message, MODEL)
        opened = self.lives.opener.open(message, list(message.prompt.encode()), self.time.now(), timeout_s)
        caller = ScriptedCaller(self.time, delay_s)
        return caller.attend(self.lives.begin(opened, caller))

    def resume(self, request_id: str, next_index: int, timeout_s: float = 20.0) -> ScriptedCaller:
        caller = ScriptedCaller(self.time)
        return caller.attend(self.lives.resume(ResumeWish(request_id, next_index, timeout_s), caller))

    def generate(self, message: inference_pb2.GenerateRequest, timeout_s: float = 20.0) -> Result:
        """Runs virtual time until the request is over. Raises what it ended with."""
        return self.call(message, timeout_s).to_the_end()

    def cancel(self, request_id: str) -> bool:
        answers: list[bool] = []
        self.lives.cancel(request_id, answers.append)
        self.time.run_until(lambda: answers, "an answer to Cancel")
        return answers[0]

    def events(self, name: str) -> list[Any]:
        return [event for event in self.cluster.ledger.read() if event.event == name]

    def is_quiet(self) -> None:
        """Runs until nothing of any request is left, here and on the workers."""
        self.time.run_until(lambda: not self.left(), "nothing is left", 5.0)

    def left(self) -> list[str]:
        decode, prefill = self.pool.decode.values(), self.pool.prefill.values()
        left = [
            f"stream {request_id} on {worker.name}" for worker in self.cluster.decode for request_id in worker.streams
        ]
        left += [f"{len(worker.runs)} calls on {worker.name}" for worker in self.cluster.prefill if worker.runs]
        left += [f"{worker.num_tokens_ahead} tokens ahead" for worker in prefill if worker.num_tokens_ahead]
        left += [f"{worker.reserved_blocks} blocks" for worker in decode if worker.reserved_blocks]
        left += [f"{worker.session.num_streams} routed" for worker in decode if worker.session.num_streams]
        left += [f"{len(worker.calls)} calls" for worker in prefill if worker.calls]
        left += [f"{self.admission.num_streams} slots"] * bool(self.admission.num_streams)
        left += [f"{self.admission.num_queued} queued"] * bool(self.admission.num_queued)
        left += ["quarantine"] * (not self.admission.quarantine.num_free)
        left += [f"{len(self.lives)} lives"] * bool(len(self.lives))
        return left

    def _watch(self) -> None:
        if self.cluster.is_registry_down:
            self.pool.miss_view("down", self.time.now())
        else:
            self.pool.take_view(list(self.cluster.records.values()), self.time.now())
        self.time.after(VIEW_INTERVAL_S, self._watch)


def ask(prompt: str = "Hello", **sampling: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(prompt=prompt, sampling=types_pb2.SamplingParams(**sampling))


def retained(**sampling: Any) -> inference_pb2.GenerateRequest:
    request = ask(**sampling)
    request.on_disconnect = types_pb2.ON_DISCONNECT_RETAIN
    return request


def no_room(reserve: decode_pb2.Reserve) -> IsthmusError:
    return NoFreeBlocks("no free blocks")


def _record(worker: ScriptedDecode | ScriptedPrefill, role: str) -> WorkerRecord:
    return WorkerRecord(
        incarnation=worker.incarnation,
        role=role,
        name=worker.name,
        pid=1,
        grpc_address=worker.address,
        zmq_endpoint="tcp://127.0.0.1:1" if role == "decode" else None,
        http_address="127.0.0.1:2",
        layout=LAYOUT,
        numerics_digest=NUMERICS,
        numerics_ingredients={},
        model_digest=MODEL_DIGEST,
        load=WorkerLoad(BlockCounts(total=1000, free=1000, cached=0, referenced=0)),
        serving=True,
        state="idle",
        seconds_since_progress=0.0,
    )
