"""Questions on a few images and on short videos: coloured shapes, and pictures that move.

`SHAPES` stands for Video-MME among the paper's benchmarks, perception in videos of several lengths, a still being the
shortest; `CLIPS` for ActivityNet-QA, what happens in a short video.
"""

from __future__ import annotations

from collections import Counter
from random import Random

from recipes.data.pictures.frames import PALE, Card, Frame, Sprite, Step
from recipes.data.pictures.pack import STEPS
from recipes.data.pictures.question import Group, Question, either
from recipes.data.pictures.shelf import Shelf

MOST_CARDS = 8
"""Images of the longest film of shapes."""


def _cards(shelf: Shelf, numbers: list[int]) -> tuple[Frame, ...]:
    return tuple(Frame((Card(number),)) for number in numbers)


def _shape(shelf: Shelf, draw: Random, frames: int) -> Question:
    number = draw.choice(shelf.shapes)
    card = shelf.pack.shapes[number]
    question, answer, choices = draw.choice(
        (("What shape is in the image?", card.shape, 3), ("What color is the shape?", card.color, 8))
    )
    return Question(question, answer, _cards(shelf, [number]), choices)


def _is_there(shelf: Shelf, draw: Random, frames: int) -> Question:
    number, other = draw.sample(shelf.shapes, 2)
    while shelf.shape(other) == shelf.shape(number):
        other = draw.choice(shelf.shapes)
    asked, answer = draw.choice(((number, "yes"), (other, "no")))
    return Question(f"Is there a {shelf.shape(asked)}?", answer, _cards(shelf, [number]), 2)


def _side(shelf: Shelf, draw: Random, frames: int) -> Question:
    axis, sides = draw.choice((("x", ("left", "right")), ("y", ("top", "bottom"))))
    wanted = draw.choice(sides)
    cards = shelf.pack.shapes
    off = [n for n in shelf.shapes if abs(getattr(cards[n], axis) - 0.5) > 0.1]
    number = draw.choice([n for n in off if sides[getattr(cards[n], axis) > 0.5] == wanted] or off)
    answer = sides[getattr(cards[number], axis) > 0.5]
    question = f"Where is the shape: {sides[0]} or {sides[1]}?"
    return Question(question, answer, _cards(shelf, [number]), 2)


def _nth(shelf: Shelf, draw: Random, frames: int) -> Question:
    numbers = draw.choices(shelf.shapes, k=draw.randint(2, MOST_CARDS))
    place, number = draw.choice((("first", numbers[0]), ("last", numbers[-1])))
    card = shelf.pack.shapes[number]
    wanted, answer, choices = draw.choice((("shape", card.shape, 3), ("color", card.color, 8)))
    question = f"What is the {wanted} in the {place} image?"
    return Question(question, answer, _cards(shelf, numbers), choices, video=True)


def _color_of(shelf: Shelf, draw: Random, frames: int) -> Question:
    cards = shelf.pack.shapes
    number = draw.choice(shelf.shapes)
    others = [n for n in shelf.shapes if cards[n].shape != cards[number].shape]
    numbers = draw.choices(others, k=draw.randint(1, MOST_CARDS - 1))
    numbers.insert(draw.randint(0, len(numbers)), number)
    question = f"What color is the {cards[number].shape}?"
    return Question(question, cards[number].color, _cards(shelf, numbers), 8, video=True)


def _how_many(shelf: Shelf, draw: Random, frames: int) -> Question:
    cards = shelf.pack.shapes
    shape, total = draw.choice(("circle", "rectangle", "triangle")), draw.randint(4, MOST_CARDS)
    count = draw.randint(0, 4)
    alike = [n for n in shelf.shapes if cards[n].shape == shape]
    others = [n for n in shelf.shapes if cards[n].shape != shape]
    numbers = draw.choices(alike, k=count) + draw.choices(others, k=total - count)
    draw.shuffle(numbers)
    answer = str(Counter(cards[n].shape for n in numbers)[shape])
    return Question(f"How many {shape}s are shown?", answer, _cards(shelf, numbers), 5, video=True)


SHAPES: Group = {
    "shape": _shape,
    "present": _is_there,
    "side": _side,
    "nth": _nth,
    "color": _color_of,
    "count": _how_many,
}


def _path(start: float, end: float) -> list[float]:
    return [round(start + (end - start) * step / (STEPS - 1), 3) for step in range(STEPS)]


def _clip(draw: Random, *tracks: list[Sprite]) -> tuple[Frame, ...]:
    ground = draw.choice(PALE)
    return tuple(Frame(things, ground) for things in zip(*tracks))


def _two(shelf: Shelf, draw: Random) -> tuple[str, str]:
    first, second = draw.sample(sorted(shelf.known), 2)
    return first, second


