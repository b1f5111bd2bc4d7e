"""The way into a prefill loop: what a worker takes, and how much of it."""

from isthmus.errors import InvalidRequest, LayoutMismatch, Overloaded, StaleOwner
from isthmus.kv.layout import KvLayout
from isthmus.types import Request, TransferTarget
from isthmus.worker.engine_port import PrefillEngine
from isthmus.worker.step_thread import Post
from prefill_service.prefill_loop import PrefillLoop, SubmitPrompt
from prefill_service.prompt import Prompt

MAX_PROMPTS = 256


class Submissions:
    """Owned by the one thread that submits. Any thread may read `num_queued` and `num_draining_blocks`."""

    def __init__(self, engine: PrefillEngine, prefill_loop: PrefillLoop, post: Post[SubmitPrompt]):
        self._engine = engine
        self._prefill_loop = prefill_loop
        self._post = post
        self._num_submitted = 0

    def check(self, request: Request, target: TransferTarget | None) -> None:
        """Raises InvalidRequest, StaleOwner or LayoutMismatch for what this worker cannot compute or send."""
        num_prompt_tokens = len(request.prompt_token_ids)
        longest = self._engine.context_length - 1
        if not 1 <= num_prompt_tokens <= longest:
            raise InvalidRequest.of("prompt_token_ids", f"{num_prompt_tokens} tokens", f"1 to {longest}")
        if request.numerics_digest and request.numerics_digest != self._engine.numerics_digest:
            raise StaleOwner("the request belongs to another numerics class")
        if target is not None and target.layout_fingerprint != self._engine.layout.fingerprint:
            raise LayoutMismatch("the decode worker's cache layout differs from this worker's")

    def submit(self, prompt: Prompt) -> None:
        """The loop's from now on. Raises Overloaded at the bound."""
        if self.num_queued >= MAX_PROMPTS:
            raise Overloaded("this prefill worker has all the prompts it takes", retry_after_s=0.1)
        self._num_submitted += 1
        self._post(SubmitPrompt(prompt))

    @property
    def layout(self) -> KvLayout:
        return self._engine.layout

    @property
    def num_queued(self) -> int:
        """Prompts submitted and not ended."""
        return self._num_submitted - self._prefill_loop.num_ended

    @property
    def num_draining_blocks(self) -> int:
        """Blocks that a send still reads, also of prompts whose caller has gone."""
        return self._engine.pool.counts().draining
