"""An engine for prefill loops without a model: a real block pool, tokens from `hash_model`, no time spent."""

from collections.abc import Callable, Sequence

from isthmus.kv.block_pool import BlockPool
from isthmus.kv.layout import KvLayout
from isthmus.kv.prefix import prefix_hashes, prefix_scope
from isthmus.steps import OnStored, PrefillChunk, SamplingInput, StepResult
from isthmus.testing.hash_model import FAKE_LAYOUT, NO_ROW, VOCAB_SIZE, next_token, row_after
from isthmus.types import Place, Token


class FakePrefillEngine:
    """A `PrefillEngine`, owned by the loop that drives it.

    A cached row is a number: the hash of its token and the row before it. So a step that would read a block of other
    content, or one that nobody filled, fails as the real one would go wrong.
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        layout: KvLayout = FAKE_LAYOUT,
        context_length: int = 4096,
        on_step: Callable[[Sequence[PrefillChunk]], None] = lambda _: None,
    ):
        """`on_step` is called as a step begins: a test counts steps there, lets time pass, or raises."""
        self.layout = layout
        self.pool = BlockPool(num_blocks, layout.block_size)
        self.context_length = context_length
        self.vocab_size = VOCAB_SIZE
        self.numerics_digest = "cd" * 16
        self.rows: dict[int, int] = {}  # by slot: block * block_size + offset
        self._scope_of: dict[str, bytes] = {}
        self._on_step = on_step

    def match_prompt(self, token_ids: Sequence[int], tenant: str) -> list[int]:
        return self.pool.match(self._hashes(token_ids, tenant))

    def publish_prompt(self, token_ids: Sequence[int], block_table: Sequence[int], tenant: str) -> None:
        for block, block_hash in zip(block_table, self._hashes(token_ids, tenant), strict=False):
            self.pool.publish(block, block_hash)

    def check_device(self) -> None:
        """Never lost."""

    def compute(
        self, chunks: Sequence[PrefillChunk], sampling: Sequence[SamplingInput], on_stored: OnStored
    ) -> list[StepResult]:
        """As `PrefillEngine` says; the rows are there before the first `on_stored`."""
        self._on_step(chunks)
        last_rows = [self._store(chunk) for chunk in chunks]
        for plane, layer in self._places_in_order():
            on_stored(plane, layer)
        ended = [row for row, chunk in zip(last_rows, chunks, strict=True) if chunk.needs_logits]
        return [self._sample(row, wanted) for row, wanted in zip(ended, sampling, strict=True)]

    def _store(self, chunk: PrefillChunk) -> int:
        """Returns the last row."""
        slots = [self._slot(chunk.block_table, position) for position in range(chunk.start, chunk.end)]
        row = NO_ROW if chunk.start == 0 else self.rows[self._slot(chunk.block_table, chunk.start - 1)]
        for slot, token_id in zip(slots, chunk.token_ids, strict=True):
            row = row_after(row, token_id)
            self.rows[slot] = row
        return row

    def _sample(self, last_row: int, wanted: SamplingInput) -> StepResult:
        expected = NO_ROW
        for token_id in wanted.request.prompt_token_ids:
            expected = row_after(expected, token_id)
        assert last_row == expected, f"{wanted.request.request_id}: cached rows are not of this prompt"
        return Token(next_token(wanted.request, wanted.token_ids))

    def _slot(self, block_table: Sequence[int], position: int) -> int:
        block, offset = divmod(position, self.layout.block_size)
        return block_table[block] * self.layout.block_size + offset

    def _places_in_order(self) -> list[Place]:
        """As a model stores them: layer by layer."""
        num_layers = max(plane.num_layers for plane in self.layout.planes)
        return [
            (plane.name, layer)
            for layer in range(num_layers)
            for plane in self.layout.planes
            if layer < plane.num_layers
        ]

    def _hashes(self, token_ids: Sequence[int], tenant: str) -> list[bytes]:
        scope = self._scope_of.setdefault(tenant, prefix_scope(self.layout.fingerprint, tenant=tenant))
        return prefix_hashes(token_ids, self.layout.block_size, scope)
