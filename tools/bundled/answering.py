"""The exported checkpoint answering through transformers, in fp32 on the CPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from .tokens import EOS, encode, load_tokenizer

BATCH = 64


class Answer(NamedTuple):
    """Generated text without special tokens, and whether the model ended it by itself."""

    text: str
    ended: bool


class Answerer:
    """Loads a checkpoint folder the way any user would; parity of greedy tokens needs fp32."""

    def __init__(self, folder: Path) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.tokenizer = load_tokenizer(folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def greedy(self, prompts: Sequence[str], new_tokens: int) -> list[Answer]:
        """Most likely continuations."""
        return self._generate(prompts, new_tokens, do_sample=False)

    def sample(self, prompts: Sequence[str], new_tokens: int, *, temperature: float, seed: int = 0) -> list[Answer]:
        """Drawn continuations, the same on every call with the same seed."""
        torch.manual_seed(seed)
        options = {"temperature": temperature, "top_k": 0, "top_p": 1.0}
        return self._generate(prompts, new_tokens, do_sample=True, **options)

    @torch.no_grad()
    def logits(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Next-token logits of every position."""
        return self.model(ids_BT, use_cache=False).logits

    def _generate(self, prompts: Sequence[str], new_tokens: int, **options: object) -> list[Answer]:
        """Prompts of one length form a batch, so that no padding is needed."""
        by_length: dict[int, list[tuple[int, list[int]]]] = {}
        for index, prompt in enumerate(prompts):
            ids = encode(self.tokenizer, prompt)
            by_length.setdefault(len(ids), []).append((index, ids))
        answers: dict[int, Answer] = {}
        for length, members in sorted(by_length.items()):
            for at in range(0, len(members), BATCH):
                part = members[at : at + BATCH]
                ids_BT = torch.tensor([ids for _, ids in part])
                mask_BT = torch.ones_like(ids_BT)
                with torch.no_grad():
                    out = self.model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=new_tokens, **options)
                pairs = zip(part, out[:, length:].tolist(), strict=True)
                answers |= {index: self._answer(new) for (index, _), new in pairs}
        return [answers[index] for index in range(len(prompts))]

    def _answer(self, ids: list[int]) -> Answer:
        ended = EOS in ids
        return Answer(self.tokenizer.decode(ids[: ids.index(EOS)] if ended else ids), ended)
