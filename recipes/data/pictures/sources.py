"""Makes the pack of pictures from public registry packages.

    python -m recipes.data.pictures.sources [FILE]

Pictures of things come in up to three artists' styles: Microsoft's 3-D emoji, Google's emoji, and flat flags.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.data.packages import Package, fetch
from recipes.data.pictures.pack import (
    STEPS,
    Animation,
    Country,
    Font,
    Map,
    Pack,
    Picture,
    Region,
    Shape,
    Source,
    default_path,
)
from recipes.data.problems import WORDS
from recipes.data.text import python_topics

if TYPE_CHECKING:
    from PIL.Image import Image

FLUENT = Package(
    "npm",
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "MIT",
    "3,391 emoji in Microsoft's 3-D style",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)
ANIMATED = Package(
    "npm",
    "@lobehub/fluent-emoji-anim-1",
    "1.0.0",
    "MIT",
    "477 animated emoji in Microsoft's 3-D style",
    "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea",
)
GOOGLE = Package(
    "npm",
    "emoji-datasource-google",
    "16.0.0",
    "MIT, images Apache-2.0",
    "1,911 emoji in Google's style, with names",
)
GEOGRAPHY = Package("deb", "kgeography-data", None, "GPL-2+", "154 maps, flags and capitals")
SHAPES = Package(
    "pip",
    "easy-vqa",
    "1.0",
    "MIT",
    "5,000 images of coloured shapes",
    "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
)
FONTS = [
    Package("deb", f"fonts-{name}", None, licence, "a family of fonts")
    for name, licence in (
        ("bebas-neue", "OFL-1.1"),
        ("cantarell", "OFL-1.1"),
        ("comic-neue", "OFL-1.1"),
        ("courier-prime", "OFL-1.1"),
        ("crosextra-caladea", "Apache-2.0"),
        ("crosextra-carlito", "OFL-1.1"),
        ("dejavu-core", "Bitstream Vera"),
        ("fanwood", "OFL-1.1"),
        ("freefont-ttf", "GPL-3+ with font exception"),
        ("humor-sans", "OFL-1.1"),
        ("inconsolata", "OFL-1.1"),
        ("junction", "OFL-1.1"),
        ("jura", "OFL-1.1"),
        ("karla", "OFL-1.1"),
        ("lato", "OFL-1.1"),
        ("league-spartan", "OFL-1.1"),
        ("liberation", "OFL-1.1"),
        ("linuxlibertine", "OFL-1.1 or GPL-2+"),
        ("lobster", "OFL-1.1"),
        ("ocr-a", "MIT"),
        ("oldstandard", "OFL-1.1"),
        ("open-sans", "Apache-2.0"),
        ("play", "OFL-1.1"),
        ("quattrocento", "OFL-1.1"),
        ("quicksand", "OFL-1.1"),
        ("roboto-slab", "Apache-2.0"),
        ("staypuft", "GPL-2+"),
    )
]

CATEGORIES = {
    "Animals & Nature": "nature",
    "Food & Drink": "food",
    "Travel & Places": "travel",
    "Activities": "activity",
    "Objects": "object",
    "Flags": "flag",
}
"""The categories of emoji that are shown, and what they are called; faces, people and signs are left out."""

SIDE = 112
"""Longest side of a picture in the pack, in pixels."""

STEP_SIDE = 96
"""Side of a frame of an animation."""

MAP_SIDE = 128
SMALLEST_REGION = 0.01
"""Regions that cover less of a map's image are left out."""

ODD_FONTS = re.compile(r"Thin|Hairline|ExtraLight|\[|Tamil|Math|Barcode|LinLibertine_(DR|I|K)|Biolinum_K")


def build_pack() -> Pack:
    """Fetch the packages and make the pack; minutes with a network, half a minute with the packages in the cache.

    Raises:
        MissingTool: A registry's tool is not installed.
        FetchFailed: A package could not be got.
    """
    pack = Pack(words=sorted(_words()))
    _add_geography(pack, fetch(GEOGRAPHY) / "usr/share/kgeography")
    _add_emoji(pack, fetch(GOOGLE) / "package", fetch(FLUENT) / "package/assets")
    _add_animations(pack, fetch(ANIMATED) / "package/assets")
    _add_shapes(pack, fetch(SHAPES) / "easy_vqa/data")
    for package in FONTS:
        _add_fonts(pack, package.name.removeprefix("fonts-"), fetch(package))
    pack.sources = [Source(package.name, package.licence, package.holds) for package in packages()]
    return pack


def packages() -> list[Package]:
    """The packages that the pack is made of."""
    return [FLUENT, ANIMATED, GOOGLE, GEOGRAPHY, SHAPES, *FONTS]


