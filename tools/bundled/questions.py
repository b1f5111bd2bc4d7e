"""One-turn questions with checkable answers. A tenth of the operand pairs is held out by a hash and never trained."""

import hashlib
import random
from collections.abc import Callable, Sequence

from .tokens import Turn
from .words import (
    ANIMALS,
    COLORED,
    DAYS,
    GREETINGS,
    KINDS,
    LEGS,
    MONTHS,
    NUMBERS,
    OPPOSITES,
    PAST_TENSES,
    PLURALS,
    SHORT_WORDS,
    SOUNDS,
    THINGS,
    YOUNG,
    with_article,
)


def is_held_out(*key: object) -> bool:
    """Whether this item belongs to the held-out tenth."""
    return int(hashlib.md5("|".join(map(str, key)).encode()).hexdigest(), 16) % 10 == 0


class Questions:
    """Draws questions; `capitals` are (state, capital) pairs from the corpus."""

    def __init__(self, capitals: Sequence[tuple[str, str]]) -> None:
        self._capitals = list(capitals)
        self._kinds: list[Callable[[random.Random], Turn]] = [
            addition, subtraction, comparison, neighbour, counting, self.fact, listing, greeting,
        ]  # fmt: skip
        self._shares = [0.22, 0.26, 0.05, 0.02, 0.14, 0.24, 0.05, 0.02]

    def draw(self, rng: random.Random) -> Turn:
        """A question to train on."""
        return rng.choices(self._kinds, self._shares)[0](rng)

    def fact(self, rng: random.Random) -> Turn:
        """A question about the closed set of facts; all of them are trained."""
        families = [
            lambda: _calendar(rng),
            lambda: _calendar(rng),
            lambda: _opposite(rng),
            lambda: _animal(rng),
            lambda: _animal(rng),
            lambda: _color(rng),
            lambda: _word_form(rng),
            lambda: _spelling(rng),
            lambda: _kind_of(rng),
            lambda: self._capital(rng),
            lambda: self._capital(rng),
        ]
        return rng.choice(families)()

    def _capital(self, rng: random.Random) -> Turn:
        state, capital = rng.choice(self._capitals)
        if rng.random() < 0.5:
            return Turn(f"What is the capital of {state}?", f"The capital of {state} is {capital}.")
        return Turn(f"{capital} is the capital of which state?", f"{state}.")


def addition(rng: random.Random, *, held_out: bool = False) -> Turn:
    """A sum; held-out ones have two digits each."""
    a, b = _operands(rng, "+", held_out=held_out)
    wordings = [f"What is {a} + {b}?", f"What is {a} plus {b}?", f"{a} + {b} =", f"Add {a} and {b}."]
    return Turn(rng.choice(wordings), str(a + b))


def subtraction(rng: random.Random, *, held_out: bool = False) -> Turn:
    """A difference that is not negative."""
    a, b = _operands(rng, "-", held_out=held_out)
    wordings = [f"What is {a} - {b}?", f"What is {a} minus {b}?", f"{a} - {b} =", f"Subtract {b} from {a}."]
    return Turn(rng.choice(wordings), str(a - b))


def drill(rng: random.Random) -> str:
    """A plain list of sums and differences."""
    lines = []
    for _ in range(rng.randint(4, 14)):
        sign = rng.choice("+-")
        a, b = _operands(rng, sign, held_out=False)
        lines.append(f"{a} {sign} {b} = {a + b if sign == '+' else a - b}")
    return "<|bos|>" + "\n".join(lines) + "<|eos|>"


def _operands(rng: random.Random, sign: str, *, held_out: bool) -> tuple[int, int]:
    while True:
        two_digits = held_out or rng.random() < 0.85
        a, b = (rng.randint(10, 99), rng.randint(10, 99)) if two_digits else (rng.randint(0, 99), rng.randint(0, 20))
        if sign == "-" and a < b:
            a, b = b, a
        if is_held_out(sign, a, b) == held_out:
            return a, b


def comparison(rng: random.Random, *, held_out: bool = False) -> Turn:
    """Which of two numbers is larger or smaller."""
    while True:
        a = rng.randint(1, 99)
        b = rng.randint(1, 99)
        if a != b and is_held_out("c", a, b) == held_out:
            break
    if rng.random() < 0.5:
        return Turn(f"Which is larger, {a} or {b}?", str(max(a, b)))
    return Turn(f"Which is smaller, {a} or {b}?", str(min(a, b)))


