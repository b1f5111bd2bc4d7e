"""How long clients heard nothing, fault by fault."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.chaos.faults import Injected
from tests.chaos.history import Record
from tests.chaos.ledgers import Told

_LEDGER_SKEW_S = 0.05  # an event is noted a little before or after what the client sees of it


class Wait(NamedTuple):
    """Of one stream for its next token, in seconds."""

    seconds: float
    net: float  # without what was recomputed for this stream meanwhile
    is_recovery: bool = False  # another process took the stream over meanwhile
    is_compound: bool = False  # a second process was faulted meanwhile


@dataclass(slots=True)
class Silence:
    """Of one fault, one figure per stream: its longest wait."""

    fault: Injected
    running: list[Wait] = field(default_factory=list[Wait])  # streams that had a token
    waiting: list[Wait] = field(default_factory=list[Wait])  # streams that waited for their first

    def recovered(self, *, compound: bool = False) -> list[Wait]:
        """Of streams that another process took over, after this fault alone or after another one on top of it."""
        return [wait for wait in self.running if wait.is_recovery and wait.is_compound is compound]


def silences(records: Iterable[Record], faults: Sequence[Injected], told: Mapping[str, Told]) -> list[Silence]:
    """In the order of the faults. A wait is told to the first fault within it, else to the last one before it, and

    counts from that fault on.
    """
    ordered = [Silence(fault) for fault in sorted(faults, key=lambda fault: fault.at)]
    for record in records:
        known = [told.get(request_id, Told()) for request_id in record.request_ids]
        longest: dict[tuple[int, bool], Wait] = {}
        ends = [end.at for end in record.ends[:1]]
        arrivals = [record.began_at, *(token.at for token in record.tokens), *ends]
        for number, (since, until) in enumerate(itertools.pairwise(arrivals)):
            within, cause = _causes(ordered, since, until)
            if cause is not None:
                key, began = (cause, number == 0), max(since, ordered[cause].fault.at)
                wait = _wait(began, until, known)._replace(is_compound=within > 1)
                longest[key] = max(longest.get(key, Wait(0.0, 0.0)), wait)
        for (cause, is_first), wait in longest.items():
            (ordered[cause].waiting if is_first else ordered[cause].running).append(wait)
    return ordered


def _causes(ordered: Sequence[Silence], since: float, until: float) -> tuple[int, int | None]:
    """How many processes, Redis left out, were faulted in the span, and the number of the fault it is told to."""
    before = [number for number, silence in enumerate(ordered) if silence.fault.at < until]
    within = [number for number in before if ordered[number].fault.at >= since]
    num_faulted = len({ordered[number].fault.process for number in within} - {"redis"})
    return num_faulted, within[0] if within else (before[-1] if before else None)


def _wait(since: float, until: float, known: Sequence[Told]) -> Wait:
    pieces = [piece for one in known for piece in one.recomputed]
    inside = sum(min(seconds, at - since) for at, seconds in pieces if since < at <= until + _LEDGER_SKEW_S)
    begun_again = [at for one in known[1:] for at in one.begun]
    recoveries = [*begun_again, *(at for one in known for at in one.recoveries)]
    is_recovery = any(since - _LEDGER_SKEW_S < at <= until + _LEDGER_SKEW_S for at in recoveries)
    return Wait(until - since, max(0.0, until - since - inside), is_recovery=is_recovery)


def quantile(values: Sequence[float], part: float) -> float:
    """The nearest rank; 0 of nothing."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))] if values else 0.0


def recovered(seen: Iterable[Silence], *kinds: str) -> list[float]:
    """Seconds that recovered streams waited after one fault of these kinds, their recompute time left out."""
    return [wait.net for one in seen if one.fault.kind in kinds for wait in one.recovered()]


_HEADER = """\
                         recovered streams' silence, s     without recompute time    any      first token   served
fault             count  number    p50    p99    max         p50    p99    max       max        p50    max   again"""


def table(seen: Sequence[Silence]) -> str:
    """By kind of fault; all figures but counts in seconds. Recovered streams are those another process took over; the

    last row has those that were hit by a second fault before their next token.
    """
    kinds = sorted({one.fault.kind for one in seen})
    compound = [wait for one in seen for wait in one.recovered(compound=True)]
    return "\n".join([_HEADER, *(_row(kind, seen) for kind in kinds), f"{'two at once':23}{_recovered(compound)}"])


def _row(kind: str, seen: Sequence[Silence]) -> str:
    faults = [one for one in seen if one.fault.kind == kind]
    longest = max((wait.seconds for one in faults for wait in one.running if not wait.is_compound), default=0.0)
    firsts = [wait.seconds for one in faults for wait in one.waiting]
    back = quantile([one.fault.served_at - one.fault.at for one in faults], 0.5)
    first = f"{quantile(firsts, 0.5):7.2f}{max(firsts, default=0.0):7.2f}"
    waits = [wait for one in faults for wait in one.recovered()]
    return f"{kind:18}{len(faults):5}{_recovered(waits)}   {longest:7.2f}    {first} {back:7.1f}"


def _recovered(waits: Sequence[Wait]) -> str:
    gross, net = _quantiles([wait.seconds for wait in waits]), _quantiles([wait.net for wait in waits])
    return f"{len(waits):8}{gross}     {net}"


def _quantiles(values: Sequence[float]) -> str:
    return "".join(f"{quantile(values, part):7.2f}" for part in (0.5, 0.99, 1.0))
