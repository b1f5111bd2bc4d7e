"""Logs, progress and metrics."""

import io
import json

from isthmus import log
from isthmus.metrics import RequestMetrics
from isthmus.process.health import HealthState, ProgressWatch, ServiceState
from isthmus.testing.manual_clock import ManualClock


def test_log_line_is_one_json_object_and_fields_do_not_replace_its_own():
    out = io.StringIO()
    log.configure("decode-0", "info", out)
    logger = log.get_logger("receive")
    logger.debug("hidden")
    logger.info("handoff.claimed", request_id="r", level="mine", text="two\nlines")
    try:
        raise ValueError("x")
    except ValueError as error:
        logger.exception("failed", error)
    first, second = (json.loads(line) for line in out.getvalue().splitlines())
    assert (first["event"], first["service"], first["request_id"], first["level"]) == (
        "handoff.claimed",
        "decode-0",
        "r",
        "info",
    )
    assert "ValueError: x" in second["traceback"]


def test_state_follows_work_stall_and_recovery():
    clock = ManualClock()
    health = HealthState(ProgressWatch(clock))
    assert health.snapshot().state is ServiceState.STARTING
    health.ready()
    assert (health.snapshot().state, health.snapshot().serving) == (ServiceState.IDLE, True)
    health.watch.begin_work()
    clock.advance(2.9)
    health.watch.begin_work()
    assert health.snapshot().state is ServiceState.STEPPING
    clock.advance(0.1)
    assert (health.snapshot().state, health.snapshot().serving) == (ServiceState.STALLED, False)
    health.watch.step_done()
    assert health.snapshot().state is ServiceState.STEPPING
    health.watch.idle()
    clock.advance(60)
    assert health.snapshot().state is ServiceState.IDLE
    assert health.watch.num_steps == 1


def test_a_long_step_is_no_stall_while_its_layers_finish():
    clock = ManualClock()
    health = HealthState(ProgressWatch(clock))
    health.ready()
    health.watch.begin_work()
    for _ in range(10):
        clock.advance(2.9)
        health.watch.layer_done()
    assert (health.snapshot().state, health.watch.num_steps) == (ServiceState.STEPPING, 0)
    clock.advance(3.0)
    assert health.snapshot().state is ServiceState.STALLED


def test_draining_is_for_good():
    health = HealthState(ProgressWatch(ManualClock()))
    health.drain()
    health.ready()
    health.not_ready("x")
    assert health.snapshot().state is ServiceState.DRAINING


def test_counters_carry_their_labels():
    metrics = RequestMetrics()
    metrics.tokens.labels(kind="cached").inc(3)
    assert metrics.counters() == {'isthmus_tokens_total{kind="cached"}': 3}
