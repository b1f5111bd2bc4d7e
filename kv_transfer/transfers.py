"""The receiving side of transfers as a pure state machine: what may be written, what is missing, what came too late.

It never touches memory or sockets and is not thread-safe: `receiver_core.ReceiverCore` owns it, and is called under its
driver's lock. A frame passes `check` before its checksum is computed, and `filled` after its rows were written: only
verified frames change state.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import inf

from isthmus.errors import Overloaded, StaleOwner
from isthmus.kv.layout import KvLayout
from isthmus.types import Extent, Place
from kv_transfer.coverage import Coverage, Interval, clipped, normalised
from kv_transfer.frames import BadFrame, FrameHeader, Refusal
from kv_transfer.messages import Commit
from kv_transfer.ownership.handoff import HandoffState, is_allowed

TOMBSTONE_S = 5.0  # beyond the fill deadline

UNRESERVED_FILL_S = 60.0  # fill time assumed for an id that is cancelled before it is reserved


@dataclass(frozen=True, slots=True)
class Reservation:
    transfer_id: str  # 32 hex digits
    attempt: int
    request_id: str
    block_table: tuple[int, ...]  # of the whole prompt, cached prefix included
    missing: tuple[Extent, ...]  # what must come; nothing else may be written
    deadline: float  # the moment at which the fill has failed
    open_from: int | None = None  # a stream moves: rows from here on must come only as far as its tokens reach

    def wanted(self, extents: tuple[Extent, ...], num_tokens: int) -> tuple[Extent, ...] | None:
        """Those of `extents` that decode needs to go on after so many tokens; None: it does not take so many."""
        if self.open_from is None:
            return extents if num_tokens == 1 else None
        return clipped(extents, self.open_from + num_tokens - 1) if num_tokens else None


@dataclass(slots=True)
class IncomingTransfer:
    """One reservation and what has come of it. Written by IncomingTransfers only."""

    reservation: Reservation
    attempt: int
    coverage: Coverage
    expected: tuple[Extent, ...]  # what this attempt may bring, normalised
    state: HandoffState = HandoffState.RESERVED
    sender: bytes | None = None  # incarnation, known from the first verified frame of the attempt
    commit: Commit | None = None
    is_abandoned: bool = False  # by the sender of this attempt
    num_bytes: int = 0  # of rows written

    @property
    def transfer_id(self) -> str:
        return self.reservation.transfer_id

    @property
    def request_id(self) -> str:
        return self.reservation.request_id

    @property
    def is_covered(self) -> bool:
        """Every row is there that the commit rests on; before the commit, that may be written."""
        if self.commit is None or self.coverage.is_complete:
            return self.coverage.is_complete
        return not self.reservation.wanted(self.coverage.missing_required(), len(self.commit.tokens))


@dataclass(frozen=True, slots=True)
class StateChange:
    transfer: IncomingTransfer
    previous: HandoffState | None  # None: just reserved
    cause: str = ""


@dataclass(frozen=True, slots=True)
class Accept:
    """The frame may be acted on; `gaps` are the positions of `place` to write.

    There are none for a duplicate, after the claim, and for advisory rows of another size than ours: such a frame is
    acknowledged and changes nothing.
    """

    transfer: IncomingTransfer
    place: Place
    gaps: tuple[Interval, ...]


@dataclass(eq=False, slots=True)
class IncomingTransfers:
    """Live transfers and tombstones, both bounded. `on_change` hears every state change, in order.

    Written by `receiver_core.ReceiverCore` only.
    """

    layout: KvLayout
    on_change: Callable[[StateChange], None]
    max_transfers: int = 1024
    max_tombstones: int = 8192
    _transfers: dict[str, IncomingTransfer] = field(default_factory=dict[str, IncomingTransfer], init=False)
    # transfer id -> the moment at which it is forgotten
    _tombstones: OrderedDict[str, float] = field(default_factory=OrderedDict[str, float], init=False)
    _next_due: float = field(default=inf, init=False)  # nothing expires before

    def __len__(self) -> int:
        return len(self._transfers)

    def __iter__(self) -> Iterator[IncomingTransfer]:
        return iter(self._transfers.values())

    def reserve(self, reservation: Reservation) -> None:
        """Raises StaleOwner for a live or ended id, Overloaded at the bound, ValueError for bad extents."""
        transfer_id = reservation.transfer_id
        if transfer_id in self._transfers or transfer_id in self._tombstones:
            raise StaleOwner(f"transfer {transfer_id} was reserved or cancelled before")
        if len(self._transfers) >= self.max_transfers:
            raise Overloaded(f"{self.max_transfers} transfers are open")
        self._check_extents(reservation)
        coverage = Coverage(self.layout, reservation.missing)
        transfer = IncomingTransfer(reservation, reservation.attempt, coverage, coverage.missing())
        self._transfers[transfer_id] = transfer
        self._next_due = min(self._next_due, reservation.deadline)
        self.on_change(StateChange(transfer, None))

    def check(self, header: FrameHeader) -> IncomingTransfer:
        """What a FILL, COMMIT or ABORT frame is about, if its sender may speak of that now. Changes nothing.

        Raises BadFrame, as `check_fill`, `filled` and `committed` do.
        """
        transfer = self._transfers.get(header.transfer_id)
        if transfer is None:
            raise BadFrame(Refusal.LATE if header.transfer_id in self._tombstones else Refusal.UNKNOWN_TRANSFER)
        if header.attempt != transfer.attempt:
            raise BadFrame(Refusal.OLD_ATTEMPT if header.attempt < transfer.attempt else Refusal.FUTURE_ATTEMPT)
        if transfer.is_abandoned:
            raise BadFrame(Refusal.LATE)
        if transfer.sender is not None and header.sender != transfer.sender:
            raise BadFrame(Refusal.WRONG_SENDER)
        return transfer

    def check_fill(self, header: FrameHeader) -> Accept:
        """Everything about a FILL frame that can be known before its checksum. Changes nothing."""
        transfer = self.check(header)
        interval = (header.first_token, header.end_token)
        try:
            place = (self.layout.name_of(header.plane), header.layer)
        except KeyError as error:
            raise BadFrame(Refusal.OUT_OF_RANGE) from error
        if not transfer.coverage.grants(place, interval):
            raise BadFrame(Refusal.OUT_OF_RANGE)
        plane = self.layout.plane(place[0])
        has_our_size = header.body_bytes == header.num_tokens * plane.row_bytes
        if not has_our_size and not plane.advisory:
            raise BadFrame(Refusal.BAD_BODY)
        if not has_our_size or transfer.state is HandoffState.CLAIMED:
            return Accept(transfer, place, ())
        return Accept(transfer, place, tuple(transfer.coverage.gaps(place, interval)))

    def filled(self, header: FrameHeader) -> Accept:
        """The frame's gaps were written.

        The transfer may have been cancelled since `check_fill`: then this raises BadFrame, and nothing changes.
        """
        accept = self.check_fill(header)
        if not accept.gaps:
            return accept
        transfer = accept.transfer
        row_bytes = self.layout.plane(accept.place[0]).row_bytes
        self._begin_filling(transfer, header)
        transfer.num_bytes += sum(end - first for first, end in accept.gaps) * row_bytes
        transfer.coverage.cover(accept.place, (header.first_token, header.end_token))
        self._claim_if_complete(transfer)
        return accept

    def committed(self, header: FrameHeader, commit: Commit) -> bool:
        """The commit came; it waits for the rows. A second one changes nothing. True if all was claimed before."""
        transfer = self.check(header)
        had_claimed = transfer.state is HandoffState.CLAIMED
        expected = self.layout.required(transfer.expected)
        if normalised(self.layout, commit.extents) != transfer.reservation.wanted(expected, len(commit.tokens)):
            raise BadFrame(Refusal.WRONG_EXTENTS)
        if transfer.commit is None:
            self._begin_filling(transfer, header)
            transfer.commit = commit
            self._claim_if_complete(transfer)
        return had_claimed

    def abort(self, transfer_id: str, cause: str, now: float) -> IncomingTransfer | None:
        """Ends an unclaimed transfer. An id never seen gets a tombstone; a claimed one is left alone."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            self._bury(transfer_id, now + UNRESERVED_FILL_S)
        elif transfer.state is not HandoffState.CLAIMED:
            self._end(transfer, HandoffState.ABORTED, cause, now)
            return transfer
        return None

    def abandon(self, transfer_id: str) -> IncomingTransfer | None:
        """The sender gave up: nothing comes any more and what came stays, for `rearm`. None if it is not filling."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.state is HandoffState.CLAIMED:
            return None
        transfer.is_abandoned = True
        return transfer

    def release(self, transfer_id: str, now: float) -> IncomingTransfer | None:
        """The claimed transfer's request ended and its blocks go back. None if it is not claimed."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.state is not HandoffState.CLAIMED:
            return None
        self._end(transfer, HandoffState.RELEASED, "", now)
        return transfer

    def rearm(self, transfer_id: str, attempt: int, deadline: float) -> tuple[Extent, ...]:
        """Raises the transfer's attempt number: frames with a lower one are refused from now on.

        Returns what the new attempt must bring. Raises StaleOwner if nothing may fill it.
        """
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.state is HandoffState.CLAIMED:
            raise StaleOwner(f"transfer {transfer_id} is not being filled")
        if attempt <= transfer.attempt:
            raise StaleOwner(f"attempt {attempt} is not above {transfer.attempt}")
        previous = transfer.state
        transfer.reservation = replace(transfer.reservation, deadline=deadline)
        transfer.attempt = attempt
        transfer.sender = None
        transfer.commit = None
        transfer.is_abandoned = False
        self._next_due = min(self._next_due, deadline)
        transfer.expected = transfer.coverage.missing()
        self.on_change(StateChange(transfer, previous, "rearmed"))
        return transfer.expected

    def expire(self, now: float) -> list[IncomingTransfer]:
        """Aborts what missed its fill deadline and returns it; forgets old tombstones."""
        if now < self._next_due:
            return []
        failed = [transfer for transfer in self._filling() if transfer.reservation.deadline <= now]
        for transfer in failed:
            self._end(transfer, HandoffState.ABORTED, "fill_deadline", now)
        for transfer_id in [buried for buried, until in self._tombstones.items() if until <= now]:
            del self._tombstones[transfer_id]
        deadlines = [transfer.reservation.deadline for transfer in self._filling()]
        self._next_due = min([*deadlines, *self._tombstones.values()], default=inf)
        return failed

    @property
    def next_due(self) -> float | None:
        """When `expire` is worth calling; None: not before something else has happened."""
        return None if self._next_due == inf else self._next_due

    def _check_extents(self, reservation: Reservation) -> None:
        capacity = len(reservation.block_table) * self.layout.block_size
        places = set(self.layout.places)
        for extent in reservation.missing:
            if extent.place not in places:
                raise ValueError(f"{extent}: the layout has no such plane or layer")
            if not 0 <= extent.first_token < extent.end <= capacity:
                raise ValueError(f"{extent}: the block table holds {capacity} tokens")

    def _begin_filling(self, transfer: IncomingTransfer, header: FrameHeader) -> None:
        transfer.sender = header.sender
        if transfer.state is HandoffState.RESERVED:
            self._move(transfer, HandoffState.FILLING, "")

    def _claim_if_complete(self, transfer: IncomingTransfer) -> None:
        if transfer.commit is not None and transfer.is_covered:
            self._move(transfer, HandoffState.CLAIMED, "")

    def _filling(self) -> list[IncomingTransfer]:
        """Those that have a deadline yet to keep."""
        return [transfer for transfer in self._transfers.values() if transfer.state is not HandoffState.CLAIMED]

    def _end(self, transfer: IncomingTransfer, state: HandoffState, cause: str, now: float) -> None:
        del self._transfers[transfer.transfer_id]
        self._bury(transfer.transfer_id, max(transfer.reservation.deadline, now))
        self._move(transfer, state, cause)

    def _move(self, transfer: IncomingTransfer, state: HandoffState, cause: str) -> None:
        previous = transfer.state
        assert is_allowed(previous, state), f"{previous.value} cannot become {state.value}"
        transfer.state = state
        self.on_change(StateChange(transfer, previous, cause))

    def _bury(self, transfer_id: str, deadline: float) -> None:
        """Late frames of the id are known as such until TOMBSTONE_S after the deadline; at the bound the oldest go."""
        self._tombstones.setdefault(transfer_id, deadline + TOMBSTONE_S)
        self._next_due = min(self._next_due, deadline + TOMBSTONE_S)
        while len(self._tombstones) > self.max_tombstones:
            self._tombstones.popitem(last=False)
