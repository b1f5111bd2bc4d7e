"""What a decode worker tells the store of its handoffs and streams, as values, and how each is applied."""

from dataclasses import dataclass

from kv_transfer.ownership.store import HandoffRecord, OwnershipStore, Transition, TransitionResult


@dataclass(frozen=True, slots=True)
class BeginHandoff:
    """A handoff as its decode worker knows it: a new one, or one that is asserted again."""

    record: HandoffRecord
    ttl_s: float


@dataclass(frozen=True, slots=True)
class AdvanceHandoff:
    """A handoff has reached its next state, or its attempt was raised."""

    transition: Transition


@dataclass(frozen=True, slots=True)
class PutStream:
    """`decode` holds the stream: a router that looks for it finds it there."""

    request_id: str
    decode: str  # incarnation
    ttl_s: float


@dataclass(frozen=True, slots=True)
class DropStream:
    """`decode` holds the stream no longer."""

    request_id: str
    decode: str  # incarnation


@dataclass(frozen=True, slots=True)
class Restate:
    """No change by itself: when its turn comes, everything that is so now is reported anew."""


StoreChange = BeginHandoff | AdvanceHandoff | PutStream | DropStream
MirroredChange = StoreChange | Restate


async def apply(change: StoreChange, store: OwnershipStore) -> TransitionResult | None:
    """Makes the change in the store. Returns the answer to a handoff's change, None for the others.

    Raises StoreUnavailable when the store does not answer, StoreRefused when it cannot do this.
    """
    match change:
        case BeginHandoff(record, ttl_s):
            return await store.begin_handoff(record, ttl_s)
        case AdvanceHandoff(transition):
            return await store.advance_handoff(transition)
        case PutStream(request_id, decode, ttl_s):
            await store.streams.put(request_id, decode, ttl_s)
        case DropStream(request_id, decode):
            await store.streams.drop(request_id, decode)
    return None
