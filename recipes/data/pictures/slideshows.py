"""Questions on long slideshows, which only the whole of what was shown answers.

`SLIDESHOW` stands for LongVideoBench among the paper's benchmarks: what came when. `NEEDLE` stands for MLVU: finding
and counting single frames among many. Pictures may come again, those that are asked for only as often as it is right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from random import Random

from recipes.data.pictures.frames import PALE, Frame, Line, Sprite
from recipes.data.pictures.question import COLORS, Group, Question, either, listed
from recipes.data.pictures.shelf import Shelf
from recipes.data.pictures.stills import CORNERS

MOST = 6
"""The largest count that is asked for."""

LISTED = 12
"""Pictures that are listed at once in training."""


def _slide(picture: int) -> Frame:
    """A picture as all slideshows show it, so that its patches are cut once."""
    return Frame((Sprite(picture),), PALE[picture % len(PALE)])


def _fill(
    shelf: Shelf, draw: Random, length: int, without: Collection[str], few: int | None = None
) -> list[int]:
    """Numbers of pictures, none of them of the names left out, and of so few different ones that they come again."""
    named = shelf.familiar | shelf.new
    pool = [number for name, numbers in named.items() if name not in without for number in numbers]
    return draw.choices(pool if few is None else draw.sample(pool, min(few, len(pool))), k=length)


def _name(shelf: Shelf, draw: Random, without: Collection[str] = ()) -> str:
    """A trained name."""
    return draw.choice([name for name in shelf.familiar if name not in without])


def _show(question: str, answer: str, pictures: list[int], choices: int = 0) -> Question:
    return Question(question, answer, tuple(map(_slide, pictures)), choices, video=True)


def _after(shelf: Shelf, draw: Random, frames: int) -> Question:
    first = _name(shelf, draw)
    second = _name(shelf, draw, {first})
    shown = _fill(shelf, draw, frames, {first})
    place = draw.randrange(frames - 1)
    shown[place : place + 2] = [draw.choice(shelf.familiar[n]) for n in (first, second)]
    return _show(f"What came right after the {first}?", second, shown)


def _end(shelf: Shelf, draw: Random, frames: int) -> Question:
    name, shown = _name(shelf, draw), _fill(shelf, draw, frames, ())
    word, place = draw.choice((("first", 0), ("last", -1)))
    shown[place] = draw.choice(shelf.familiar[name])
    return _show(f"What came {word}?", name, shown)


def _shown(shelf: Shelf, draw: Random, frames: int) -> Question:
    name, answer = _name(shelf, draw), draw.choice(("yes", "no"))
    shown = _fill(shelf, draw, frames, {name})
    if answer == "yes":
        shown[draw.randrange(frames)] = draw.choice(shelf.familiar[name])
    return _show(f"Was the {name} shown?", answer, shown, 2)


def _earlier(shelf: Shelf, draw: Random, frames: int) -> Question:
    first = _name(shelf, draw)
    second = _name(shelf, draw, {first})
    shown = _fill(shelf, draw, frames, {first, second})
    early, late = sorted(draw.sample(range(frames), 2))
    shown[early], shown[late] = (draw.choice(shelf.familiar[n]) for n in (first, second))
    one, other = either(draw, first, second)
    return _show(f"Which came earlier: {one} or {other}?", first, shown, 2)


SLIDESHOW: Group = {"after": _after, "end": _end, "shown": _shown, "earlier": _earlier}


def _count(shelf: Shelf, draw: Random, frames: int) -> Question:
    name, count = _name(shelf, draw), draw.randint(1, min(MOST, frames))
    shown = _fill(shelf, draw, frames, {name}, few=max(2, frames // 3))
    for place in draw.sample(range(frames), count):
        shown[place] = draw.choice(shelf.familiar[name])
    return _show(f"How many times was the {name} shown?", str(count), shown, MOST)


def _which_corner(name: str) -> str:
    return f"In which corner was the {name}: {listed(list(CORNERS))}?"


def _corner(shelf: Shelf, draw: Random, frames: int) -> Question:
    name, corners = _name(shelf, draw), list(CORNERS)
    shown = _fill(shelf, draw, frames, {name})
    place, answer = draw.randrange(frames), draw.choice(corners)
    shown[place] = draw.choice(shelf.familiar[name])
    where = draw.choices(corners, k=frames)
    where[place] = answer
    slides = [
        Frame((Sprite(number, *CORNERS[corner], 0.4),), PALE[number % len(PALE)])
        for number, corner in zip(shown, where)
    ]
    return Question(_which_corner(name), answer, tuple(slides), len(corners), video=True)


def _color(shelf: Shelf, draw: Random, frames: int) -> Question:
    slides, name = list(map(_slide, _fill(shelf, draw, frames, ()))), draw.choice(list(COLORS))
    size = round(draw.uniform(0.25, 0.4), 3)
    line = Line(draw.choice(shelf.words), draw.choice(shelf.fonts), COLORS[name], size=size)
    slides[draw.randrange(frames)] = Frame((line,), draw.choice(PALE))
    return Question("What color was the word?", name, tuple(slides), len(COLORS), video=True)


NEEDLE: Group = {"count": _count, "corner": _corner, "color": _color}


def further(shelf: Shelf, draw: Random, frames: Sequence[Frame], count: int) -> tuple[tuple[str, str], ...]:
    """Ask more of a slideshow, to train on: to look at a long video costs as much for one question as for many.

    A list of what was shown comes first, for it names many frames at once; the others are questions that are judged by,
    a quarter of them whether something was shown, and at most an eighth how many times.

    Returns:
        At most so many different questions, each with its answer. All names in them are trained.
    """
    names = [_named(shelf, frame) for frame in frames]
    times = Counter(name for name in names if name)
    once = {name: names.index(name) for name in times if times[name] == 1}
    asked = dict(islice(_lists(draw, names, once), 1))
    others: dict[str, str] = {}
    for name in draw.sample(list(once), min(count, len(once))):
        other, place = draw.choice(list(once)), once[name]
        if corner := _corner_of(frames[place]):
            others[_which_corner(name)] = corner
            continue
        if place + 1 < len(names) and (after := names[place + 1]):
            others[f"What came right after the {name}?"] = after
        if other != name:
            others[f"Which came earlier: {name} or {other}?"] = min(name, other, key=lambda n: once[n])
    again = [name for name in times if 1 < times[name] <= MOST]
    for name in draw.sample(again, min(max(1, count // 8), len(again))):
        others[f"How many times was the {name} shown?"] = str(times[name])
    shown = {f"Was the {name} shown?": answer for name, answer in _presence(shelf, draw, times, count // 4)}
    rest = max(0, count - len(asked) - len(shown))
    mixed = [*shown.items(), *draw.sample(list(others.items()), min(rest, len(others)))]
    draw.shuffle(mixed)
    return (*asked.items(), *mixed)[:count]


def _presence(shelf: Shelf, draw: Random, shown: Collection[str], count: int) -> Iterator[tuple[str, str]]:
    """Trained names, and whether they are among those shown: of as many that are as that are not."""
    absent = [name for name in shelf.familiar if name not in shown]
    for names, answer in ((list(shown), "yes"), (absent, "no")):
        yield from ((name, answer) for name in draw.sample(names, min(max(1, count // 2), len(names))))


def _corner_of(frame: Frame) -> str | None:
    """The corner that a frame's picture is in, if it is in one."""
    places = [(thing.x, thing.y) for thing in frame.things if isinstance(thing, Sprite)]
    return next((corner for corner, place in CORNERS.items() if places == [place]), None)


def _named(shelf: Shelf, frame: Frame) -> str | None:
    """The name of a frame's picture, if it is a trained one."""
    thing = frame.things[0]
    name = shelf.pack.pictures[thing.picture].name if isinstance(thing, Sprite) else None
    return name if name in shelf.familiar else None


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
