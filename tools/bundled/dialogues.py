"""Conversations: question sessions, recall of something said earlier, text to repeat, requests for a story."""

import random

from .corpus import Prose
from .questions import Questions, is_held_out
from .stories import story
from .tokens import Turn, chat_text
from .words import ANIMALS, COLORS, FOODS, NAMES, PLACES, SHORT_WORDS, SYSTEM_LINES, TEMPERS, THINGS, with_article

REPEAT_WORDINGS = ("Repeat this: ", "Repeat: ", "Say this: ", "Repeat this: ")
AGAIN_WORDINGS = ("Say it again.", "Again.", "Repeat it once more.")
REPEAT_KINDS = {"prose": 0.34, "shuffled": 0.34, "words": 0.12, "digits": 0.10, "numbers": 0.10}


class Dialogues:
    """Draws whole conversations as text; `characters` bounds how long the longest kinds may be."""

    def __init__(self, questions: Questions, prose: Prose) -> None:
        self._questions = questions
        self._prose = prose

    def session(self, rng: random.Random, characters: int) -> str:
        """One question, or several in a row."""
        turns = 1 if rng.random() < 0.55 else rng.randint(2, max(3, characters // 150))
        return _chat(rng, [self._questions.draw(rng) for _ in range(turns)])

    def recall(self, rng: random.Random, characters: int) -> str:
        """Something told first and asked for later: over turns, or behind prose in the same question."""
        told, asked = memory(rng)
        if rng.random() < 0.3:
            prose = self._prose.text(rng, 40, _skewed(rng, 60, characters))
            return _chat(rng, [Turn(f"{told.question} {prose} {asked.question}", asked.answer)])
        between = [self._questions.draw(rng) for _ in range(rng.choice((0, 0, 1, 1, 2, 3, characters // 200)))]
        return _chat(rng, [told, *between, asked])

    def repeat(self, rng: random.Random, characters: int) -> str:
        """Text to say again word for word, once or several times; held-out texts are left to the evaluation."""
        turns = []
        for _ in range(1 if rng.random() < 0.7 else rng.randint(2, 4)):
            (kind,) = rng.choices(list(REPEAT_KINDS), list(REPEAT_KINDS.values()))
            while is_held_out("r", text := self.repeatable(rng, kind, characters)):
                pass
            turns.append(Turn(rng.choice(REPEAT_WORDINGS) + text, text))
            turns += [Turn(rng.choice(AGAIN_WORDINGS), text) for _ in range(rng.choice((0, 0, 1, 2)))]
        return _chat(rng, turns)

    def repeatable(self, rng: random.Random, kind: str, characters: int) -> str:
        """A text of one of REPEAT_KINDS, of at most about `characters` characters."""
        size = _skewed(rng, 15, max(90, characters // 3))
        if kind == "digits":
            return "".join(rng.choice("0123456789") for _ in range(max(3, min(size // 6, 30))))
        if kind == "numbers":
            return ", ".join(str(rng.randint(0, 99)) for _ in range(max(3, size // 12)))
        if kind == "words":
            pools = (SHORT_WORDS, NAMES, ANIMALS, THINGS, TEMPERS, FOODS)
            separator = rng.choice((" ", ", "))
            return separator.join(rng.choice(rng.choice(pools)) for _ in range(max(3, size // 8)))
        text = self._prose.text(rng, size, size + 20)
        return text if kind == "prose" else " ".join(rng.sample(text.split(), len(text.split())))

    def story_request(self, rng: random.Random, characters: int) -> str:
        """A request for a story and the story."""
        hero, other = rng.sample(ANIMALS, 2)
        child = rng.choice(NAMES)
        verb = rng.choice(("Tell me a story", "Write a short story"))
        turns = [
            Turn(f"{verb} about {with_article(hero)}.", story(rng, hero=hero)),
            Turn(f"{verb} about {with_article(hero)} and {with_article(other)}.", story(rng, hero=hero, other=other)),
            Turn(f"{verb} about a child named {child}.", story(rng, hero=child)),
            Turn("Tell me a story.", story(rng)),
        ]
        before = [self._questions.draw(rng)] if rng.random() < 0.2 else []
        after = [self._questions.draw(rng)] if rng.random() < 0.2 else []
        return _chat(rng, [*before, rng.choice(turns), *after])


def memory(rng: random.Random) -> tuple[Turn, Turn]:
    """What is told, and the question that needs it."""
    name = rng.choice(NAMES)
    number = "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 5)))
    word = rng.choice(SHORT_WORDS + ANIMALS + THINGS)
    thing = rng.choice(THINGS)
    color = rng.choice(COLORS)
    place = rng.choice(PLACES)
    food = rng.choice(FOODS)
    noted = "I will remember it."
    pairs = [
        (Turn(f"My name is {name}.", f"Hello, {name}!"), Turn("What is my name?", f"Your name is {name}.")),
        (Turn(f"My name is {name}.", f"Hello, {name}!"), Turn("What is my name?", f"Your name is {name}.")),
        (Turn(f"Remember the number {number}.", noted), Turn("What was the number?", f"The number was {number}.")),
        (Turn(f"The number is {number}.", noted), Turn("What is the number?", f"The number is {number}.")),
        (Turn(f"The secret word is {word}.", noted), Turn("What is the secret word?", f"The secret word is {word}.")),
        (Turn(f"My {thing} is {color}.", noted), Turn(f"What color is my {thing}?", f"Your {thing} is {color}.")),
        (Turn(f"I live near {place}.", noted), Turn("Where do I live?", f"You live near {place}.")),
        (Turn(f"I like {food}.", noted), Turn("What do I like?", f"You like {food}.")),
    ]
    return rng.choice(pairs)


def _chat(rng: random.Random, turns: list[Turn]) -> str:
    return chat_text(turns, rng.choice(SYSTEM_LINES) if rng.random() < 0.12 else None)


def _skewed(rng: random.Random, low: int, high: int) -> int:
    """A length between the bounds, short ones more often."""
    return round(low * (max(high, low) / low) ** (rng.random() ** 1.3))
