"""What clients saw of their streams, and whether a quiet stack shows the same: each index once, equal bits, one end."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

GRACE_S = 1.0  # a request ends at the latest this long after its deadline


class SeenToken(Protocol):
    """A token as the client library or the protocol has it."""

    id: int
    logprob: float | None


@dataclass(frozen=True, slots=True)
class Heard:
    """One token at a client."""

    index: int
    token_id: int
    bits: str  # of its logprobs, hexadecimal: equal numbers need not be equal bits
    at: float  # monotonic seconds


@dataclass(frozen=True, slots=True)
class End:
    reason: str  # a finish reason, or "error: ..."
    at: float


@dataclass(slots=True)
class Record:
    """One request's life at its client. Owned by the user that sent it."""

    spec: str
    began_at: float
    deadline_s: float
    request_ids: list[str] = field(default_factory=list[str])  # one for each time it was begun
    tokens: list[Heard] = field(default_factory=list[Heard])
    text: str = ""
    ends: list[End] = field(default_factory=list[End])

    def hear(self, index: int, tokens: Sequence[SeenToken], text: str, at: float) -> None:
        self.text += text
        self.tokens += [Heard(index + k, token.id, bits(token), at) for k, token in enumerate(tokens)]

    def end(self, reason: str, at: float, text: str = "") -> None:
        self.text += text
        self.ends.append(End(reason, at))

    @property
    def failed(self) -> bool:
        return not self.ends or self.ends[0].reason.startswith("error")


@dataclass(frozen=True, slots=True)
class Oracle:
    """The same request's result on a quiet stack."""

    token_ids: tuple[int, ...]
    bits: tuple[str, ...]
    text: str
    reason: str

    @classmethod
    def of(cls, record: Record) -> "Oracle":
        assert not record.failed, record.ends
        (end,) = record.ends
        assert [token.index for token in record.tokens] == list(range(len(record.tokens)))
        ids, logprobs = (token.token_id for token in record.tokens), (token.bits for token in record.tokens)
        return cls(tuple(ids), tuple(logprobs), record.text, end.reason)


def bits(token: Any) -> str:
    """Of a token's own logprob and the top ones with their ids, protobuf message or the library's own type."""
    own = "" if token.logprob is None else struct.pack("<f", token.logprob).hex()
    pairs = [top if isinstance(top, tuple) else (top.id, top.logprob) for top in token.top_logprobs]
    return own + "".join(struct.pack("<If", *pair).hex() for pair in pairs)


def violations(records: Sequence[Record], oracles: Mapping[str, Oracle]) -> list[str]:
    """Empty when every stream kept the promise; else one line per fault of a stream, its request ids in front."""
    return [
        f"{' '.join(record.request_ids) or 'never accepted'} ({record.spec}): {problem}"
        for record in records
        for problem in _problems(record, oracles[record.spec])
    ]


def _problems(record: Record, oracle: Oracle) -> list[str]:
    return [*_index_problems(record), *_content_problems(record, oracle), *_end_problems(record, oracle)]


def _index_problems(record: Record) -> list[str]:
    found, following = [], 0
    for token in record.tokens:
        if token.index > following:
            found.append(f"lost: index {token.index} follows {following - 1}")
        elif token.index < following:
            found.append(f"repeated: index {token.index} after {following - 1}")
        following = max(following, token.index + 1)
    return found


def _content_problems(record: Record, oracle: Oracle) -> list[str]:
    found = []
    for token in record.tokens:
        if token.index >= len(oracle.token_ids):
            found.append(f"wrong: a token at index {token.index}, beyond the end at {len(oracle.token_ids)}")
        elif token.token_id != oracle.token_ids[token.index]:
            found.append(f"wrong: {token.token_id} at index {token.index}, not {oracle.token_ids[token.index]}")
        elif token.bits != oracle.bits[token.index]:
            found.append(f"wrong: logprob bits at index {token.index}")
    return found[:3]


def _end_problems(record: Record, oracle: Oracle) -> list[str]:
    if not record.ends:
        return [f"hung: no end within {record.deadline_s:g} s, {len(record.tokens)} tokens"]
    found = [f"ended again: {[end.reason for end in record.ends]}"] if len(record.ends) > 1 else []
    end = record.ends[0]
    if end.reason != oracle.reason:
        found.append(f"ended with {end.reason}, not {oracle.reason}, after {len(record.tokens)} tokens")
    elif len({token.index for token in record.tokens}) < len(oracle.token_ids):
        found.append(f"lost: {len(record.tokens)} of {len(oracle.token_ids)} tokens")
    elif record.text != oracle.text:
        found.append(f"wrong: text {record.text[-40:]!r}, not {oracle.text[-40:]!r}")
    if any(token.at > end.at for token in record.tokens):
        found.append("a token after the end")
    if end.at - record.began_at > record.deadline_s + GRACE_S:
        found.append(f"late: ended after {end.at - record.began_at:.1f} s, deadline {record.deadline_s:g} s")
    return found
