"""The calls around generation: one request, one answer, asked again when a router is lost or refuses. No I/O."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from isthmus.client.failure import CallFailure
from isthmus.client.options import Message, chat_of
from isthmus.client.retries import Retries
from isthmus.client.router_call import RouterCall
from isthmus.v1 import inference_pb2

QUESTION_TIMEOUT_S = 10.0  # for everything, retries included
AnswerT = TypeVar("AnswerT")


@dataclass(frozen=True, slots=True)
class Question(Generic[AnswerT]):
    """What is asked of any router, and how its answer is read."""

    method: str
    message: Any
    read: Callable[[Any], AnswerT]


def list_models() -> Question[list[inference_pb2.Model]]:
    return Question("ListModels", inference_pb2.ListModelsRequest(), lambda response: list(response.models))


def tokenize(prompt: str | None, chat: Sequence[Message] | None) -> Question[list[int]]:
    """`chat` counts when both are given."""
    if chat is None:
        message = inference_pb2.TokenizeRequest(prompt=prompt)
    else:
        message = inference_pb2.TokenizeRequest(chat=chat_of(chat))
    return Question("Tokenize", message, lambda response: list(response.token_ids))


def detokenize(token_ids: Sequence[int]) -> Question[str]:
    message = inference_pb2.DetokenizeRequest(token_ids=token_ids)
    return Question("Detokenize", message, lambda response: response.text)


class QuestionLife:
    """One question over as many calls as it takes. Written by the driver that makes the calls."""

    def __init__(self, method: str, message: Any, retries: Retries):
        self._method = method
        self._message = message
        self._retries = retries

    def next_call(self, now: float) -> RouterCall:
        """Raises DeadlinePassed."""
        return RouterCall(self._retries.router.address, self._method, self._message, self._retries.remaining_s(now))

    def failed(self, failure: CallFailure, now: float) -> float:
        """The seconds to wait before the next call. Raises what ends the question."""
        return self._retries.failed(failure, now)
