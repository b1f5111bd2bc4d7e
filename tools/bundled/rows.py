"""Training rows: documents of every kind packed one after the other, by their share of tokens."""

import random
from collections.abc import Callable, Iterator, Mapping

import torch
from tokenizers import Tokenizer

from .corpus import Corpus, Prose
from .dialogues import Dialogues
from .questions import Questions, drill
from .stories import story
from .tokens import ASSISTANT, BOS, USER, encode

TOKENS_PER_BATCH = 4096
ROW_LENGTHS = (1024, 512, 1024, 256, 512)  # of successive batches: 40 %, 40 % and 20 % of the tokens
QUESTION_WEIGHT = 0.2  # the model answers questions, it need not invent them
CHARACTERS_PER_TOKEN = 2.5
EARLY_SHARES = {
    "prose": 0.24, "story": 0.01, "story_request": 0.07, "session": 0.20, "recall": 0.08, "repeat": 0.38, "drill": 0.02,
}  # fmt: skip
LATE_SHARES = {
    "prose": 0.30, "story": 0.01, "story_request": 0.06, "session": 0.38, "recall": 0.05, "repeat": 0.17, "drill": 0.03,
}  # fmt: skip


def shares_at(progress: float) -> dict[str, float]:
    """Token shares: much repeating until copying has formed, then more prose."""
    late = min(max((progress - 0.42) / 0.18, 0.0), 1.0)
    return {kind: (1 - late) * EARLY_SHARES[kind] + late * LATE_SHARES[kind] for kind in EARLY_SHARES}


class Rows:
    """Draws batches; batch number `index` depends on the seed, the index and the shares, on nothing else."""

    def __init__(self, tokenizer: Tokenizer, corpus: Corpus, seed: int) -> None:
        self._tokenizer = tokenizer
        self._prose = Prose(tokenizer, corpus.train)
        dialogues = Dialogues(Questions(corpus.capitals), self._prose)
        self._seed = seed
        self._texts: dict[str, Callable[[random.Random, int], str]] = {
            "story": lambda rng, _: f"<|bos|>{story(rng)}<|eos|>",
            "story_request": dialogues.story_request,
            "session": dialogues.session,
            "recall": dialogues.recall,
            "repeat": dialogues.repeat,
            "drill": lambda rng, _: drill(rng),
        }

    def batch(self, index: int, progress: float) -> torch.Tensor:
        """Rows of one length, two tokens longer than the inputs: targets are one and two positions ahead."""
        rng = random.Random(f"{self._seed}/{index}")
        length = ROW_LENGTHS[index % len(ROW_LENGTHS)]
        shares = shares_at(progress)
        used = dict.fromkeys(EARLY_SHARES, 0)
        return torch.tensor([self._row(rng, length + 2, shares, used) for _ in range(TOKENS_PER_BATCH // length)])

    def _row(self, rng: random.Random, length: int, shares: Mapping[str, float], used: dict[str, int]) -> list[int]:
        row: list[int] = []
        while len(row) < length:
            total = sum(used.values()) + 1
            kind = max(shares, key=lambda name: shares[name] * (0.5 + rng.random()) - used[name] / total)
            document = self._document(rng, kind, length)[: length - len(row)]
            used[kind] += len(document)
            row += document
        return row

    def _document(self, rng: random.Random, kind: str, length: int) -> list[int]:
        if kind == "prose":
            return self._prose.passage(rng, length)
        return encode(self._tokenizer, self._texts[kind](rng, round(length * CHARACTERS_PER_TOKEN)))


def tokenizer_texts(corpus: Corpus, seed: int) -> Iterator[str]:
    """What a new tokenizer is trained on: the prose, two fifths of the addresses, stories and questions."""
    rng = random.Random(seed)
    questions = Questions(corpus.capitals)
    for document in corpus.train:
        if document.source != "sotu" or rng.random() < 0.4:
            yield from document.paragraphs
    yield from (story(rng) for _ in range(4000))
    yield from (text for _ in range(8000) for text in questions.draw(rng))


def held_out_rows(tokenizer: Tokenizer, corpus: Corpus, count: int, length: int) -> torch.Tensor:
    """Rows of nothing but passages from held-out documents, the same on every call."""
    prose = Prose(tokenizer, corpus.held_out)
    rng = random.Random(9)
    rows = []
    for _ in range(count):
        row: list[int] = []
        while len(row) < length:
            row += prose.passage(rng, length)
        rows.append(row[:length])
    return torch.tensor(rows)


def loss_weights(ids_BT: torch.Tensor) -> torch.Tensor:
    """QUESTION_WEIGHT for what stands between <|user|> and <|assistant|>, else 1."""
    user = ids_BT == USER
    assistant = ids_BT == ASSISTANT
    inside = _inside(user, assistant | (ids_BT == BOS))
    return torch.where(inside & ~user, QUESTION_WEIGHT, 1.0)


def _inside(opens: torch.Tensor, closes: torch.Tensor) -> torch.Tensor:
    """True from each opening to just before the next closing, along the last axis."""
    positions = torch.arange(1, opens.shape[-1] + 1, device=opens.device)
    last_open = (opens * positions).cummax(-1).values
    last_close = (closes * positions).cummax(-1).values
    return last_open > last_close
