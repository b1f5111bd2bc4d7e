"""The round trip that readiness rests on."""

import pytest

from isthmus.errors import TransferIncomplete
from kv_transfer import selftest
from kv_transfer.pool_memory import PoolMemory
from tests.kv_transfer.world import LAYOUT


def test_a_round_trip_moves_two_blocks_of_everything() -> None:
    trip = selftest.round_trip(LAYOUT)
    assert trip.num_bytes == 2 * LAYOUT.block_bytes
    assert 0 < trip.seconds < 5


def test_wrong_bytes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PoolMemory, "write_rows", lambda *_: None)
    with pytest.raises(TransferIncomplete, match="other bytes"):
        selftest.round_trip(LAYOUT)


def test_a_transfer_that_does_not_end_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kv_transfer.outgoing.OutgoingTransfer.commit", lambda *_: None)
    with pytest.raises(TransferIncomplete, match="nothing came"):
        selftest.round_trip(LAYOUT, timeout_s=0.3)
