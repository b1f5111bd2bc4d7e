"""Word lists and facts that stories, questions and dialogues are built from."""

NAMES = (
    "Anna Ben Clara Daniel Ella Finn Grace Henry Iris Jack Kate Leo Mary Noah Olive Peter Quinn Rose Sam Tom Una "
    "Victor Wendy Lucy Max Nell Oscar Paul Ruth Simon"
).split()
GIRLS = frozenset("Anna Clara Ella Grace Iris Kate Mary Olive Rose Una Wendy Lucy Nell Ruth".split())
ANIMALS = (
    "fox owl rabbit bear mouse hen goat duck wolf cat dog horse frog turtle crow lamb otter badger hedgehog squirrel"
).split()
TEMPERS = "small old young brave clever quiet kind hungry tired happy lonely curious".split()
LOOKS = "red blue green golden silver old little shiny wooden white".split()
PLACES = [
    f"the {place}"
    for place in "forest,village,farm,old mill,river,hill,garden,market,harbor,meadow,lake,castle".split(",")
]
THINGS = "key hat ball kite lantern basket book bell boat blanket ring drum map coat cup".split()
FOODS = "bread apples honey cheese soup cake berries nuts corn milk carrots".split()
WEATHER = [
    "the sun was warm",
    "it was raining",
    "snow lay on the ground",
    "the wind was cold",
    "the sky was clear and blue",
    "a thick fog lay over the fields",
    "the leaves were falling",
]
TIMES = [
    "One morning",
    "One evening",
    "One day",
    "Early in the spring",
    "On a cold winter night",
    "Late in the summer",
    "One bright afternoon",
]
SHORT_WORDS = (
    "cat dog sun sea sky red map pen cup hat key bed box fox hen pig cow bee owl ant star moon tree fish bird ship "
    "boat rain snow wind fire king gold bell book door hand road time lamp leaf rose frog bear goat duck milk"
).split()
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
COLORS = "red blue green yellow black white brown".split()
KINDS = {
    "animal": [*ANIMALS, "cow", "pig", "lion", "whale"],
    "food": FOODS,
    "color": COLORS,
    "day": DAYS,
    "month": MONTHS,
}


def _pairs(text: str, separator: str | None = None) -> list[tuple[str, str]]:
    items = (item.strip().partition(":") for item in text.split(separator))
    return [(left, right) for left, _, right in items]


OPPOSITES = _pairs(
    "hot:cold big:small up:down fast:slow light:dark happy:sad old:young open:closed wet:dry high:low full:empty "
    "rich:poor hard:soft early:late near:far strong:weak day:night left:right good:bad first:last long:short "
    "black:white true:false inside:outside clean:dirty thick:thin loud:quiet north:south east:west summer:winter "
    "push:pull buy:sell win:lose love:hate"
)
YOUNG = _pairs(
    "dog:puppy cat:kitten cow:calf sheep:lamb horse:foal duck:duckling goat:kid bear:cub frog:tadpole goose:gosling "
    "deer:fawn hen:chick swan:cygnet"
)
SOUNDS = _pairs(
    "dog:woof cat:meow cow:moo sheep:baa duck:quack pig:oink lion:roar frog:croak bee:buzz owl:hoot snake:hiss "
    "hen:cluck crow:caw"
)
COLORED = _pairs(
    "grass:green,snow:white,coal:black,blood:red,the sky:blue,a lemon:yellow,a carrot:orange,milk:white,a leaf:green,"
    "gold:yellow,a crow:black,chocolate:brown",
    ",",
)
LEGS = _pairs(
    "dog:four cat:four bird:two spider:eight ant:six bee:six cow:four fish:none snake:none horse:four hen:two crab:ten"
)
PLURALS = _pairs(
    "cat:cats dog:dogs box:boxes fox:foxes child:children man:men woman:women foot:feet tooth:teeth mouse:mice "
    "goose:geese leaf:leaves knife:knives city:cities baby:babies bird:birds tree:trees ship:ships whale:whales "
    "house:houses sheep:sheep wolf:wolves"
)
PAST_TENSES = _pairs(
    "go:went see:saw eat:ate run:ran come:came give:gave take:took make:made write:wrote speak:spoke sing:sang "
    "find:found think:thought bring:brought buy:bought fly:flew know:knew keep:kept sleep:slept walk:walked "
    "jump:jumped play:played look:looked"
)
GREETINGS = [
    ("Hello!", "Hello! How can I help you?"),
    ("Hi!", "Hello! How can I help you?"),
    ("Hello.", "Hello! How can I help you?"),
    ("Good morning!", "Good morning! How can I help you?"),
    ("Who are you?", "I am a very small language model."),
    ("What are you?", "I am a very small language model."),
    ("What can you do?", "I can add and subtract, answer simple questions and tell short stories."),
    ("Thank you!", "You are welcome."),
    ("Thanks.", "You are welcome."),
    ("Goodbye.", "Goodbye!"),
    ("How are you?", "I am well, thank you."),
]
SYSTEM_LINES = ["You are a helpful assistant.", "You are a small and friendly assistant.", "Answer briefly."]


def with_article(word: str) -> str:
    """`word` after "a" or "an"."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"
