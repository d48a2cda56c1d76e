"""Everything that the `pictures` task reads, in one file: a zip of small pictures and fonts, and an index."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from recipes.data.packages import cache_folder
from recipes.data.task import TaskError
from recipes.replacing import replacing

FORMAT = 1
INDEX = "index.json"

STEPS = 8
"""Frames of an animation."""


Row = TypeVar("Row")


class BadPack(TaskError, ValueError):
    """A file is no pack of pictures, or does not have enough of them."""


class Picture(NamedTuple):
    """A picture of one thing on a transparent ground, drawn in one artist's style; `file` is in the pack."""

    name: str
    category: str
    style: str
    file: str


class Animation(NamedTuple):
    """A picture of one thing that moves: a strip of `STEPS` square frames on a transparent ground."""

    name: str
    style: str
    file: str


class Country(NamedTuple):
    """A country and its capital."""

    name: str
    capital: str


class Region(NamedTuple):
    """A region of a map: its value in the map's image, and where on the map its middle lies, if that is clear."""

    value: int
    part: str


class Map(NamedTuple):
    """A map of a country: an image of small integers, 0 for outside, 1 for borders, the rest for regions."""

    country: str
    file: str
    regions: list[Region]


class Shape(NamedTuple):
    """An easy-VQA image: a coloured shape whose middle is at (x, y), fractions of the sides."""

    shape: str
    color: str
    x: float
    y: float
    split: str
    file: str


class Font(NamedTuple):
    """A font; fonts of one family are alike."""

    family: str
    file: str


class Source(NamedTuple):
    """Where something in the pack comes from."""

    package: str
    licence: str
    holds: str


@dataclass
class Pack:
    """Pictures, maps, shapes, fonts and words, with the bytes of their files.

    Attributes:
        files: Bytes by file name: WebP or PNG pictures, and fonts.
    """

    pictures: list[Picture] = field(default_factory=list)
    animations: list[Animation] = field(default_factory=list)
    countries: list[Country] = field(default_factory=list)
    maps: list[Map] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)
    fonts: list[Font] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict, repr=False)

    def save(self, path: str | Path) -> None:
        """Write the pack as one file, which appears only when it is whole."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        index = {name: value for name, value in vars(self).items() if name != "files"}
        with replacing(path) as partial, zipfile.ZipFile(partial, "w") as opened:
            opened.writestr(
                INDEX, json.dumps({"format": FORMAT, **index}), compress_type=zipfile.ZIP_DEFLATED
            )
            for name, content in self.files.items():
                opened.writestr(name, content)

    @classmethod
    def load(cls, path: str | Path) -> Pack:
        """Read a pack.

        Raises:
            FileNotFoundError: There is no such file.
            BadPack: It is something else, damaged, or of another format.
        """
        try:
            with zipfile.ZipFile(path) as opened:
                files = {name: opened.read(name) for name in opened.namelist()}
            index: dict[str, Any] = json.loads(files.pop(INDEX))
            if (found := index.pop("format")) != FORMAT:
                raise BadPack(
                    f"{path} is a pack of format {found}, this version reads {FORMAT}: make it anew"
                )
            maps = [
                Map(country, file, _rows(Region, regions)) for country, file, regions in index.pop("maps")
            ]
            return cls(
                pictures=_rows(Picture, index["pictures"]),
                animations=_rows(Animation, index["animations"]),
                countries=_rows(Country, index["countries"]),
                maps=maps,
                shapes=_rows(Shape, index["shapes"]),
                fonts=_rows(Font, index["fonts"]),
                words=index["words"],
                sources=_rows(Source, index["sources"]),
                files=files,
            )
        except (zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
            if isinstance(error, BadPack):
                raise
            raise BadPack(f"{path} is no pack of pictures ({error!r}): make it anew") from error


def default_path() -> Path:
    """Where the pack is kept."""
    return cache_folder() / "pictures.zip"


def load_pack(path: str | Path | None = None) -> Pack:
    """Read a pack; without a path the one in the cache folder, made first if it is not there."""
    if path is not None:
        return Pack.load(path)
    from recipes.data.pictures.sources import build_pack

    if not default_path().exists():
        build_pack().save(default_path())
    return Pack.load(default_path())


def _rows(kind: Callable[..., Row], rows: Iterable[Any]) -> list[Row]:
    return [kind(*row) for row in rows]