def _words() -> set[str]:
    """Everyday nouns, and words that are used again and again in the pages behind Python's help()."""
    counted = Counter(re.findall(r"\b[a-z]{3,7}\b", " ".join(python_topics())))
    return {word for word, times in counted.items() if times >= 3} | {w for w in WORDS.split() if len(w) <= 7}


def _add_emoji(pack: Pack, google: Path, fluent: Path) -> None:
    taken = {picture.name.casefold(): picture.category for picture in pack.pictures}
    by_code = {_code(path.stem): path for path in fluent.glob("*.webp")}
    for emoji in json.loads((google / "emoji.json").read_text(encoding="utf-8")):
        category = CATEGORIES.get(emoji["category"])
        if category is None or (name := _emoji_name(emoji)) is None:
            continue
        if category == "flag" and emoji["subcategory"] != "country-flag":
            continue
        if taken.setdefault(name.casefold(), category) != category:  # a turkey is no country here
            continue
        files = {
            "google": google / "img/google/64" / emoji["image"],
            "3-D": by_code.get(_code(emoji["unified"])),
        }
        for style, file in files.items():
            if file is not None and file.exists():
                _add_picture(
                    pack, Picture(name, category, style, f"{style}/{emoji['unified'].lower()}.webp"), file
                )


def _code(unified: str) -> str:
    return unified.lower().replace("-fe0f", "")


def _emoji_name(emoji: dict[str, str]) -> str | None:
    """What a picture is called: a country, or one or two plain words; None if it has no such name."""
    if emoji["category"] == "Flags":
        name = emoji["name"].removesuffix(" Flag")
        return name if re.fullmatch(r"[A-Z][A-Za-z-]*( [A-Za-z]+){0,2}", name) else None
    words = re.sub(r"[\d_-]+", " ", emoji["short_name"]).split()
    if words[-1] == "face" and emoji["category"] == "Animals & Nature":
        words.pop()
    plain = 1 <= len(words) <= 2 and all(word.isascii() and len(word) > 1 for word in words)
    return " ".join(words) if plain and words[0] != "clock" else None


def _add_picture(pack: Pack, picture: Picture, file: Path) -> None:
    import PIL.Image

    with PIL.Image.open(file) as image:
        small = image.convert("RGBA")
    small.thumbnail((SIDE, SIDE), PIL.Image.Resampling.LANCZOS)
    pack.files[picture.file] = _encoded(small, "WEBP", quality=90)
    pack.pictures.append(picture)


