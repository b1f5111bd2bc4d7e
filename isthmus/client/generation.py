"""What one generation delivered so far, over however many calls."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from isthmus.convert import finish_reason_from_proto
from isthmus.types import FinishReason, Token
from isthmus.v1 import inference_pb2


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens that came together and the text they release. The last one may release text without a token."""

    index: int  # of the first token, counted from the original request
    tokens: tuple[Token, ...]
    text: str


@dataclass(slots=True)
class Generation:
    """Filled while its stream is read; owned by that stream. Text and tokens only ever grow."""

    seed: int
    request_ids: list[str] = field(default_factory=list[str])  # one for each time the request was begun
    text: str = ""
    tokens: list[Token] = field(default_factory=list[Token])
    num_resumes: int = 0  # times the stream was taken up again after it broke
    accepted: inference_pb2.Accepted | None = None
    finished: inference_pb2.Finished | None = None
    is_cancelled: bool = False  # from here; the router may have confirmed it or not

    @property
    def request_id(self) -> str:
        """What the ledgers know it by: the newest id, empty before the router accepted it."""
        return self.request_ids[-1] if self.request_ids else ""

    @property
    def token_ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def finish_reason(self) -> FinishReason | None:
        """None while it runs, and after an error."""
        if self.finished is None:
            return FinishReason.CANCELLED if self.is_cancelled else None
        return finish_reason_from_proto(self.finished.finish_reason)

    @property
    def usage(self) -> inference_pb2.Usage:
        """Zeros before the end, as `timings` and `workers`."""
        return self._end().usage

    @property
    def timings(self) -> inference_pb2.Timings:
        """Of the last call: what was before a resume is not in it."""
        return self._end().timings

    @property
    def workers(self) -> inference_pb2.ServedBy:
        return self._end().workers

    def as_dict(self) -> dict[str, Any]:
        """For JSON: floats are the fp32 values widened exactly, so that equal bits print equally."""
        asked = any(token.logprob is not None for token in self.tokens)
        return {
            "request_id": self.request_id,
            "seed": self.seed,
            "text": self.text,
            "token_ids": self.token_ids,
            "logprobs": [_logprob(token) for token in self.tokens] if asked else None,
            "finish_reason": self.finish_reason.value if self.finish_reason else None,
            "usage": fields_of(self.usage),
            "timings": fields_of(self.timings),
            "workers": fields_of(self.workers),
            "num_attempts": self._end().num_attempts,
            "num_resumes": self.num_resumes,
            "request_ids": self.request_ids,
        }

    def _end(self) -> inference_pb2.Finished:
        return self.finished or inference_pb2.Finished()


def fields_of(message: Any) -> Mapping[str, Any]:
    """A flat message's fields by name, unset ones included."""
    return {descriptor.name: getattr(message, descriptor.name) for descriptor in message.DESCRIPTOR.fields}


def _logprob(token: Token) -> dict[str, Any]:
    return {"logprob": token.logprob, "top": [{"id": key, "logprob": value} for key, value in token.top_logprobs]}
