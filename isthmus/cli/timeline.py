"""One request's events in the order of time, and what they say together. Nothing here asks anybody."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from isthmus.cli.table import table
from isthmus.process.admin import NOT_STORED, STORED_EVENT


@dataclass(frozen=True, slots=True)
class StoryEvent:
    """A line of a ledger, or of what a worker read in Redis when it was asked.

    `ms` counts from the request's first event anywhere.
    """

    ms: float
    process: str
    event: str
    attempt: int = 0
    transfer_id: str = ""
    cause: str = ""
    fields: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def detail(self) -> str:
        words = [f"{name}={value}" for name, value in sorted(self.fields.items())]
        return "; ".join(part for part in (self.cause, " ".join(words)) if part)


@dataclass(frozen=True, slots=True)
class RequestStory:
    """Events by time. `not_reached`: processes whose ledgers are missing. `names`: of processes, by incarnation."""

    request_id: str
    events: Sequence[StoryEvent]
    not_reached: Sequence[str] = ()
    names: Mapping[str, str] = field(default_factory=dict[str, str])

    def as_dict(self) -> dict[str, Any]:
        return {
            "request_id": self.request_id,
            "summary": self.summary(),
            "events": [asdict(event) for event in self.events],
            "not_reached": list(self.not_reached),
            "silent": self._silent(),
        }

    def summary(self) -> dict[str, Any]:
        """Spans in milliseconds; None where the events do not say."""
        outcome = self._outcome()
        return {
            "outcome": outcome.cause if outcome else None,
            "is_finished": bool(outcome and outcome.event == "request.finished"),
            "num_prompt_tokens": _number(self._first("request.accepted"), "num_prompt_tokens"),
            "num_tokens": _number(outcome, "num_tokens"),
            "num_cached_tokens": _number(self._first("prefill.started"), "cached"),
            "queue_ms": _span(self._first("request.accepted"), self._first("request.placed")),
            "prefill_ms": _span(self._first("prefill.started"), self._first("prefill.first_token")),
            "num_tiles": len(self._all("prefill.tile")),
            "transfers": self._transfers(),
            "stored": self._stored(),
            "claim_ms": _span(self._first("stream.reserved"), self._first("handoff.claimed")),
            "decode_ms": _span(self._first("stream.joined"), self._last("stream.ended")),
            "steps_waited": _number(self._first("stream.joined"), "steps_waited"),
            "attempts": self._attempts(),
            "refused": [_refusal(event) for event in self._all("placement.refused")],
        }

    def as_text(self) -> str:
        lines = [self._head(), *self._spans(), *self._tries(), *self._redis_now()]
        lines += [f"not reached: {name}" for name in self.not_reached]
        lines += [f"no events from {name}: restarted since, or too long ago" for name in self._silent()]
        header = ("ms", "process", "event", "attempt", "transfer", "detail")
        rows = [_row(one) for one in self.events]
        return "\n".join(lines) + "\n\n" + table(header, rows, right=(0, 3))

    def _head(self) -> str:
        said = self.summary()
        tokens = "" if said["num_tokens"] is None else f", {said['num_tokens']:g} tokens"
        prompt = "" if said["num_prompt_tokens"] is None else f" after a prompt of {said['num_prompt_tokens']:g}"
        ended = "running, or its end is not recorded"
        if said["outcome"]:
            ended = f"{'finished' if said['is_finished'] else 'failed'}: {said['outcome']}"
        return f"request {self.request_id}: {ended}{tokens}{prompt}"

    def _spans(self) -> list[str]:
        said = self.summary()
        cached = "" if said["num_cached_tokens"] is None else f", {said['num_cached_tokens']:g} prompt tokens cached"
        waited = "" if said["steps_waited"] is None else f", joined after {said['steps_waited']:g} steps"
        lines = [("queue", said["queue_ms"], "from accepted to placed")]
        lines += [("prefill", said["prefill_ms"], f"{said['num_tiles']} tiles{cached}")]
        for one in said["transfers"]:
            size = "" if one["bytes"] is None else f", {one['bytes']} bytes"
            way = f"{one['from']} > {one['to'] or '?'}, attempt {one['attempt']}{size}, {one['end']}"
            lines.append(("transfer", one["ms"], way))
        lines += [("claim", said["claim_ms"], "from reserved to claimed")]
        lines += [("decode", said["decode_ms"], f"from joined to ended{waited}")]
        return [f"  {name:<9}{ms:>12.3f} ms  {text}" for name, ms, text in lines if ms is not None]

    def _tries(self) -> list[str]:
        said = self.summary()
        lines = [f"{one['ms']:.0f} ms  {one['process']}  {one['what']}" for one in said["attempts"]]
        return lines + [
            f"refused by {one['worker']}: {one['reason']} {one['detail']}".rstrip() for one in said["refused"]
        ]

    def _attempts(self) -> list[dict[str, Any]]:
        """Where the request was placed and what became of that."""
        told: list[dict[str, Any]] = []
        for one in self.events:
            if (what := _try(one)) is not None:
                told.append({"ms": one.ms, "attempt": one.attempt, "process": one.process, "what": what})
        return told

    def _transfers(self) -> list[dict[str, Any]]:
        """From the first frame to the acknowledgement, of each attempt at each transfer."""
        told: list[dict[str, Any]] = []
        for sent in self._all("transfer.first_frame_sent"):
            key = (sent.transfer_id, sent.attempt)
            same = [one for one in self.events if (one.transfer_id, one.attempt) == key and one.ms >= sent.ms]
            end = next((one for one in same if one.event in ("transfer.acked", "transfer.failed")), None)
            claims = [one for one in self._all("handoff.claimed") if one.transfer_id == sent.transfer_id]
            placed = [one for one in self._all("request.placed") if one.transfer_id == sent.transfer_id]
            told.append(
                {
                    "transfer_id": sent.transfer_id,
                    "attempt": sent.attempt,
                    "from": sent.process,
                    "to": placed[0].fields.get("decode") if placed else None,
                    "ms": _span(sent, end),
                    "bytes": claims[0].fields.get("bytes") if claims else None,
                    "end": "not ended" if end is None else end.event.removeprefix("transfer.") + _because(end),
                }
            )
        return told

    def _stored(self) -> list[dict[str, Any]]:
        """The record of each transfer as Redis held it when the workers were asked; with a cause: what it lacked."""
        told: list[dict[str, Any]] = []
        for one in self._all(STORED_EVENT):
            decode = one.fields.get("decode", "")
            prefill = one.fields.get("prefill", "")
            told.append(
                {
                    "transfer_id": one.transfer_id,
                    "asked": one.process,
                    "state": one.fields.get("state"),
                    "attempt": one.attempt or None,
                    "decode": self.names.get(decode, decode) or None,
                    "prefill": self.names.get(prefill, prefill) or None,
                    "cause": one.cause,
                }
            )
        return told

    def _redis_now(self) -> list[str]:
        lines = [f"Redis now: transfer {one['transfer_id'][:8]}: {_record_in_words(one)}" for one in self._stored()]
        looked_up = {one.transfer_id for one in self._all(STORED_EVENT)}
        others = sorted({one.transfer_id for one in self.events} - looked_up - {""})
        return lines + [f"Redis now: transfer {name[:8]}: nobody who was reached could look" for name in others]

    def _outcome(self) -> StoryEvent | None:
        """Of the router that saw the end; another that lost the stream says `failed`."""
        ends = self._all("request.finished") or self._all("request.failed") or self._all("stream.ended")
        return ends[-1] if ends else None

    def _silent(self) -> list[str]:
        """Workers that took part, by the routers' words, and have nothing to say."""
        named = {one.fields[role] for one in self._all("request.placed") for role in _ROLES if role in one.fields}
        return sorted(named - {one.process for one in self.events} - {name.split(" ")[0] for name in self.not_reached})

    def _all(self, event: str) -> list[StoryEvent]:
        return [one for one in self.events if one.event == event]

    def _first(self, event: str) -> StoryEvent | None:
        return next(iter(self._all(event)), None)

    def _last(self, event: str) -> StoryEvent | None:
        return next(reversed(self._all(event)), None)


