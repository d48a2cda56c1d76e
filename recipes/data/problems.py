"""Generated texts with a question that only reading them answers: the kinds of problems of `recall`.

Each kind is a function of the words to write with, of the size in units (two or more passages, pairs, sentences
or words), of a random generator, and of how many questions are answered before. The question stands behind the
text, and the place of the answer is drawn evenly, so a longer text is a longer distance. Before it go other
questions on the same text with their answers, one at least, which shows the form of the reply: without it
SmolLM2-135M replies to most look-ups with a number. The reply begins with the words before the answer in the text:
to answer is to go on as the text did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from recipes.data.task import TaskError

PASSAGE = 8
"""Words of a passage to copy."""

MOST = 9
"""The largest count that is asked for."""

RELATIONS = (
    ("The flag of {} shows the", "What does the flag of {} show?"),
    ("The museum of {} is about the", "What is the museum of {} about?"),
    ("The street of {} is named after the", "What is the street of {} named after?"),
    ("The song of {} praises the", "What does the song of {} praise?"),
    ("The ship of {} is called the", "What is the ship of {} called?"),
    ("The tower of {} is shaped like the", "What is the tower of {} shaped like?"),
)
"""Sentences about a town, which a word completes, and the questions that ask for it."""

SENTENCES_PER_TOWN = 3

WORDS = """
acorn actor album almond anchor ankle antler apple apron arena arrow atlas attic autumn avenue axle bacon badge
bagel baker balcony ballet bamboo banana banjo barley barn barrel basin basket beacon beaver bell berry bicycle
bishop blanket blossom boat bonnet boot bottle boulder bracelet branch bread brick bridge bronze broom bucket buffalo
bugle butter button cabin cable cactus camel camera canal candle cannon canoe canyon carpet carrot castle cedar
cellar cement chain chair chalk cheese cherry chimney cider circus citrus clay cliff clock cloud clover coast cobalt
coconut coffee comet compass copper coral cotton cradle crane crater cricket crown crystal curtain cushion daisy
dancer desert diamond dinner dolphin donkey door dragon drum eagle echo elbow elephant ember engine envelope fabric
falcon farmer feather fence fern ferry fiddle field finger fire flame flute forest fork fossil fountain fox garden
garlic gate ghost ginger glacier glass globe glove goat gold goose granite grape grass guitar hammer harbor harp hawk
hazel helmet hill honey hood horse hotel hunter island ivory ivy jacket jar jasmine jelly jewel judge juice jungle
kettle king kitchen kite knight ladder lake lamp lantern leaf leather lemon lens lily linen lion lizard lobster magnet
mango maple marble market meadow medal melon mirror mitten monkey moon mosaic moss mountain mouse mushroom napkin
needle nest nickel noodle north nurse nutmeg oasis oat ocean olive onion opera orange orbit orchard orchid otter oven
owl oyster paddle palace panda paper parade parrot pasta peach peanut pearl pebble pencil pepper piano picnic pigeon
pillow pilot pine pirate planet plaza plum pocket poet pond poppy potato powder prairie prince pumpkin puppet quail
quartz queen quilt rabbit radio raft rain raven ribbon rice ridge ring river robin rocket rope rose ruby saddle sailor
salmon salt sand satin saturn scarf shadow shark sheep shell shovel silk silver slipper snow soap spider spoon spring
stable star statue stone storm straw sugar summit sunset swan table tailor teapot temple thimble thunder ticket tiger
timber tomato torch trumpet tulip tunnel turtle umbrella valley vanilla velvet village vine violin volcano wagon
walnut walrus whale wheat wheel whistle willow window winter wizard wolf wool yarn yogurt zebra zipper
"""
"""What the problems are written with unless a file is given: everyday nouns, none of them in a question."""


class TooFewWords(TaskError, ValueError):
    """The words do not give enough different keys for a text of the length wanted."""


class Problem(NamedTuple):
    """A question, with the text if it has one, the beginning of the reply, and what must follow: words alone."""

    question: str
    lead: str
    answer: str


def copy(words: Sequence[str], units: int, random: Random, answered: int = 1) -> Problem:
    """Go on with the one of ``units`` passages that begins with two words; :data:`PASSAGE` more follow."""
    passages = {start: " ".join(random.choices(words, k=PASSAGE)) for start in pairs(words, units, random)}
    text = "\n".join(f"{start} {passage}" for start, passage in passages.items())
    questions = [
        Problem(f"Repeat the passage that begins with {start}.", start, passages[start])
        for start in some(list(passages), answered, random)
    ]
    return posed(f"Here are passages, one a line.\n\n{text}", questions)


def lookup(words: Sequence[str], units: int, random: Random, answered: int = 1) -> Problem:
    """Give the value of one of ``units`` keys."""
    named, valued = parted(words, random)
    values = {key: random.choice(valued) for key in names(named, units, random)}
    text = "\n".join(f"{key}: {value}" for key, value in values.items())
    questions = [
        Problem(f"What is the value of the key {key}?", f"{key}:", values[key])
        for key in some(list(values), answered, random)
    ]
    return posed(f"Here are keys, each with its value.\n\n{text}", questions)


def document(words: Sequence[str], units: int, random: Random, answered: int = 1) -> Problem:
    """Answer from one of ``units`` sentences, among others on the same town and others of the same form."""
    named, valued = parted(words, random)
    facts = [
        Problem(question.format(town), start.format(town), random.choice(valued))
        for town in names(named, -(-units // SENTENCES_PER_TOWN), random)
        for start, question in random.sample(RELATIONS, SENTENCES_PER_TOWN)
    ][:units]
    random.shuffle(facts)
    text = " ".join(f"{fact.lead} {fact.answer}." for fact in facts)
    return posed(text, some(facts, answered, random))


def count(words: Sequence[str], units: int, random: Random, answered: int = 1) -> Problem:
    """Count how often a word, at least once and at most :data:`MOST` times, occurs among ``units`` words."""
    word = random.choice(words)
    times = random.randint(1, min(MOST, units - 1))
    others = random.choices([other for other in words if other != word], k=units - times)
    listed = [word] * times + others
    random.shuffle(listed)
    questions = [
        Problem(
            f"How many times does the word {counted} occur in the list?",
            f"The number of times that the word {counted} occurs is",
            str(listed.count(counted)),
        )
        for counted in (*random.choices(others, k=answered), word)
    ]
    return posed(f"Here is a list of words.\n\n{' '.join(listed)}", questions)


Made = TypeVar("Made")


def some(among: Sequence[Made], answered: int, random: Random) -> list[Made]:
    """Draw what the questions are about: the answered ones, as many as there are at most, and the one to ask."""
    return random.sample(among, min(answered + 1, len(among)))


def posed(text: str, questions: Sequence[Problem]) -> Problem:
    """Put a text, and all questions on it but the last with their answers, before the last question."""
    *answered, asked = questions
    shown = [f"{each.question}\n{each.lead} {each.answer}" for each in answered]
    return asked._replace(question="\n\n".join([text, *shown, asked.question]))


KINDS: Mapping[str, Callable[[Sequence[str], int, Random, int], Problem]] = MappingProxyType(
    {"copy": copy, "lookup": lookup, "document": document, "count": count}
)


def parted(words: Sequence[str], random: Random) -> tuple[list[str], list[str]]:
    """Part words at random: two thirds for what is asked about, one third for the answers."""
    drawn = random.sample(words, len(words))
    return drawn[len(words) // 3 :], drawn[: len(words) // 3]


def names(words: Sequence[str], number: int, random: Random) -> list[str]:
    """Draw distinct names: single words, and pairs of words for those beyond.

    Raises:
        TooFewWords: There are not so many.
    """
    made = random.sample(words, min(number, len(words)))
    made += pairs(words, number - len(made), random)
    random.shuffle(made)
    return made


def pairs(words: Sequence[str], number: int, random: Random) -> list[str]:
    """Make distinct keys of two different words; each word begins a key before one begins a second.

    Raises:
        TooFewWords: There are not so many.
    """
    most = len(words) * (len(words) - 1)
    if number > most:
        raise TooFewWords(
            f"a text of this length needs {number} different keys, and {len(words)} words give only {most} pairs: "
            "give more words or smaller lengths"
        )
    ring = random.sample(words, len(words))
    made = [f"{ring[i % len(ring)]} {ring[(i + 1 + i // len(ring)) % len(ring)]}" for i in range(number)]
    random.shuffle(made)
    return made
