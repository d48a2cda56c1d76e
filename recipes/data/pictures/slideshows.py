"""Questions on long slideshows, which only the whole of what was shown answers.

`SLIDESHOW` stands for LongVideoBench among the paper's benchmarks: what came when. `NEEDLE` stands for MLVU: finding
and counting single frames among many. Pictures may come again, those that are asked for only as often as it is right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from random import Random

from recipes.data.pictures.frames import PALE, Frame, Line, Sprite
from recipes.data.pictures.question import Group, Question, color, either, listed
from recipes.data.pictures.shelf import Shelf
from recipes.data.pictures.stills import CORNERS

MOST = 6
"""The largest count that is asked for."""

LISTED = 12
"""Pictures that are listed at once in training."""


def _slide(picture: int) -> Frame:
    """A picture as all slideshows show it, so that its patches are cut once."""
    return Frame((Sprite(picture),), PALE[picture % len(PALE)])


def _fill(shelf: Shelf, draw: Random, length: int, without: set[str]) -> list[int]:
    """Numbers of pictures, none of them of the names left out."""
    pictures = shelf.pack.pictures
    pool = [number for numbers in shelf.names.values() for number in numbers]
    chosen = draw.choices(pool, k=length)
    while wrong := [i for i, number in enumerate(chosen) if pictures[number].name in without]:
        for i in wrong:
            chosen[i] = draw.choice(pool)
    return chosen


def _name(shelf: Shelf, draw: Random, without: set[str] | None = None) -> str:
    """A trained name."""
    return draw.choice([name for name in shelf.known if name not in (without or ())])


def _show(question: str, answer: str, pictures: list[int], choices: int = 0) -> Question:
    return Question(question, answer, tuple(map(_slide, pictures)), choices, video=True)


def _after(shelf: Shelf, draw: Random, frames: int) -> Question:
    first = _name(shelf, draw)
    second = _name(shelf, draw, {first})
    shown = _fill(shelf, draw, frames, {first})
    place = draw.randrange(frames - 1)
    shown[place : place + 2] = [shelf.picture(first, draw), shelf.picture(second, draw)]
    return _show(f"What came right after the {first}?", second, shown)


def _end(shelf: Shelf, draw: Random, frames: int) -> Question:
    name, shown = _name(shelf, draw), _fill(shelf, draw, frames, set())
    word, place = draw.choice((("first", 0), ("last", -1)))
    shown[place] = shelf.picture(name, draw)
    return _show(f"What came {word}?", name, shown)


def _shown(shelf: Shelf, draw: Random, frames: int) -> Question:
    name, answer = _name(shelf, draw), draw.choice(("yes", "no"))
    shown = _fill(shelf, draw, frames, {name})
    if answer == "yes":
        shown[draw.randrange(frames)] = shelf.picture(name, draw)
    return _show(f"Was the {name} shown?", answer, shown, 2)


def _earlier(shelf: Shelf, draw: Random, frames: int) -> Question:
    first = _name(shelf, draw)
    second = _name(shelf, draw, {first})
    shown = _fill(shelf, draw, frames, {first, second})
    early, late = sorted(draw.sample(range(frames), 2))
    shown[early], shown[late] = shelf.picture(first, draw), shelf.picture(second, draw)
    one, other = either(draw, first, second)
    return _show(f"Which came earlier: {one} or {other}?", first, shown, 2)


SLIDESHOW: Group = {"after": _after, "end": _end, "shown": _shown, "earlier": _earlier}


def _count(shelf: Shelf, draw: Random, frames: int) -> Question:
    name, count = _name(shelf, draw), draw.randint(1, min(MOST, frames))
    shown = _fill(shelf, draw, frames, {name})
    for place in draw.sample(range(frames), count):
        shown[place] = shelf.picture(name, draw)
    return _show(f"How many times was the {name} shown?", str(count), shown, MOST)


def _corner(shelf: Shelf, draw: Random, frames: int) -> Question:
    name, corners = _name(shelf, draw), list(CORNERS)
    shown = _fill(shelf, draw, frames, {name})
    place, answer = draw.randrange(frames), draw.choice(corners)
    shown[place] = shelf.picture(name, draw)
    where = [corners[number // len(PALE) % len(corners)] for number in shown]
    where[place] = answer
    slides = [
        Frame((Sprite(number, *CORNERS[corner], 0.4),), PALE[number % len(PALE)])
        for number, corner in zip(shown, where)
    ]
    question = f"In which corner was the {name}: {listed(corners)}?"
    return Question(question, answer, tuple(slides), len(corners), video=True)


def _text(shelf: Shelf, draw: Random, frames: int) -> Question:
    word = draw.choice(shelf.words)
    slides = list(map(_slide, _fill(shelf, draw, frames, set())))
    line = Line(word, draw.choice(shelf.fonts), color(draw), size=round(draw.uniform(0.22, 0.3), 3))
    slides[draw.randrange(frames)] = Frame((line,), draw.choice(PALE))
    return Question("What word was shown?", word, tuple(slides), video=True)


NEEDLE: Group = {"count": _count, "corner": _corner, "text": _text}


def further(shelf: Shelf, draw: Random, frames: Sequence[Frame], count: int) -> tuple[tuple[str, str], ...]:
    """Ask more of a slideshow, to train on: to look at a long video costs as much for one question as for many.

    Lists of what was shown come first, for they name many frames at once; the others are questions that are judged by.

    Returns:
        At most so many different questions, each with its answer. All names in them are trained.
    """
    names = [_named(shelf, frame) for frame in frames]
    once = {name: names.index(name) for name, times in Counter(names).items() if name and times == 1}
    asked = dict(_lists(draw, names, once))
    others: dict[str, str] = {}
    for name in draw.sample(list(once), min(count, len(once))):
        other, place = draw.choice(list(once)), once[name] + 1
        if place < len(names) and (after := names[place]):
            others[f"What came right after the {name}?"] = after
        if other != name:
            others[f"Which came earlier: {name} or {other}?"] = min(name, other, key=lambda n: once[n])
    for name in [*draw.sample(list(once), min(1, len(once))), _name(shelf, draw), _name(shelf, draw)]:
        others[f"Was the {name} shown?"] = "yes" if name in names else "no"
        if 1 <= names.count(name) <= MOST:
            others[f"How many times was the {name} shown?"] = str(names.count(name))
    mixed = draw.sample(list(others.items()), len(others))
    return (*asked.items(), *mixed)[:count]


def _named(shelf: Shelf, frame: Frame) -> str | None:
    """The name of a frame's picture, if it is a trained one."""
    thing = frame.things[0]
    name = shelf.pack.pictures[thing.picture].name if isinstance(thing, Sprite) else None
    return name if name in shelf.known else None


def _lists(draw: Random, names: Sequence[str | None], once: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Ask for what was shown at the end, at the beginning, and after a picture, where all of it has a name."""
    size = draw.randint(2, min(LISTED, len(names) - 1))
    runs = {f"List the last {size}.": names[-size:], f"List the first {size}.": names[:size]}
    if inner := [name for name, place in once.items() if place + size < len(names)]:
        name = draw.choice(inner)
        runs[f"List the {size} after the {name}."] = names[once[name] + 1 : once[name] + 1 + size]
    for question, run in draw.sample(list(runs.items()), len(runs)):
        known = [name for name in run if name]
        if len(known) == len(run):
            yield question, ", ".join(known)
