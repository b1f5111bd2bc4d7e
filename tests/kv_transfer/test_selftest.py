"""The round trip that readiness rests on."""

import pytest

from isthmus.clock import SystemClock
from isthmus.errors import TransferIncomplete
from isthmus.ids import SystemIds
from isthmus.types import Place
from kv_transfer import selftest
from kv_transfer.pool_memory import PoolMemory
from tests.kv_transfer.world import LAYOUT


def test_a_round_trip_moves_two_blocks_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    written, write_rows = [], PoolMemory.write_rows

    def noted(memory: PoolMemory, place: Place, table: list[int], interval: tuple[int, int], body: bytes):
        written.append((interval[1] - interval[0]) * memory.row_bytes(place[0]))
        write_rows(memory, place, table, interval, body)

    monkeypatch.setattr(PoolMemory, "write_rows", noted)
    selftest.round_trip(LAYOUT, SystemClock(), SystemIds())
    assert sum(written) == 2 * LAYOUT.block_bytes


def test_wrong_bytes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PoolMemory, "write_rows", lambda *_: None)
    with pytest.raises(TransferIncomplete, match="other bytes"):
        selftest.round_trip(LAYOUT, SystemClock(), SystemIds())


def test_a_transfer_that_does_not_end_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kv_transfer.outgoing.OutgoingTransfer.commit", lambda *_: None)
    with pytest.raises(TransferIncomplete, match="nothing came"):
        selftest.round_trip(LAYOUT, SystemClock(), SystemIds(), timeout_s=0.3)
