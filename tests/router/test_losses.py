"""When a request is tried again, and when it has cost enough workers."""

import pytest

from isthmus.errors import RequestKillsWorkers, TransferIncomplete
from router.life.losses import MAX_FRUITLESS, Losses


def test_the_second_worker_lost_at_the_same_token_convicts_a_request_that_was_alone() -> None:
    losses = Losses()
    losses.note_worker_lost("decode", 7, has_others=True)
    with pytest.raises(RequestKillsWorkers, match="2 decode workers"):
        losses.note_worker_lost("decode", 7, has_others=False)


def test_who_was_lost_in_company_is_suspected_and_convicted_by_the_third() -> None:
    losses = Losses()
    losses.note_worker_lost("decode", 7, has_others=True)
    assert not losses.is_suspect
    losses.note_worker_lost("decode", 7, has_others=True)
    assert losses.is_suspect
    with pytest.raises(RequestKillsWorkers, match="3 decode workers"):
        losses.note_worker_lost("decode", 7, has_others=True)


def test_a_token_clears_every_suspicion() -> None:
    losses = Losses()
    for num_tokens in range(1, 20):
        losses.note_worker_lost("decode", num_tokens, has_others=True)
        losses.note_worker_lost("decode", num_tokens, has_others=True)
    losses.note_worker_lost("decode", 20, has_others=False)
    assert not losses.is_suspect


def test_losses_of_different_roles_are_different_points() -> None:
    losses = Losses()
    losses.note_worker_lost("prefill", 0, has_others=False)
    losses.note_worker_lost("decode", 0, has_others=False)


def test_attempts_without_a_token_are_bounded() -> None:
    losses, error = Losses(), TransferIncomplete("no")
    for num_tokens in (3, 4):
        for _ in range(MAX_FRUITLESS - 1):
            losses.note_failure(error, num_tokens)
    with pytest.raises(TransferIncomplete):
        losses.note_failure(error, 4)