def neighbour(rng: random.Random) -> Turn:
    """The number before or after another."""
    number = rng.randint(1, 98)
    if rng.random() < 0.5:
        return Turn(f"What number comes after {number}?", str(number + 1))
    return Turn(f"What number comes before {number}?", str(number - 1))


def counting(rng: random.Random, *, held_out: bool = False) -> Turn:
    """Counting up to a stated end, 29 at most; (start, steps) pairs are held out."""
    while True:
        start = rng.randint(1, 20)
        steps = rng.randint(2, 9)
        if is_held_out("n", start, steps) == held_out:
            break
    numbers = range(start, start + steps + 1)
    return Turn(f"Count from {start} to {start + steps}.", ", ".join(map(str, numbers)) + ".")


def listing(rng: random.Random) -> Turn:
    """First or last word of a list, a list repeated, or numbers sorted."""
    if rng.random() < 0.25:
        numbers = rng.sample(range(1, 100), rng.randint(3, 4))
        return Turn(f"Sort these numbers: {_joined(numbers)}.", f"{_joined(sorted(numbers))}.")
    words = rng.sample(SHORT_WORDS + ANIMALS + THINGS, rng.randint(3, 5))
    which = rng.choice(["first", "last", "repeat"])
    if which == "repeat":
        return Turn(f"Repeat this: {_joined(words)}.", f"{_joined(words)}.")
    answer = words[0] if which == "first" else words[-1]
    return Turn(f"List: {_joined(words)}. Which word is {which}?", f"{answer.capitalize()}.")


def greeting(rng: random.Random) -> Turn:
    """Small talk."""
    return Turn(*rng.choice(GREETINGS))


def _joined(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))


def _calendar(rng: random.Random) -> Turn:
    names, unit = rng.choice([(DAYS, "day"), (MONTHS, "month")])
    at = rng.randrange(len(names))
    if unit == "day" and rng.random() < 0.4:
        days = rng.randint(1, 6)
        plural = "s" if days > 1 else ""
        return Turn(f"What day is {NUMBERS[days]} day{plural} after {names[at]}?", f"{names[(at + days) % 7]}.")
    side, step = rng.choice([("after", 1), ("before", -1)])
    return Turn(f"What {unit} comes {side} {names[at]}?", f"{names[(at + step) % len(names)]}.")


def _opposite(rng: random.Random) -> Turn:
    word, answer = rng.sample(rng.choice(OPPOSITES), 2)
    wording = rng.choice(["What is the opposite of", "Give the opposite of"])
    mark = "?" if wording.startswith("What") else "."
    return Turn(f"{wording} {word}{mark}", f"{answer.capitalize()}.")


def _animal(rng: random.Random) -> Turn:
    family = rng.choice(["young", "sound", "legs"])
    if family == "young":
        animal, young = rng.choice(YOUNG)
        return Turn(f"What is a young {animal} called?", f"A young {animal} is called {with_article(young)}.")
    if family == "sound":
        animal, sound = rng.choice(SOUNDS)
        return Turn(f"What does {with_article(animal)} say?", f"{sound.capitalize()}.")
    animal, legs = rng.choice(LEGS)
    return Turn(f"How many legs does {with_article(animal)} have?", f"{legs.capitalize()}.")


def _color(rng: random.Random) -> Turn:
    thing, color = rng.choice(COLORED)
    return Turn(f"What color is {thing}?", f"{color.capitalize()}.")


def _word_form(rng: random.Random) -> Turn:
    pairs, form = rng.choice([(PLURALS, "plural"), (PAST_TENSES, "past tense")])
    word, answer = rng.choice(pairs)
    return Turn(f"What is the {form} of {word}?", f"{answer.capitalize()}.")


def _spelling(rng: random.Random) -> Turn:
    word = rng.choice(SHORT_WORDS)
    turns = [
        Turn(f"Spell the word {word}.", "-".join(word)),
        Turn(f"Spell the word {word} backwards.", "-".join(reversed(word))),
        Turn(f"How many letters are in the word {word}?", f"{NUMBERS[len(word)].capitalize()}."),
    ]
    return rng.choice(turns)


def _kind_of(rng: random.Random) -> Turn:
    kind = rng.choice(list(KINDS))
    word = rng.choice(KINDS[kind])
    asked = rng.choice([kind, rng.choice(list(KINDS))])
    yes_or_no = "Yes" if word in KINDS[asked] else "No"
    return Turn(f"Is {word} {with_article(asked)}?", f"{yes_or_no}, {word} is {with_article(kind)}.")
