"""Short stories put together from templates: six plots, every sentence in several wordings."""

import random
from dataclasses import dataclass

from .words import ANIMALS, FOODS, GIRLS, LOOKS, PLACES, TEMPERS, THINGS, TIMES, WEATHER, with_article


@dataclass(frozen=True, slots=True)
class _Cast:
    """Who and what one story is about. `Hero`-style capitals are given by `capital`."""

    hero: str
    hero_is_child: bool
    other: str
    he: str
    his: str
    him: str
    other_he: str
    home: str
    away: str
    thing: str
    look: str
    food: str
    temper: str
    other_temper: str
    opening: str  # "One day"
    opening_weather: str  # "One day, when it was raining"
    weather: str


def story(rng: random.Random, *, hero: str | None = None, other: str | None = None) -> str:
    """One story of about 130 tokens; a capitalised hero is a child, any other an animal."""
    cast = _draw_cast(rng, hero, other)
    plots = [_lost_thing, _hunger, _storm, _found_thing, _race, _journey]
    sentences = [_introduction(rng, cast), _habit(rng, cast), *rng.choice(plots)(rng, cast)]
    return " ".join(sentence for sentence in sentences if sentence)


def _draw_cast(rng: random.Random, hero: str | None, other: str | None) -> _Cast:
    hero = hero or rng.choice(ANIMALS)
    is_child = hero[0].isupper()
    female = hero in GIRLS if is_child else rng.random() < 0.5
    opening = rng.choice(TIMES)
    weather = rng.choice(WEATHER)
    home, away = rng.sample(PLACES, 2)
    temper, other_temper = rng.sample(TEMPERS, 2)
    return _Cast(
        hero=hero if is_child else f"the {hero}",
        hero_is_child=is_child,
        other=other or rng.choice([animal for animal in ANIMALS if animal != hero]),
        he="she" if female else "he",
        his="her" if female else "his",
        him="her" if female else "him",
        other_he="he" if female else "she",
        home=home,
        away=away,
        thing=rng.choice(THINGS),
        look=rng.choice(LOOKS),
        food=rng.choice(FOODS),
        temper=temper,
        other_temper=other_temper,
        opening=opening,
        opening_weather=f"{opening}, when {weather}",
        weather=weather,
    )


def capital(text: str) -> str:
    """`text` with its first letter in upper case."""
    return text[0].upper() + text[1:]


def _introduction(rng: random.Random, c: _Cast) -> str:
    someone = with_article(c.temper)
    if c.hero_is_child:
        return rng.choice(
            [
                f"Once upon a time there was a child named {c.hero} who lived near {c.home}.",
                f"{c.hero} was {someone} child who lived beside {c.home}.",
                f"There once lived a child called {c.hero} in a house by {c.home}.",
            ]
        )
    animal = c.hero.removeprefix("the ")
    return rng.choice(
        [
            f"Once upon a time there was {someone} {animal} who lived near {c.home}.",
            f"{capital(someone)} {animal} lived beside {c.home}.",
            f"Long ago, {someone} {animal} made a home by {c.home}.",
        ]
    )


def _habit(rng: random.Random, c: _Cast) -> str:
    return rng.choice(
        [
            f"Every day {c.he} went to {c.away} to look for {c.food}.",
            f"{capital(c.he)} loved {c.food} more than anything in the world.",
            f"{capital(c.he)} had many friends, but the best of them was {with_article(c.other_temper)} {c.other}.",
            f"{capital(c.he)} was {c.temper}, and everyone knew it.",
            "",
        ]
    )


def _lost_thing(rng: random.Random, c: _Cast) -> list[str]:
    pick = rng.choice
    other = f"the {c.other}"
    thing = f"{c.look} {c.thing}"
    searches = [
        f"{capital(c.he)} looked under the bed and behind the door, but it was not there.",
        f"{capital(c.he)} searched all the way to {c.away}, but could not find it.",
        f"{capital(c.he)} sat down and began to cry.",
    ]
    helps = [
        f'"I saw it near {c.away}," said {other}. "Come with me."',
        f'"Do not worry," said {other}. "We will look for it together."',
    ]
    morals = [
        "From that day on they were good friends.",
        "A friend who helps you is worth more than gold.",
        "After that, nothing was ever lost for long.",
    ]
    return [
        f"{c.opening_weather}, {c.hero} lost {c.his} {thing}.",
        pick(searches),
        f"Then {with_article(c.other_temper)} {c.other} came along the road.",
        pick([f'"Why are you sad?" asked {other}.', f'"What is the matter?" said {other}.']),
        pick([f'"I have lost my {thing}," said {c.hero}.', f'"My {c.thing} is gone," {c.hero} answered.']),
        pick(helps),
        f"So they walked to {c.away}, and there it was, lying in the grass.",
        pick(
            [
                f"{capital(c.hero)} was so glad that {c.he} gave {other} some {c.food}.",
                f"{capital(c.hero)} thanked {other}, and they shared some {c.food}.",
            ]
        ),
        pick(morals),
    ]


