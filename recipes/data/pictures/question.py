"""A question on frames, as all groups of the `pictures` task make it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import NamedTuple, TypeVar

from recipes.data.pictures.frames import PALE, Frame, Line, Sprite
from recipes.data.pictures.shelf import Shelf

COLORS = {
    "black": (20, 20, 20),
    "red": (200, 20, 30),
    "green": (20, 130, 40),
    "blue": (30, 60, 210),
    "purple": (130, 30, 150),
    "orange": (225, 110, 0),
}
"""Colours that read well on every pale ground."""

Choice = TypeVar("Choice")


class Question(NamedTuple):
    """What is shown, what is asked, and the one right answer.

    `choices` counts the answers that the question itself leaves open, where it does: 2 for yes and no. `further` are
    more questions on the same frames, each with its answer, to train on.
    """

    question: str
    answer: str
    frames: tuple[Frame, ...]
    choices: int = 0
    video: bool = False
    further: tuple[tuple[str, str], ...] = ()


Form = Callable[[Shelf, Random, int], Question]
"""Makes a question from what a split may show, a random generator, and the number of frames of a long video."""

Group = Mapping[str, Form]


def either(draw: Random, one: Choice, other: Choice) -> tuple[Choice, Choice]:
    """Two things in random order."""
    return (one, other) if draw.random() < 0.5 else (other, one)


def still(shelf: Shelf, picture: int, draw: Random) -> Frame:
    """A picture somewhere near the middle of a frame, on a pale ground."""
    size = draw.uniform(0.6, 0.95)
    room = (1 - size) / 2
    x, y = (0.5 + draw.uniform(-room, room) for _ in range(2))
    return Frame((Sprite(picture, round(x, 3), round(y, 3), round(size, 3)),), draw.choice(PALE))


def page(draw: Random, lines: Sequence[Line]) -> Frame:
    """Lines of text on a pale ground."""
    return Frame(tuple(lines), draw.choice(PALE))


def color(draw: Random) -> tuple[int, int, int]:
    """One of the colours that read well."""
    return draw.choice(list(COLORS.values()))


def listed(names: Sequence[str]) -> str:
    """`a`, `b` or `c`."""
    return f"{', '.join(names[:-1])} or {names[-1]}"
