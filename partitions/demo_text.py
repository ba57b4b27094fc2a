"""Generates everyday sentences for the demo corpus from a small grammar."""

from random import Random


def words(text: str) -> tuple[str, ...]:
    """Split a text at whitespace."""
    return tuple(text.split())


_PEOPLE = words("""
teacher farmer sailor baker doctor neighbour painter driver singer student nurse gardener writer
carpenter captain cousin uncle aunt grandmother brother sister mother father child friend stranger
visitor merchant soldier tailor fisherman shepherd librarian postman engineer musician
""")

_THINGS = words("""
table window basket letter candle bottle mirror blanket ladder hammer lantern kettle pillow carpet
bicycle wagon boat bridge fence garden chimney curtain cupboard drawer envelope feather guitar
violin trumpet drum jacket button ribbon saddle shovel bucket rope needle thread newspaper pencil
notebook map clock watch whistle umbrella suitcase parcel picture statue vase teapot spoon plate
""")

_ANIMALS = words("""
horse rabbit sparrow donkey kitten puppy goose rooster sheep cow fox squirrel hedgehog owl
butterfly spider frog turtle salmon pigeon beaver otter badger swan
""")

_PLACES = words("""
kitchen market village harbour station forest meadow valley river beach island mountain library
school theatre church castle hospital museum bakery orchard stable cottage cellar attic hallway
square road pasture lighthouse workshop factory office airport
""")

_FOODS = words("""
bread butter cheese honey soup porridge apples pears cherries plums carrots onions potatoes
mushrooms pancakes biscuits chocolate coffee milk lemonade pepper ginger walnuts almonds beans rice
""")

_ADJECTIVES = words("""
old young quiet noisy bright gloomy heavy light narrow broad gentle clever curious patient hungry
thirsty tired cheerful lonely famous ordinary strange familiar golden silver yellow purple orange
green blue scarlet wooden broken polished dusty empty frozen sunny windy foggy muddy thick thin
smooth rough precious cheap modern ancient
""")

_MOVES = words("""
walked hurried wandered climbed jumped travelled marched rode sailed crawled strolled raced drifted
returned escaped
""")

_DEEDS = words("""
carried found mended painted dropped borrowed bought sold polished measured noticed remembered
described cleaned covered lifted pushed pulled wrapped hid counted admired repaired brought chose
followed watched touched shook caught
""")

_SAYINGS = words("""
said thought believed explained whispered announced promised hoped wondered argued decided knew
""")

_MANNERS = words("""
slowly quickly carefully happily sadly suddenly quietly bravely gladly softly eagerly politely
gracefully nervously loudly seldom often always twice again together alone
""")

_TIMES = (
    "yesterday",
    "this morning",
    "last winter",
    "in the evening",
    "before sunrise",
    "after supper",
    "on Thursday",
    "at noon",
    "during the storm",
    "every summer",
    "in early autumn",
    "long ago",
    "at midnight",
    "a week later",
    "on Saturday",
    "by the end of June",
    "when the bell rang",
    "as the snow fell",
    "while it rained",
    "towards the end of the day",
)

_NUMBERS = words("""
two three four five six seven eight nine ten eleven twelve thirteen fifteen twenty thirty forty
fifty sixty seventy eighty ninety
""")

_NEARNESS = words("near behind beyond beside outside through across past around above")


def sentence(random: Random) -> str:
    """A random sentence of about 8 to 15 words, in lower case with a full stop."""
    shape = random.choice(_SHAPES)
    return f"{' '.join(words(shape(random)))}."


def transcript(sentences: list[str]) -> str:
    """Transcript of sentences in LibriSpeech's form: upper case, no punctuation."""
    text = " ".join(sentences).upper()
    return " ".join("".join(c if c.isalpha() or c == "'" else " " for c in text).split())


def _someone(random: Random) -> str:
    owner = random.choice(("the", "the", "my", "our", "her", "his", "every", "another"))
    described = random.choice(_ADJECTIVES) if random.random() < 0.6 else ""
    return f"{owner} {described} {random.choice(_PEOPLE + _ANIMALS)}"


def _something(random: Random) -> str:
    if random.random() < 0.25:
        return f"some {random.choice(_FOODS)}"
    owner = random.choice(("the", "the", "that", "this", "one", "their", "your"))
    return f"{owner} {random.choice(_ADJECTIVES)} {random.choice(_THINGS)}"


def _somewhere(random: Random) -> str:
    described = random.choice(_ADJECTIVES) if random.random() < 0.4 else ""
    return f"{random.choice(_NEARNESS)} the {described} {random.choice(_PLACES)}"


def _deed(random: Random) -> str:
    return (
        f"{_someone(random)} {random.choice(_DEEDS)} {_something(random)} {_somewhere(random)} "
        f"{random.choice(_TIMES)}"
    )


def _journey(random: Random) -> str:
    return (
        f"{random.choice(_TIMES)}, {_someone(random)} {random.choice(_MOVES)} "
        f"{random.choice(_MANNERS)} {_somewhere(random)}"
    )


def _opinion(random: Random) -> str:
    return (
        f"{_someone(random)} {random.choice(_SAYINGS)} that {_something(random)} was more "
        f"{random.choice(_ADJECTIVES)} than {_something(random)}"
    )


def _count(random: Random) -> str:
    return (
        f"there were {random.choice(_NUMBERS)} {random.choice(_ADJECTIVES)} "
        f"{random.choice(_THINGS)}s {_somewhere(random)}, and {_someone(random)} "
        f"{random.choice(_DEEDS)} them {random.choice(_MANNERS)}"
    )


def _pair(random: Random) -> str:
    return (
        f"{_someone(random)} {random.choice(_DEEDS)} {_something(random)}, but {_someone(random)} "
        f"{random.choice(_MOVES)} {_somewhere(random)}"
    )


_SHAPES = (_deed, _journey, _opinion, _count, _pair)