def _hunger(rng: random.Random, c: _Cast) -> list[str]:
    pick = rng.choice
    other = f"the {c.other}"
    offers = [
        f'"If you help me carry the basket home," said {other}, "you may have half."',
        f'"First help me with my work," said {other}, "and then we will eat."',
    ]
    morals = [
        "Work shared is work made light.",
        "And they never went hungry again.",
        "Bread tastes better when it is earned.",
    ]
    somebody = f"{with_article(c.other_temper)} {c.other}"
    return [
        f"{c.opening_weather}, {c.hero} was very hungry.",
        pick([f"There was no {c.food} left in the house.", f"{capital(c.he)} had eaten the last of the {c.food}."]),
        f"{capital(c.he)} walked to {c.away} and met {somebody} with a basket of {c.food}.",
        pick([f'"May I have some?" asked {c.hero}.', f'"Will you share with me?" {c.hero} asked.']),
        pick(offers),
        f"So {c.hero} worked until the sun went down.",
        pick(
            [
                "Then they sat by the fire and ate together.",
                f"That night they ate the {c.food} and told each other stories.",
            ]
        ),
        pick(morals),
    ]


def _storm(rng: random.Random, c: _Cast) -> list[str]:
    pick = rng.choice
    other = f"the {c.other}"
    helper = capital(with_article(c.other_temper))
    endings = [
        "When the sun came out again, they went home together.",
        "In the morning the storm was over and the birds were singing.",
    ]
    morals = [
        "It is good to have a friend in a storm.",
        "The brave are those who help when they are afraid.",
        f"{capital(c.hero)} never forgot that night.",
    ]
    return [
        f"{c.opening} a great storm came, and the water rose around {c.home}.",
        pick(
            [
                f"{capital(c.hero)} was afraid and hid under a tree.",
                f"{capital(c.hero)} climbed to the top of a rock and called for help.",
            ]
        ),
        f"{helper} {c.other} heard {c.him} and came with a little {c.look} boat.",
        pick([f'"Jump in!" cried {other}.', f'"Hold my hand," said {other}.']),
        f"{capital(c.hero)} jumped, and they went over the dark water to {c.away}.",
        pick(endings),
        pick(morals),
    ]


def _found_thing(rng: random.Random, c: _Cast) -> list[str]:
    pick = rng.choice
    other = f"the {c.other}"
    wonders = [
        f'"Whose {c.thing} is this?" {c.he} wondered.',
        f"{capital(c.he)} had never seen such a beautiful {c.thing} before.",
    ]
    searches = [
        f"{capital(c.he)} asked everyone in {c.home}, and at last an old woman smiled.",
        f"Then {c.he} met an old man who was looking for something.",
    ]
    morals = [
        "It is always better to be honest.",
        "An honest heart is a light in the dark.",
        "What we give back makes us rich.",
    ]
    return [
        f"{c.opening_weather}, {c.hero} found {with_article(c.look)} {c.thing} near {c.away}.",
        pick(wonders),
        f"{capital(c.he)} asked {other}, but {other} did not know.",
        pick(searches),
        f'"That {c.thing} is mine," said a soft voice. "Thank you for bringing it back to me."',
        pick(
            [
                f"As a reward {c.he} was given a basket of {c.food}.",
                f"{capital(c.hero)} was happy all the way home.",
            ]
        ),
        pick(morals),
    ]


def _race(rng: random.Random, c: _Cast) -> list[str]:
    pick = rng.choice
    other = f"the {c.other}"
    delays = [
        f"{capital(other)} ran quickly, but soon stopped to eat some {c.food} and fell asleep.",
        f"{capital(other)} was so proud that {c.other_he} stopped to sing a song.",
    ]
    endings = [
        f"When {other} woke up, {c.hero} was already at {c.away}.",
        f"At the end of the day {c.hero} had won the race.",
    ]
    morals = [
        "Slow and steady wins the race.",
        "Pride runs fast, but patience arrives first.",
        f"{capital(other)} laughed and said that {c.other_he} had learned a lesson.",
    ]
    return [
        f"{c.opening} {other} said that {c.other_he} could run faster than anyone near {c.home}.",
        f'"Then let us have a race to {c.away}," said {c.hero}.',
        f"They started when {c.weather}.",
        pick(delays),
        f"{capital(c.hero)} walked slowly and never stopped.",
        pick(endings),
        pick(morals),
    ]


def _journey(rng: random.Random, c: _Cast) -> list[str]:
    pick = rng.choice
    other = f"the {c.other}"
    answers = [
        f'"I am going to see the sea," said {c.hero}. "Come with me."',
        f'"To the sea," said {c.hero}. "It is a long way, but we can walk together."',
    ]
    arrivals = [
        "On the third day they saw the blue water and heard the waves.",
        "At last they came over a hill, and there was the sea.",
    ]
    morals = [
        "The best part of the road was the friend beside it.",
        "Then they went home and told everyone what they had seen.",
        "They were tired, but they were happy.",
    ]
    return [
        f"{c.opening_weather}, {c.hero} wanted to see the sea.",
        f"{capital(c.he)} put some {c.food} and {with_article(c.look)} {c.thing} in a bag and left {c.home}.",
        f"On the road {c.he} met {with_article(c.other_temper)} {c.other}.",
        pick([f'"Where are you going?" asked {other}.', f'"May I come with you?" asked {other}.']),
        pick(answers),
        f"They walked past {c.away} and slept under the stars.",
        pick(arrivals),
        pick([f"They sat on the sand and ate the {c.food}.", "They played in the waves until the evening."]),
        pick(morals),
    ]
