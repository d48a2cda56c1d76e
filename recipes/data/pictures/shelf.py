"""What a split may show of a pack: names, styles, words, fonts, maps and regions that the other does not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal, TypeVar

from recipes.data.pictures.pack import BadPack, Pack, Picture

Split = Literal["train", "test"]

HOLDOUT = 7
"""Of how many names, fonts, words or maps one is kept for the test split: 14 %."""

RESTYLED = 3
"""Of how many trained names with several styles one keeps a style for the test split."""

FEWEST = {
    "known": 4,
    "animations": 1,
    "capitals": 1,
    "charts": 1,
    "countries": 1,
    "fonts": 1,
    "words": 8,
    "shapes": 6,
}
"""What a split needs at least."""

Thing = TypeVar("Thing")


@dataclass
class Shelf:
    """The part of a pack that one split draws from.

    Trained names are those that training shows, in all styles or all but one. The test split shows trained names
    in the style that training lacks, and held-out names in every style. Only what was trained is asked for by
    name; all of it appears among other pictures, in choices, and in questions on its category. Long videos ask for
    memory, so they show trained names in every style that a split may show, those of training too.

    Attributes:
        known: Numbers of pictures by trained name.
        familiar: The same for long videos: in training no others, in the test split all pictures of all trained names.
        new: Numbers of pictures by held-out name; empty in training.
        categories: Names, known or new, by category.
        animations: Numbers of animations of trained names; they count as pictures in their style.
        capitals: By country.
        charts: (map, region, part) that are asked where they lie: of maps of this split alone.
        countries: (map, region) that are asked which country they show: trained maps, regions of this split alone.
        fonts: Numbers of fonts.
        words: To read.
        shapes: Numbers of easy-VQA images.
    """

    pack: Pack
    known: dict[str, list[int]] = field(default_factory=dict)
    familiar: dict[str, list[int]] = field(default_factory=dict)
    new: dict[str, list[int]] = field(default_factory=dict)
    categories: dict[str, list[str]] = field(default_factory=dict)
    animations: list[int] = field(default_factory=list)
    capitals: dict[str, str] = field(default_factory=dict)
    charts: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    countries: list[tuple[int, int]] = field(default_factory=list)
    fonts: list[int] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    shapes: list[int] = field(default_factory=list)

    def picture(self, name: str, draw: Random) -> int:
        """One of the pictures with that name."""
        return draw.choice(self.known.get(name) or self.new[name])

    def shape(self, number: int) -> str:
        """What an easy-VQA image shows, such as `red circle`."""
        return f"{self.pack.shapes[number].color} {self.pack.shapes[number].shape}"


def shelf(pack: Pack, split: Split) -> Shelf:
    """Sort out what a split shows.

    Raises:
        BadPack: The pack has too little for the split.
    """
    test = split == "test"
    names = sorted({picture.name for picture in pack.pictures})
    held_out = set(_every(names, HOLDOUT, True))
    lacking = _lacking_styles(pack.pictures, held_out)

    known, familiar, new = (defaultdict[str, list[int]](list) for _ in range(3))
    for number, picture in enumerate(pack.pictures):
        if picture.name in held_out:
            if test:
                new[picture.name].append(number)
            continue
        restyled = lacking.get(picture.name) == picture.style
        if test == restyled:
            known[picture.name].append(number)
        if test or not restyled:
            familiar[picture.name].append(number)
    categories: dict[str, list[str]] = {}
    for name in [*known, *new]:
        first = (known.get(name) or new[name])[0]
        categories.setdefault(pack.pictures[first].category, []).append(name)

    moving = [
        number
        for number, animation in enumerate(pack.animations)
        if animation.name in known and test == (lacking.get(animation.name) == animation.style)
    ]
    maps = _every(range(len(pack.maps)), HOLDOUT, test)
    charts = defaultdict[str, list[tuple[int, int]]](list)
    for number in maps:
        for region in pack.maps[number].regions:
            if region.part:
                charts[region.part].append((number, region.value))
    countries = [
        (number, region.value)
        for number in _every(range(len(pack.maps)), HOLDOUT, False)
        for region in _every(pack.maps[number].regions, 3, test)
    ]
    families = set(_every(sorted({font.family for font in pack.fonts}), HOLDOUT, test))
    found = Shelf(
        pack=pack,
        known=dict(known),
        familiar=dict(familiar),
        new=dict(new),
        categories=categories,
        animations=moving,
        capitals={c.name: c.capital for c in pack.countries if c.name in known},
        charts=dict(charts),
        countries=countries,
        fonts=[number for number, font in enumerate(pack.fonts) if font.family in families],
        words=_every(sorted(pack.words), HOLDOUT, test),
        shapes=[number for number, shape in enumerate(pack.shapes) if shape.split == split],
    )
    for name, fewest in FEWEST.items():
        if (count := len(getattr(found, name))) < fewest:
            raise BadPack(f"the {split} split needs at least {fewest} {name}, but the pack gives it {count}")
    return found


def _every(things: Sequence[Thing], step: int, taken: bool) -> list[Thing]:
    """Every `step`-th thing, or all but those."""
    return [thing for i, thing in enumerate(things, start=1) if (i % step == 0) == taken]


def _lacking_styles(pictures: Sequence[Picture], held_out: set[str]) -> dict[str, str]:
    """The style that training lacks, of each trained name that is restyled in the test split."""
    styles: dict[str, list[str]] = {}
    for picture in pictures:
        if picture.name not in held_out and picture.style not in styles.setdefault(picture.name, []):
            styles[picture.name].append(picture.style)
    several = sorted(name for name, drawn in styles.items() if len(drawn) > 1)
    restyled = _every(several, RESTYLED, True)
    return {name: styles[name][i % len(styles[name])] for i, name in enumerate(restyled)}
