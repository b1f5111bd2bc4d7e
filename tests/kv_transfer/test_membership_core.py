"""Who may serve beside whom, and what a worker says of itself: values in, values out."""

from dataclasses import replace

import pytest

from isthmus.kv.layout import KvLayout
from isthmus.process.admin import Identity
from isthmus.process.health import Health, ServiceState
from isthmus.v1 import admin_pb2
from kv_transfer.ownership.membership import (
    LOOK_AGAIN_S,
    NOT_REGISTERED,
    Joining,
    WorkerFacts,
    find_conflict,
    newest_blocks,
    worker_record,
)
from kv_transfer.ownership.store import MAX_BLOCK_HASHES, WorkerRecord
from tests.kv_transfer.test_ownership import D1, D2, WORKER
from tests.kv_transfer.world import LAYOUT

OTHER_LAYOUT = KvLayout(LAYOUT.model_digest, LAYOUT.planes, block_size=32)
SAME = replace(WORKER, incarnation=D2, name="decode-1")
DIFFERENT = replace(SAME, layout=OTHER_LAYOUT)
CONFLICT = "cache layout differs from that of decode-1: block_size: 16 != 32"


@pytest.mark.parametrize(
    ("others", "conflict"),
    [
        ([], None),
        ([SAME], None),
        ([SAME, DIFFERENT], CONFLICT),
        ([replace(DIFFERENT, serving=False)], None),
        ([replace(DIFFERENT, incarnation=D1)], None),
    ],
    ids=["alone", "alike", "different", "different and not serving", "its own old record"],
)
def test_the_layout_of_another_that_serves_is_a_conflict(others: list[WorkerRecord], conflict: str | None) -> None:
    assert find_conflict(LAYOUT, D1, others) == conflict


def test_a_worker_serves_once_it_is_registered() -> None:
    joining = Joining(LAYOUT, D1)
    verdict = joining.judge([], is_registered=False, now=10.0)
    assert (verdict.waits_for, verdict.is_news, joining.call_at) == (NOT_REGISTERED, True, 10.0 + LOOK_AGAIN_S)
    verdict = joining.judge([], is_registered=False, now=11.0)
    assert (verdict.waits_for, verdict.is_news) == (NOT_REGISTERED, False)
    verdict = joining.judge([WORKER, SAME], is_registered=True, now=12.0)
    assert (verdict.waits_for, joining.call_at) == (None, None)


def test_one_that_differs_waits_until_the_others_are_gone() -> None:
    joining = Joining(LAYOUT, D1)
    for is_registered in (False, True):
        verdict = joining.judge([WORKER, DIFFERENT], is_registered=is_registered, now=10.0)
        assert verdict.waits_for == CONFLICT
    assert joining.judge([WORKER], is_registered=True, now=11.0).waits_for is None


def test_a_store_that_does_not_answer_changes_no_verdict() -> None:
    joining = Joining(LAYOUT, D1)
    joining.judge([DIFFERENT], is_registered=True, now=10.0)
    joining.not_answered(20.0)
    assert joining.call_at == 20.0 + LOOK_AGAIN_S
    assert not joining.judge([DIFFERENT], is_registered=True, now=21.0).is_news


def facts(*, zmq_endpoint: str = "tcp://127.0.0.1:2") -> WorkerFacts:
    status = admin_pb2.GetStatusResponse(
        numerics_digest="abc", numerics_ingredients={"torch": "2.13"}, num_streams=3, num_queued=4
    )
    status.blocks.CopyFrom(admin_pb2.BlockCounts(total=10, free=8, cached=2, referenced=2, draining=1))
    return WorkerFacts(
        identity=Identity("decode-0", "decode", D1, "127.0.0.1:1", zmq_endpoint, "127.0.0.1:3"),
        pid=42,
        layout=LAYOUT,
        status=status,
        health=Health(ServiceState.IDLE, serving=True),
        seconds_since_progress=0.25,
    )


def test_a_record_says_who_where_and_how_loaded() -> None:
    assert worker_record(facts()) == WORKER
    assert worker_record(facts(zmq_endpoint="")).zmq_endpoint is None


def test_the_newest_blocks_are_shown_up_to_the_bound() -> None:
    hashes = [number.to_bytes(16) for number in range(MAX_BLOCK_HASHES + 2)]
    shown = newest_blocks(7, hashes)
    assert (shown.sequence, shown.hashes) == (7, hashes[2:])
