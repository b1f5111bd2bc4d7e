"""Scores of an exported checkpoint on held-out data, each against its target."""

import itertools
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .answering import Answerer
from .checkpoint import read_network
from .corpus import Corpus, Prose
from .dialogues import Dialogues, memory
from .questions import Questions, addition, comparison, counting, is_held_out, listing, subtraction
from .rows import Rows, held_out_rows
from .stories import story
from .tokens import Turn, prompt_text
from .words import ANIMALS, NAMES, with_article

EVALUATION_SEED = 99
POSITION_BIN = 128
LONG_ROW = 1024
WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")


@dataclass(frozen=True, slots=True)
class Score:
    """One measured value; `target` is None where nothing was promised."""

    name: str
    value: float
    target: float | None
    higher_is_better: bool
    unit: str

    @property
    def passed(self) -> bool | None:
        """Whether the target is met, None without a target."""
        if self.target is None:
            return None
        return self.value >= self.target if self.higher_is_better else self.value <= self.target


def evaluate(folder: Path, corpus: Corpus, *, samples: int) -> list[Score]:
    """All scores of the checkpoint in `folder`; `samples` questions of each kind, fewer where answers are long."""
    answerer = Answerer(folder)
    return [
        *question_scores(answerer, corpus, samples),
        *repeat_scores(answerer, corpus, samples),
        *prose_scores(answerer, corpus, rows=max(8, samples // 4)),
        *writing_scores(answerer, corpus, samples=max(8, samples // 8)),
        *network_scores(folder, answerer, corpus),
    ]


def table(scores: Sequence[Score]) -> str:
    """The scores as a Markdown table."""
    lines = ["| measure | value | target | met |", "|---|---|---|---|"]
    for score in scores:
        bound = ">=" if score.higher_is_better else "<="
        target = "" if score.target is None else f"{bound} {_formatted(score.target, score.unit)}"
        met = {None: "", True: "yes", False: "**no**"}[score.passed]
        lines.append(f"| {score.name} | {_formatted(score.value, score.unit)} | {target} | {met} |")
    return "\n".join(lines)


def question_scores(answerer: Answerer, corpus: Corpus, samples: int) -> Iterator[Score]:
    """Greedy answers, exact to the last character and ended by the model."""
    questions = Questions(corpus.capitals)
    kinds: list[tuple[str, Callable[[random.Random], Turn], float | None]] = [
        ("two-digit sums, pairs never trained", lambda rng: addition(rng, held_out=True), 0.97),
        ("two-digit differences, pairs never trained", lambda rng: subtraction(rng, held_out=True), 0.97),
        ("larger or smaller, pairs never trained", lambda rng: comparison(rng, held_out=True), None),
        ("counting to a stated end, pairs never trained", lambda rng: counting(rng, held_out=True), 0.9),
        ("facts (trained)", questions.fact, None),
        ("lists: first, last, repeat, sort", listing, None),
    ]
    for name, draw, target in kinds:
        turns = distinct(draw, samples)
        prompts = [prompt_text([], turn.question) for turn in turns]
        yield _share(f"{name} ({len(turns)})", _exact(answerer, prompts, turns), target)
    yield from recall_scores(answerer, questions, samples)


def recall_scores(answerer: Answerer, questions: Questions, samples: int) -> Iterator[Score]:
    """Something told in an earlier turn, asked for directly and after up to three other questions."""
    rng = random.Random(EVALUATION_SEED)
    for name, most in (("recall in the next turn", 0), ("recall after 1-3 other turns", 3)):
        pairs = [memory(rng) for _ in range(samples)]
        between = [[questions.draw(rng) for _ in range(rng.randint(min(most, 1), most))] for _ in pairs]
        sessions = [([told, *more], asked) for (told, asked), more in zip(pairs, between, strict=True)]
        prompts = [prompt_text(earlier, asked.question) for earlier, asked in sessions]
        yield _share(f"{name} ({samples})", _exact(answerer, prompts, [asked for _, asked in sessions]), None)


def repeat_scores(answerer: Answerer, corpus: Corpus, samples: int) -> Iterator[Score]:
    """Texts to repeat: held-out prose, words and digits of 15 to 200 characters."""
    dialogues = Dialogues(Questions(corpus.capitals), Prose(answerer.tokenizer, corpus.held_out))
    kinds = {"prose": ["prose"], "words": ["words"], "digits and numbers": ["digits", "numbers"]}
    exact: list[bool] = []
    for name, group in kinds.items():
        rng = random.Random(EVALUATION_SEED)
        drawn = (dialogues.repeatable(rng, rng.choice(group), 600) for _ in itertools.count())
        texts = list(itertools.islice((text for text in drawn if is_held_out("r", text)), samples // 2))
        turns = [Turn(f"Repeat this: {text}", text) for text in texts]
        correct = _exact(answerer, [prompt_text([], turn.question) for turn in turns], turns)
        exact += correct
        yield _share(f"repeat {name}, never trained ({len(turns)})", correct, None)
    yield _share(f"repeat, all together ({len(exact)})", exact, 0.8)


def prose_scores(answerer: Answerer, corpus: Corpus, *, rows: int) -> Iterator[Score]:
    """Bits per character of held-out prose, and whether loss stays flat along a row of LONG_ROW tokens."""
    ids_BT = held_out_rows(answerer.tokenizer, corpus, rows, LONG_ROW + 1)
    losses_BT = torch.stack([token_losses(answerer.logits(row[None, :-1])[0], row[1:]) for row in ids_BT])
    characters = sum(len(answerer.tokenizer.decode(row)) for row in ids_BT[:, 1:].tolist())
    bins = [part.mean().item() for part in losses_BT.split(POSITION_BIN, 1)]
    worst = max(bins[at] / (sum(bins[:at]) / at) for at in range(1, len(bins)))
    yield Score("held-out prose", losses_BT.sum().item() / math.log(2) / characters, 1.45, False, "bits/char")
    yield Score("held-out prose", losses_BT.mean().item(), None, False, "nats/token")
    for index, loss in enumerate(bins):
        span = f"{index * POSITION_BIN}-{(index + 1) * POSITION_BIN - 1}"
        yield Score(f"held-out prose at positions {span}", loss, None, False, "nats/token")
    yield Score(f"worst {POSITION_BIN}-token bin over the mean of those before it", worst, 1.05, False, "ratio")


def writing_scores(answerer: Answerer, corpus: Corpus, *, samples: int) -> Iterator[Score]:
    """What it writes when sampled: known words, and stories that come to an end."""
    rng = random.Random(EVALUATION_SEED)
    heroes = [*map(with_article, ANIMALS), *(f"a child named {name}" for name in NAMES)]
    requests = [prompt_text([], f"Tell me a story about {hero}.") for hero in rng.choices(heroes, k=samples)]
    stories = answerer.sample(requests, 300, temperature=0.8)
    held_out = Prose(answerer.tokenizer, corpus.held_out)
    openings = ["<|bos|>" + " ".join(held_out.text(rng, 30, 60).split()[:5]) for _ in range(samples)]
    prose = answerer.sample(openings, 100, temperature=0.8)
    known = vocabulary(answerer, corpus)
    for name, answers in (("stories", stories), ("prose", prose), ("stories and prose", [*stories, *prose])):
        words = [word for answer in answers for word in words_of(_whole_words(answer.text))]
        target = 0.97 if name == "stories and prose" else None
        yield _share(f"known words in sampled {name}, T=0.8 ({len(words)})", [word in known for word in words], target)
    yield _share(f"sampled stories that end by themselves ({samples})", [story.ended for story in stories], None)


def network_scores(folder: Path, answerer: Answerer, corpus: Corpus) -> Iterator[Score]:
    """Agreement of the training network with transformers, and of the MTP layer with the main model."""
    network = read_network(folder)
    prose = held_out_rows(answerer.tokenizer, corpus, 8, 514)
    mixed = Rows(answerer.tokenizer, corpus._replace(train=corpus.held_out), EVALUATION_SEED).batch(1, 1.0)
    for name, ids_BT in (("held-out prose", prose), ("mixed rows", mixed)):
        with torch.no_grad():
            hidden = network(ids_BT[:, :-1])
            drafts = network.drafts(hidden[:, :-1], ids_BT[:, 1:-1])
            chosen = torch.nn.functional.linear(hidden[:, 1:], network.head).argmax(-1)
        yield _share(f"MTP draft is the main model's greedy token, {name}", (drafts == chosen).flatten().tolist(), None)
    with torch.no_grad():
        difference = (network.logits(prose[:2]) - answerer.logits(prose[:2])).abs().max().item()
    yield Score("largest logit difference, own network and transformers", difference, 1e-3, False, "logits")


def distinct(draw: Callable[[random.Random], Turn], count: int) -> list[Turn]:
    """Up to `count` turns with different questions; fewer where not that many exist."""
    rng = random.Random(EVALUATION_SEED)
    turns: dict[str, Turn] = {}
    for _ in range(20 * count):
        turn = draw(rng)
        turns.setdefault(turn.question, turn)
    return list(turns.values())[:count]


def token_losses(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each position in nats."""
    return torch.nn.functional.cross_entropy(logits_TV.float(), targets_T, reduction="none")


def vocabulary(answerer: Answerer, corpus: Corpus) -> set[str]:
    """Lower-case words of the training prose and of synthetic text."""
    known = {word for document in corpus.train for text in document.paragraphs for word in words_of(text)}
    rng = random.Random(EVALUATION_SEED)
    return known | {word for _ in range(3000) for word in words_of(story(rng))}


def words_of(text: str) -> list[str]:
    """Lower-case words of a text."""
    return WORD.findall(text.lower())


def _whole_words(text: str) -> str:
    """A sampled text without its last word, which the token limit may have cut."""
    return text.rsplit(" ", 1)[0]


def _exact(answerer: Answerer, prompts: Sequence[str], turns: Sequence[Turn]) -> list[bool]:
    longest = max(len(answerer.tokenizer.encode(turn.answer).ids) for turn in turns)
    answers = answerer.greedy(prompts, longest + 8)
    return [answer.ended and answer.text == turn.answer for answer, turn in zip(answers, turns, strict=True)]


def _share(name: str, hits: Sequence[bool], target: float | None) -> Score:
    return Score(name, sum(hits) / max(len(hits), 1), target, True, "share")


def _formatted(value: float, unit: str) -> str:
    if unit == "share":
        return f"{100 * value:.1f} %"
    return f"{value:.1e} {unit}" if unit == "logits" else f"{value:.3f} {unit}"