_ROLES = ("prefill", "decode")
_MAX_SHOWN = 120  # characters of a detail; --json has them all
# How a request went, in words: the event's fields fill the text.
_WORDS = {
    "request.placed": "placed: {prefill} > {decode}",
    "attempt.failed": "{failed} failed: {cause} {detail}",
    "request.rearmed": "rearmed: {num_missing_rows} rows missing",
    "request.moved": "moved from {worker} to {to}",
    "request.move_failed": "could not be moved: {cause}",
    "request.recovered": "decode has the stream again, {ms} ms later",
    "request.resumed": "resumed at token {index}",
    "stream.replayed": "replayed {num_tokens} tokens in {ms} ms",
    "request.failed": "given up by its router: {cause}",
}


class _Blank(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return ""


def _try(event: StoryEvent) -> str | None:
    words = _WORDS.get(event.event)
    if words is None:
        return None
    number = f"attempt {event.attempt} " if event.attempt else ""
    return number + words.format_map(_Blank(event.fields | {"cause": event.cause})).strip()


def _row(event: StoryEvent) -> tuple[str, ...]:
    attempt = str(event.attempt or "-")
    transfer = event.transfer_id[:8] or "-"
    return f"{event.ms:.3f}", event.process, event.event, attempt, transfer, _cut(event.detail)


def _record_in_words(stored: dict[str, Any]) -> str:
    if stored["cause"] == NOT_STORED:
        return "no record"
    if stored["cause"]:
        return f"{stored['asked']} could not look: {stored['cause']}"
    return f"{stored['state']}, attempt {stored['attempt']}, {stored['prefill']} > {stored['decode']}"


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def _because(event: StoryEvent) -> str:
    return f": {event.cause}" if event.cause else ""


def _refusal(event: StoryEvent) -> dict[str, str]:
    fields = event.fields
    return {
        "worker": fields.get("worker", "?"),
        "reason": event.cause or fields.get("reason", "?"),
        "detail": fields.get("detail", ""),
    }


def _number(event: StoryEvent | None, name: str) -> float | None:
    try:
        return float(event.fields[name]) if event is not None else None
    except (KeyError, ValueError):
        return None


def _span(first: StoryEvent | None, last: StoryEvent | None) -> float | None:
    return last.ms - first.ms if first is not None and last is not None and last.ms >= first.ms else None
