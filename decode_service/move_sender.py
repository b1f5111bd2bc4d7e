"""The sender of the blocks that leave with a move."""

from collections.abc import Callable, Sequence
from functools import partial

from decode_service.event_loop_post import EventLoopPost
from decode_service.ports import OnMoved
from isthmus.types import TransferTarget
from kv_transfer.outgoing import OutgoingTransfer, TransferOutcome
from kv_transfer.sender import Sender


class MoveSender:
    """`decode_service.ports.BlockSender` over a real sender, whose thread starts with the first move. Event loop only.

    What became of a transfer is heard in the event loop.
    """

    def __init__(self, open_sender: Callable[[], Sender], post: EventLoopPost):
        self._open_sender = open_sender
        self._post = post
        self._sender: Sender | None = None

    def open(
        self, target: TransferTarget, block_table: Sequence[int], on_done: OnMoved, *, request_id: str
    ) -> OutgoingTransfer:
        def done(outcome: TransferOutcome) -> None:
            self._post(partial(on_done, outcome))

        if self._sender is None:
            self._sender = self._open_sender()
        return self._sender.open(target, block_table, done, request_id=request_id)

    def close(self) -> None:
        """What moves stays."""
        if self._sender is not None:
            self._sender.close()