def _direction(shelf: Shelf, draw: Random, frames: int) -> Question:
    name, moving = (
        draw.choice(sorted(shelf.known)),
        _path(*draw.choice(((0.25, 0.75), (0.2, 0.8), (0.3, 0.7)))),
    )
    resting = [round(draw.uniform(0.35, 0.65), 3)] * STEPS
    answer = draw.choice(("left", "right", "up", "down"))
    x, y = (moving, resting) if answer in ("left", "right") else (resting, moving)
    if answer in ("left", "up"):
        x, y = x[::-1], y[::-1]
    picture, size = shelf.picture(name, draw), round(draw.uniform(0.35, 0.5), 3)
    clip = _clip(draw, [Sprite(picture, *place, size) for place in zip(x, y)])
    question = "In which direction does it move: left, right, up or down?"
    return Question(question, answer, clip, 4, video=True)


def _size(shelf: Shelf, draw: Random, frames: int) -> Question:
    picture = shelf.picture(draw.choice(sorted(shelf.known)), draw)
    sizes = _path(draw.uniform(0.3, 0.45), draw.uniform(0.75, 0.95))
    answer = draw.choice(("larger", "smaller"))
    track = [Sprite(picture, size=size) for size in (sizes if answer == "larger" else sizes[::-1])]
    return Question("Does it get larger or smaller?", answer, _clip(draw, track), 2, video=True)


def _turn(shelf: Shelf, draw: Random, frames: int) -> Question:
    picture, start = shelf.picture(draw.choice(sorted(shelf.known)), draw), draw.randrange(360)
    answer = draw.choice(("left", "right"))
    step = draw.choice((15, 20, 30)) * (1 if answer == "left" else -1)
    track = [Sprite(picture, size=0.65, turn=(start + step * i) % 360) for i in range(STEPS)]
    return Question("Does it turn left or right?", answer, _clip(draw, track), 2, video=True)


def _fade(shelf: Shelf, draw: Random, frames: int) -> Question:
    picture = shelf.picture(draw.choice(sorted(shelf.known)), draw)
    answer = draw.choice(("appear", "disappear"))
    opacities = _path(0.0, 1.0) if answer == "appear" else _path(1.0, 0.0)
    track = [Sprite(picture, size=0.8, opacity=opacity) for opacity in opacities]
    return Question("Does it appear or disappear?", answer, _clip(draw, track), 2, video=True)


def _becomes(shelf: Shelf, draw: Random, frames: int) -> Question:
    names = _two(shelf, draw)
    pictures = [shelf.picture(name, draw) for name in names]
    turning = draw.randint(2, STEPS - 2)
    track = [Sprite(pictures[step >= turning]) for step in range(STEPS)]
    which = draw.randrange(2)
    question = ("What is shown at the beginning?", "What is shown at the end?")[which]
    return Question(question, names[which], _clip(draw, track), video=True)


def _faster(shelf: Shelf, draw: Random, frames: int) -> Question:
    fast, slow = _two(shelf, draw)
    rows = either(draw, 0.27, 0.73)
    tracks = []
    for name, y, ends in zip((fast, slow), rows, ((0.2, 0.8), (0.4, 0.6))):
        x, picture = _path(*either(draw, *ends)), shelf.picture(name, draw)
        tracks.append([Sprite(picture, place, y, 0.4) for place in x])
    first, second = either(draw, fast, slow)
    return Question(f"Which moves faster: {first} or {second}?", fast, _clip(draw, *tracks), 2, video=True)


def _mover(shelf: Shelf, draw: Random, frames: int) -> Question:
    moving, resting = _two(shelf, draw)
    y, other = either(draw, 0.27, 0.73)
    picture, still = shelf.picture(moving, draw), shelf.picture(resting, draw)
    track = [Sprite(picture, x, y, 0.42) for x in _path(*either(draw, 0.25, 0.75))]
    return Question(
        "What moves?", moving, _clip(draw, track, [Sprite(still, 0.5, other, 0.42)] * STEPS), video=True
    )


def _animation(shelf: Shelf, draw: Random, frames: int) -> Question:
    number, ground = draw.choice(shelf.animations), draw.choice(PALE)
    size = round(draw.uniform(0.7, 1.0), 3)
    clip = tuple(Frame((Step(number, step, size),), ground) for step in range(STEPS))
    return Question("What is this?", shelf.pack.animations[number].name, clip, video=True)


CLIPS: Group = {
    "direction": _direction,
    "size": _size,
    "turn": _turn,
    "fade": _fade,
    "becomes": _becomes,
    "faster": _faster,
    "mover": _mover,
    "animation": _animation,
}
