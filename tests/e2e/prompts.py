"""Prompts of many lengths, from one token to several tiles, in the registers the bundled checkpoint knows."""

_PROSE = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness was "
    "upon the face of the deep. "
)
_ADDRESS = "Fellow citizens of the Senate and House of Representatives, the state of the Union is strong. "

TEXT_PROMPTS = [
    "O",
    "Call me Ishmael.",
    "And it came to pass",
    "The President of the United States",
    "What is 28 + 45?",
    "12 + 30 =",
    "Once upon a time there was a curious fox who lived near the forest.",
    "My fellow citizens,",
    "The whale",
    "And God said unto Moses,",
    _PROSE,
    _PROSE * 3,
    _ADDRESS,
    _ADDRESS * 4,
    "It was a dark and stormy night; the ship lay at anchor, and",
    "one two three four five six seven",
    "In the year 1850, the Congress",
    "She said that the little red boat was",
    _PROSE + _ADDRESS * 2,
    "Every day he went to the market to look for",
]
assert len(TEXT_PROMPTS) == 20
