"""Questions on one image: what things are and are called, and what is written where.

`NAMES` stands for MMMU among the paper's benchmarks, knowledge of many subjects asked by pictures; `READING` for
TextVQA.
"""

from __future__ import annotations

from random import Random

from recipes.data.pictures.frames import PALE, Chart, Frame, Line
from recipes.data.pictures.question import COLORS, Group, Question, color, either, listed, page, still
from recipes.data.pictures.shelf import Shelf

LANDS = ((214, 200, 160), (200, 200, 200), (180, 210, 170), (235, 215, 190))
MARKS = ((200, 20, 30), (30, 60, 210), (20, 130, 40), (150, 40, 150))

CORNERS = {
    "top left": (0.27, 0.2),
    "top right": (0.73, 0.2),
    "bottom left": (0.27, 0.8),
    "bottom right": (0.73, 0.8),
}
"""Middles of the corners of a frame."""

WORD, NUMBER = "What does it say?", "What number is this?"
UPPER_LOWER = "What does the upper line say?", "What does the lower line say?"


def _name(shelf: Shelf, draw: Random, frames: int) -> Question:
    things = [n for c, names in shelf.categories.items() if c != "flag" for n in names if n in shelf.known]
    name = draw.choice(things)
    return Question("What is this?", name, (still(shelf, shelf.picture(name, draw), draw),))


def _category(shelf: Shelf, draw: Random, frames: int) -> Question:
    category = draw.choice(sorted(shelf.categories))
    picture = shelf.picture(draw.choice(shelf.categories[category]), draw)
    question = f"What kind of thing is this: {listed(sorted(shelf.categories))}?"
    return Question(question, category, (still(shelf, picture, draw),), len(shelf.categories))


def _which(shelf: Shelf, draw: Random, frames: int) -> Question:
    category = draw.choice([c for c in sorted(shelf.categories) if len(shelf.categories[c]) > 1])
    names = shelf.categories[category]
    pool = [n for n in names if n in shelf.new]
    if len(pool) < 2 or draw.random() < 0.5:
        pool = [n for n in names if n in shelf.known]
    pool = pool if len(pool) > 1 else names
    answer, other = draw.sample(pool, 2)
    first, second = either(draw, answer, other)
    frame = still(shelf, shelf.picture(answer, draw), draw)
    return Question(f"Which is this: {first} or {second}?", answer, (frame,), 2)


def _flag(shelf: Shelf, draw: Random, frames: int) -> Question:
    country = draw.choice([name for name in shelf.categories["flag"] if name in shelf.known])
    frame = still(shelf, shelf.picture(country, draw), draw)
    return Question("Whose flag is this?", country, (frame,))


def _capital(shelf: Shelf, draw: Random, frames: int) -> Question:
    country = draw.choice(list(shelf.capitals))
    frame = still(shelf, shelf.picture(country, draw), draw)
    return Question("What is the capital of the country with this flag?", shelf.capitals[country], (frame,))


def _chart(draw: Random, number: int, region: int) -> Frame:
    return Frame((Chart(number, region, draw.choice(LANDS), draw.choice(MARKS)),), draw.choice(PALE))


def _country(shelf: Shelf, draw: Random, frames: int) -> Question:
    number, region = draw.choice(shelf.countries)
    return Question(
        "Which country does this map show?", shelf.pack.maps[number].country, (_chart(draw, number, region),)
    )


def _region(shelf: Shelf, draw: Random, frames: int) -> Question:
    part = draw.choice(sorted(shelf.charts))
    frame = _chart(draw, *draw.choice(shelf.charts[part]))
    question = "Where on the map is the marked region: north, south, east or west?"
    return Question(question, part, (frame,), 4)


NAMES: Group = {
    "name": _name,
    "category": _category,
    "which": _which,
    "flag": _flag,
    "capital": _capital,
    "country": _country,
    "region": _region,
}


def _line(shelf: Shelf, draw: Random, text: str, x: float, y: float, sizes: tuple[float, float]) -> Line:
    return Line(text, draw.choice(shelf.fonts), color(draw), x, y, round(draw.uniform(*sizes), 3))


def _word(shelf: Shelf, draw: Random, frames: int) -> Question:
    word = draw.choice(shelf.words)
    line = _line(shelf, draw, word, 0.5, draw.choice((0.3, 0.5, 0.7)), (0.2, 0.32))
    return Question(WORD, word, (page(draw, [line]),))


def _number(shelf: Shelf, draw: Random, frames: int) -> Question:
    digits = draw.randint(1, 4)
    number = str(draw.randrange(10 ** (digits - 1), 10**digits))
    line = _line(shelf, draw, number, 0.5, draw.choice((0.3, 0.5, 0.7)), (0.22, 0.36))
    return Question(NUMBER, number, (page(draw, [line]),))


def _upper_or_lower(shelf: Shelf, draw: Random, frames: int) -> Question:
    words = draw.sample(shelf.words, 2)
    lines = [_line(shelf, draw, word, 0.5, y, (0.18, 0.28)) for word, y in zip(words, (0.27, 0.73))]
    which = draw.randrange(2)
    return Question(UPPER_LOWER[which], words[which], (page(draw, lines),))


def _where(shelf: Shelf, draw: Random, frames: int) -> Question:
    corner = draw.choice(list(CORNERS))
    word = draw.choice([word for word in shelf.words if len(word) <= 4] or shelf.words)
    line = _line(shelf, draw, word, *CORNERS[corner], (0.14, 0.18))
    question = f"In which corner is the word: {listed(list(CORNERS))}?"
    return Question(question, corner, (page(draw, [line]),), len(CORNERS))


def _which_color(word: str) -> str:
    return f"What color is the word {word}?"


def _color(shelf: Shelf, draw: Random, frames: int) -> Question:
    words, names = draw.sample(shelf.words, 2), draw.sample(list(COLORS), 2)
    lines = [
        _line(shelf, draw, word, 0.5, y, (0.2, 0.28))._replace(color=COLORS[name])
        for word, name, y in zip(words, names, (0.27, 0.73))
    ]
    which = draw.randrange(2)
    return Question(_which_color(words[which]), names[which], (page(draw, lines),), len(COLORS))


def _present(shelf: Shelf, draw: Random, frames: int) -> Question:
    word, other = draw.sample(shelf.words, 2)
    asked, answer = draw.choice(((word, "yes"), (other, "no")))
    line = _line(shelf, draw, word, 0.5, 0.5, (0.2, 0.32))
    return Question(f"Does it say {asked}?", answer, (page(draw, [line]),), 2)


READING: Group = {
    "word": _word,
    "number": _number,
    "line": _upper_or_lower,
    "where": _where,
    "color": _color,
    "present": _present,
}


def further_reading(draw: Random, question: Question, count: int) -> tuple[tuple[str, str], ...]:
    """Ask more of a page, to train on: what else it says, then in which colors.

    A word that was told already, by a question or an answer, is not asked for.

    Returns:
        At most so many different questions, each with its answer.
    """
    lines = [thing for thing in question.frames[0].things if isinstance(thing, Line)]
    asks = UPPER_LOWER if len(lines) > 1 else (NUMBER if lines[0].text.isdigit() else WORD,)
    told = f"{question.question} {question.answer}".replace("?", "").split()
    read = {ask: line.text for ask, line in zip(asks, lines) if line.text not in told}
    names = {color: name for name, color in COLORS.items()}
    seen = {_which_color(line.text): names[line.color] for line in lines}
    asked = [
        (ask, answer)
        for some in (read, seen)
        for ask, answer in draw.sample(list(some.items()), len(some))
        if ask != question.question
    ]
    return tuple(asked[:count])
