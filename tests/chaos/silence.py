"""How long clients heard nothing, fault by fault."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.chaos.faults import Injected
from tests.chaos.history import Record

Recomputed = Mapping[str, Sequence[tuple[float, float]]]  # by request: (when it ended, seconds it took)


class Wait(NamedTuple):
    """Of one stream for its next token, in seconds."""

    seconds: float
    net: float  # without what was recomputed for this stream meanwhile


@dataclass(slots=True)
class Silence:
    """Of one fault, one figure per stream: its longest wait."""

    fault: Injected
    running: list[Wait] = field(default_factory=list[Wait])  # streams that had a token
    waiting: list[Wait] = field(default_factory=list[Wait])  # streams that waited for their first


def silences(records: Iterable[Record], faults: Sequence[Injected], recomputed: Recomputed) -> list[Silence]:
    """In the order of the faults. A wait is told to the first fault within it, else to the last one before it, and

    counts from that fault on.
    """
    ordered = [Silence(fault) for fault in sorted(faults, key=lambda fault: fault.at)]
    for record in records:
        pieces = [piece for request_id in record.request_ids for piece in recomputed.get(request_id, ())]
        longest: dict[tuple[int, bool], Wait] = {}
        ends = [end.at for end in record.ends[:1]]
        arrivals = [record.began_at, *(token.at for token in record.tokens), *ends]
        for number, (since, until) in enumerate(itertools.pairwise(arrivals)):
            cause = _cause(ordered, since, until)
            if cause is not None:
                key, began = (cause, number == 0), max(since, ordered[cause].fault.at)
                longest[key] = max(longest.get(key, Wait(0.0, 0.0)), _wait(began, until, pieces))
        for (cause, is_first), wait in longest.items():
            (ordered[cause].waiting if is_first else ordered[cause].running).append(wait)
    return ordered


def _wait(since: float, until: float, pieces: Iterable[tuple[float, float]]) -> Wait:
    inside = (min(seconds, at - since) for at, seconds in pieces if since < at <= until)
    return Wait(until - since, max(0.0, until - since - sum(inside)))


def _cause(ordered: Sequence[Silence], since: float, until: float) -> int | None:
    before = [number for number, silence in enumerate(ordered) if silence.fault.at < until]
    within = [number for number in before if ordered[number].fault.at >= since]
    return within[0] if within else (before[-1] if before else None)


def quantile(values: Sequence[float], part: float) -> float:
    """The nearest rank; 0 of nothing."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))] if values else 0.0


def worst(seen: Iterable[Silence], *, net: bool = False) -> list[float]:
    """Of each fault, the silence of the stream that waited longest."""
    return [max(((wait.net if net else wait.seconds) for wait in one.running), default=0.0) for one in seen]


def table(seen: Sequence[Silence]) -> str:
    """By kind, in seconds: the worst running stream of each fault, the same without its recompute time, first tokens

    awaited at a fault, and the time until the process served again.
    """
    lines = [f"{'fault':18}count   worst p50   p99   max    net p50   p99   max   first p50   max    back"]
    for kind in sorted({one.fault.kind for one in seen}):
        of_kind = [one for one in seen if one.fault.kind == kind]
        firsts = [wait.seconds for one in of_kind for wait in one.waiting]
        back = quantile([one.fault.served_at - one.fault.at for one in of_kind], 0.5)
        gross, net = (_quantiles(worst(of_kind, net=net)) for net in (False, True))
        waited = f"{quantile(firsts, 0.5):6.2f}{max(firsts, default=0.0):6.2f}"
        lines.append(f"{kind:18}{len(of_kind):5}      {gross}     {net}      {waited}  {back:6.1f}")
    return "\n".join(lines)


def _quantiles(values: Sequence[float]) -> str:
    return "".join(f"{quantile(values, part):6.2f}" for part in (0.5, 0.99, 1.0))
