"""The checker itself: each known bug, seeded into a good history, is caught; the good history passes."""

from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from tests.chaos.faults import Injected
from tests.chaos.history import Oracle, Record, violations
from tests.chaos.ledgers import Told
from tests.chaos.silence import Wait, silences

NUM_TOKENS = 20


def good() -> Record:
    record = Record("spec", began_at=100.0, deadline_s=10.0, request_ids=["request"])
    for index in range(NUM_TOKENS):
        token = SimpleNamespace(id=1000 + index, logprob=-0.1 * index, top_logprobs=[(7, -0.5), (8, -1.5)])
        record.hear(index, [token], f"{index} ", 101.0 + 0.1 * index)
    record.end("length", 103.0, "end")
    return record


def replaced(record: Record, position: int, **changes: object) -> None:
    kept = record.tokens[position]
    fields = asdict(kept)
    record.tokens[position] = type(kept)(**{**fields, **changes})


def lost(record: Record) -> None:
    del record.tokens[5]


def lost_at_the_end(record: Record) -> None:
    del record.tokens[-1]


def repeated(record: Record) -> None:
    record.tokens.insert(6, record.tokens[5])


def shifted(record: Record) -> None:
    """A repeat that renumbers what follows: only the content tells."""
    for index in range(NUM_TOKENS - 1, 5, -1):
        replaced(record, index, token_id=record.tokens[index - 1].token_id)


def wrong_token(record: Record) -> None:
    replaced(record, 9, token_id=1)


def other_bits(record: Record) -> None:
    """One unit in the last place of one logprob."""
    flipped = bytes.fromhex(record.tokens[9].bits)
    replaced(record, 9, bits=(bytes([flipped[0] ^ 1]) + flipped[1:]).hex())


def beyond_the_end(record: Record) -> None:
    record.tokens.append(record.tokens[-1])
    replaced(record, NUM_TOKENS, index=NUM_TOKENS)


def hung(record: Record) -> None:
    record.ends.clear()


def ended_twice(record: Record) -> None:
    record.end("length", 103.0)


def failed(record: Record) -> None:
    record.ends.clear()
    record.end("error: WorkerLost", 103.0)


def token_after_the_end(record: Record) -> None:
    replaced(record, NUM_TOKENS - 1, at=104.0)


def late(record: Record) -> None:
    record.ends.clear()
    record.end("length", 111.5)


def other_text(record: Record) -> None:
    record.text = record.text.replace("3 ", "3 3 ", 1)


BUGS = {
    "lost": [lost, lost_at_the_end],
    "repeated": [repeated],
    "wrong": [wrong_token, other_bits, shifted, beyond_the_end, other_text],
    "hung": [hung],
    "ended": [ended_twice, failed],
    "a token after the end": [token_after_the_end],
    "late": [late],
}


def test_a_good_history_passes() -> None:
    assert violations([good()], {"spec": Oracle.of(good())}) == []


@pytest.mark.parametrize(("word", "bug"), [(word, bug) for word, bugs in BUGS.items() for bug in bugs])
def test_a_seeded_bug_is_caught(word: str, bug: Callable[[Record], None]) -> None:
    record = good()
    bug(record)
    found = violations([good(), record], {"spec": Oracle.of(good())})
    assert found
    assert all(line.startswith("request (spec): ") for line in found)
    assert any(f": {word}" in line for line in found), found


def injected(at: float, kind: str = "kill decode") -> Injected:
    return Injected(kind, "decode-0", at, at + 1)


def with_arrivals(*times: float, began_at: float = 100.0) -> Record:
    record = Record("spec", began_at, 10.0, request_ids=["request"])
    for index, at in enumerate(times):
        record.hear(index, [SimpleNamespace(id=1, logprob=None, top_logprobs=[])], "", at)
    return record


def seconds(waits: list[Wait]) -> list[object]:
    return [pytest.approx(wait.seconds) for wait in waits]


def test_silence_counts_from_the_fault_to_the_next_token() -> None:
    (one,) = silences([with_arrivals(101.0, 101.5, 104.0, 104.1)], [injected(102.0)], {})
    assert seconds(one.running) == [2.0]
    assert seconds(one.waiting) == []


def test_a_later_gap_belongs_to_the_fault_before_it_and_the_longest_counts() -> None:
    faults = [injected(102.0), injected(107.0, "freeze")]
    one, other = silences([with_arrivals(101.0, 103.0, 106.5, 106.6)], faults, {})
    assert seconds(one.running) == [3.5]
    assert seconds(other.running) == []


def test_a_gap_over_two_faults_belongs_to_the_first() -> None:
    first, second = silences([with_arrivals(101.0, 105.0, 105.5)], [injected(102.0), injected(103.0)], {})
    assert seconds(first.running) == [3.0]
    assert seconds(second.running) == [0.5]


def test_a_stream_without_a_token_waits() -> None:
    (one,) = silences([with_arrivals(104.0, 104.1)], [injected(102.0)], {})
    assert seconds(one.waiting) == [2.0]
    assert seconds(one.running) == [0.1]


def test_what_was_recomputed_meanwhile_is_told_apart() -> None:
    told = {
        "request": Told(recomputed=[(101.0, 0.5), (102.1, 0.5), (103.0, 0.7), (105.0, 0.5)]),
        "other": Told(recomputed=[(103.0, 1.0)]),
    }
    (one,) = silences([with_arrivals(101.0, 101.5, 104.0)], [injected(102.0)], told)
    (wait,) = one.running
    assert wait.seconds == pytest.approx(2.0)
    assert wait.net == pytest.approx(2.0 - 0.1 - 0.7)  # of the second piece a tenth came after the fault


def test_a_stream_is_recovered_when_another_process_took_it_over_in_the_silence() -> None:
    told = {"request": Told(recoveries=[99.0, 103.0], begun=[100.0, 104.15])}
    taken, spared = silences(
        [with_arrivals(101.0, 104.0, 104.1, 104.2)], [injected(102.0), injected(104.15, "freeze")], told
    )
    assert [wait.seconds for wait in taken.recovered()] == [pytest.approx(2.0)]
    assert spared.running
    assert spared.recovered() == []


def test_what_two_faulted_processes_did_together_is_told_apart() -> None:
    told, second = {"request": Told(recoveries=[103.0])}, Injected("freeze router", "router-0", 103.0, 108.0)
    one, _ = silences([with_arrivals(101.0, 106.0)], [injected(102.0), second], told)
    assert one.recovered() == []
    assert [wait.seconds for wait in one.recovered(compound=True)] == [pytest.approx(4.0)]