def _add_animations(pack: Pack, folder: Path) -> None:
    """The animations of what is in the pack, each as a strip of `STEPS` frames spread over its time."""
    import PIL.Image

    names = {
        _code(Path(picture.file).stem): picture.name for picture in pack.pictures if picture.style == "google"
    }
    for path in sorted(folder.glob("*.webp")):
        if (name := names.get(_code(path.stem))) is None:
            continue
        with PIL.Image.open(path) as image:
            if (frames := getattr(image, "n_frames", 1)) < STEPS:
                continue
            strip = PIL.Image.new("RGBA", (STEPS * STEP_SIDE, STEP_SIDE))
            for step in range(STEPS):
                image.seek(step * frames // STEPS)
                strip.paste(image.convert("RGBA").resize((STEP_SIDE, STEP_SIDE)), (step * STEP_SIDE, 0))
        file = f"animated/{path.stem}.webp"
        pack.files[file] = _encoded(strip, "WEBP", quality=90)
        pack.animations.append(Animation(name, "3-D", file))


def _encoded(image: Image, form: str, **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def _add_geography(pack: Pack, folder: Path) -> None:
    capitals: dict[str, str] = {}
    for division in ElementTree.parse(folder / "world.kgm").getroot().iter("division"):
        name, capital, flag = (division.findtext(tag, "").strip() for tag in ("name", "capital", "flag"))
        if _plain(name) and _plain(capital):
            capitals[name] = capital
        if _plain(name) and flag and (folder / "flags" / flag).exists():
            _add_picture(pack, Picture(name, "flag", "flat", f"flat/{flag}.webp"), folder / "flags" / flag)
    pack.countries = [Country(*pair) for pair in sorted(capitals.items())]
    for path in sorted(folder.glob("*.kgm")):
        root = ElementTree.parse(path).getroot()
        country = re.sub(r"\s*\(.*\)", "", root.findtext("name", "").strip())
        if country in capitals:
            _add_map(pack, country, root, folder, f"map/{path.stem}.png")


def _plain(name: str) -> bool:
    return re.fullmatch(r"[A-Z][A-Za-z-]*( [A-Za-z]+){0,2}", name) is not None


def _add_map(pack: Pack, country: str, root: ElementTree.Element, folder: Path, file: str) -> None:
    import numpy as np
    import PIL.Image

    with PIL.Image.open(folder / root.findtext("mapFile", "").strip()) as image:
        ratio = MAP_SIDE / max(image.size)
        size = (round(image.width * ratio), round(image.height * ratio))
        colors = np.asarray(image.convert("RGB").resize(size, PIL.Image.Resampling.NEAREST)).astype(int)
    codes = colors @ np.array([1 << 16, 1 << 8, 1])
    values = np.zeros(codes.shape, dtype=np.uint8)
    regions: list[tuple[int, Any]] = []
    for division in root.iter("division"):
        red, green, blue = (
            int(division.findtext(f"color/{part}", "-1")) for part in ("red", "green", "blue")
        )
        mask = codes == (red << 16) + (green << 8) + blue
        if division.findtext("ignore", "").strip() == "yes":
            values[mask & ((red, green, blue) == (0, 0, 0))] = 1
        elif mask.mean() >= SMALLEST_REGION and len(regions) < 250:
            regions.append((len(regions) + 2, mask))
            values[mask] = regions[-1][0]
        else:
            values[mask] = 255  # land that is never asked for
    if not regions:
        return
    land = np.argwhere(values > 1)
    low, high = land.min(0), land.max(0)
    parts = [_part(*(2 * (np.argwhere(mask).mean(0) - low) / (high - low + 1) - 1)) for _, mask in regions]
    pack.files[file] = _encoded(PIL.Image.fromarray(values), "PNG", optimize=True)
    pack.maps.append(Map(country, file, [Region(v, part) for (v, _), part in zip(regions, parts)]))


def _part(y: float, x: float) -> str:
    """The quarter of a map, whose land spans -1 … 1, that a point is clearly in, or an empty string."""
    if max(abs(x), abs(y)) < 0.35 or abs(abs(x) - abs(y)) < 0.2:
        return ""
    if abs(y) > abs(x):
        return "north" if y < 0 else "south"
    return "west" if x < 0 else "east"


def _add_shapes(pack: Pack, data: Path) -> None:
    import numpy as np
    import PIL.Image

    colors = ["black", "blue", "brown", "gray", "green", "red", "teal", "yellow"]
    for split in ("train", "test"):
        seen: dict[int, set[str]] = {}
        for _, answer, number in json.loads((data / split / "questions.json").read_text(encoding="utf-8")):
            seen.setdefault(number, set()).add(answer)
        for number, answers in sorted(seen.items()):
            shape = answers & {"circle", "rectangle", "triangle"}
            color = answers & set(colors)
            if not shape or not color:
                continue
            with PIL.Image.open(data / split / "images" / f"{number}.png") as image:
                rgb = image.convert("RGB")
            pixels = np.asarray(rgb).astype(int)
            drawn = np.argwhere(np.abs(pixels - pixels[0, 0]).sum(-1) > 60)
            y, x = ((drawn.min(0) + drawn.max(0) + 1) / 2 / pixels.shape[0]).round(3).tolist()
            file = f"shapes/{split}/{number}.png"
            pack.files[file] = _encoded(rgb.quantize(32), "PNG", optimize=True)
            pack.shapes.append(Shape(shape.pop(), color.pop(), x, y, split, file))


def _add_fonts(pack: Pack, family: str, folder: Path) -> None:
    paths: Iterable[Path] = sorted(folder.rglob("*.[ot]tf"))
    for path in _distinct(path for path in paths if not ODD_FONTS.search(path.name)):
        file = f"fonts/{family}/{path.name}"
        pack.files[file] = _latin(path)
        pack.fonts.append(Font(family, file))


def _distinct(paths: Iterable[Path]) -> Iterator[Path]:
    """One file of each name, whatever its suffix."""
    return iter({path.stem: path for path in paths}.values())


def _latin(path: Path) -> bytes:
    """A font cut down to letters and digits."""
    from fontTools import subset

    logging.getLogger("fontTools").setLevel(
        logging.ERROR
    )  # it warns of every table that only an editor reads
    options = subset.Options(hinting=False, layout_features=[], name_IDs=[1, 2], notdef_outline=True)
    font = subset.load_font(str(path), options)
    cutter = subset.Subsetter(options)
    cutter.populate(text="ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 .,!?'-")
    cutter.subset(font)
    stream = BytesIO()
    subset.save_font(font, stream, options)
    return stream.getvalue()


if __name__ == "__main__":
    build_pack().save(sys.argv[1] if len(sys.argv) > 1 else default_path())
