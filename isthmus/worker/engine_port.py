"""What the two kinds of worker need of an engine. `isthmus.engine.engine.Engine` is one, a simulator brings another.

Nothing here reaches torch: step loops, streams and servers are written against these protocols.
"""

from collections.abc import Sequence
from typing import Protocol

from isthmus.kv.block_pool import BlockPool
from isthmus.kv.layout import KvLayout
from isthmus.steps import Decoder, OnStored, PrefillChunk, SamplingInput, StepResult


class WorkerEngine(Protocol):
    """The part that both kinds of worker use."""

    @property
    def layout(self) -> KvLayout: ...

    @property
    def pool(self) -> BlockPool: ...

    @property
    def context_length(self) -> int:
        """Positions of a prompt and its tokens, at most."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def numerics_digest(self) -> str:
        """Names the numerics class: workers with the same digest give the same bits. 32 hex digits."""
        ...

    def match_prompt(self, token_ids: Sequence[int], tenant: str) -> list[int]:
        """Blocks that hold the longest prefix cached for this tenant; the caller has a reference to each."""
        ...

    def publish_prompt(self, token_ids: Sequence[int], block_table: Sequence[int], tenant: str) -> None:
        """Full blocks of these prompt tokens become reusable by content, for this tenant's prompts alone."""
        ...

    def check_device(self) -> None:
        """Waits for what the calling thread launched. Raises when the device is lost: every later call fails too."""
        ...


class DecodeEngine(WorkerEngine, Protocol):
    """What a decode worker's streams and step loop use."""

    @property
    def decoder(self) -> Decoder: ...


class PrefillEngine(WorkerEngine, Protocol):
    """What a prefill worker's loop uses."""

    def compute(
        self, chunks: Sequence[PrefillChunk], sampling: Sequence[SamplingInput], on_stored: OnStored
    ) -> list[StepResult]:
        """Runs one step and samples the next token of each chunk with `needs_logits`, in the order of the chunks.

        `sampling` has one entry for each of those. A sequence has at most one chunk in a step. After each
        `on_stored(plane, layer)` the transfer path may read the step's rows of that place. What it raises ends the
        step, whose rows are then void. Called from the thread that owns the blocks.
        """
        ...
