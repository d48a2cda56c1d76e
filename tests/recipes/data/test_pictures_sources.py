"""The pack made from packages: what is taken from each, what things are called, and what is left out."""

from __future__ import annotations

import json
import shutil
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from recipes.data.pictures import sources
from recipes.data.pictures.pack import Country, Font, Pack, Region, load_pack
from tests.recipes.data.toy_pack import a_picture, a_shape

DIVISION = (
    "<division><name>{}</name>{}<color><red>{}</red><green>{}</green><blue>{}</blue></color></division>"
)
IGNORED = "<ignore>yes</ignore>"


def emoji(name, short_name, code, category, subcategory="any"):
    return {
        "name": name,
        "short_name": short_name,
        "unified": code,
        "image": f"{code.lower()}.png",
        "category": category,
        "subcategory": subcategory,
    }


EMOJI = [
    emoji("DOG FACE", "dog", "1F436", "Animals & Nature"),
    emoji("DOG", "dog2", "1F415", "Animals & Nature"),
    emoji("RED APPLE", "apple", "1F34E", "Food & Drink"),
    emoji("FOX FACE", "fox_face", "1F98A-FE0F", "Animals & Nature"),
    emoji("France Flag", "fr", "1F1EB-1F1F7", "Flags", "country-flag"),
    emoji("PIRATE FLAG", "pirate_flag", "1F3F4", "Flags", "flag"),
    emoji("TURKEY", "turkey", "1F983", "Animals & Nature"),
    emoji("GRINNING FACE", "grinning", "1F600", "Smileys & Emotion"),
    emoji("CLOCK FACE ONE OCLOCK", "clock1", "1F550", "Travel & Places"),
    emoji("THREE WORDS", "man_in_tuxedo", "1F935", "Objects"),
]


def write_geography(folder: Path) -> None:
    (folder / "flags").mkdir(parents=True)
    for country in ("france", "turkey"):
        a_picture(country, "square").convert("RGB").save(folder / "flags" / f"{country}.png")
    known = "".join(
        DIVISION.format(name, f"<capital>{capital}</capital><flag>{flag}.png</flag>", i, 9, 9)
        for i, (name, capital, flag) in enumerate(
            [("France", "Paris", "france"), ("Turkey", "Ankara", "turkey"), ("Côte d'Ivoire", "X", "none")]
        )
    )
    (folder / "world.kgm").write_text(f"<map><name>World</name>{known}</map>", encoding="utf-8")
    image = Image.new("RGB", (200, 400), (255, 255, 255))
    canvas = ImageDraw.Draw(image)
    canvas.rectangle(
        (50, 0, 149, 399), fill=(9, 0, 0)
    )  # all the land, of which nothing else is left in the middle
    canvas.rectangle((50, 0, 149, 99), fill=(1, 2, 3))
    canvas.rectangle((50, 100, 149, 110), fill=(0, 0, 0))
    canvas.rectangle((50, 300, 149, 399), fill=(4, 5, 6))
    canvas.rectangle((100, 200, 102, 202), fill=(7, 8, 9))
    image.save(folder / "france.png")
    colors = [
        ("Frontier", IGNORED, 0, 0, 0),
        ("Water", IGNORED, 255, 255, 255),
        ("Middle", "", 9, 0, 0),
        ("Upper", "", 1, 2, 3),
        ("Lower", "", 4, 5, 6),
        ("Speck", "", 7, 8, 9),
    ]
    divisions = "".join(DIVISION.format(*row) for row in colors)
    for name, file in (("France (Regions)", "france"), ("Atlantis", "atlantis")):
        text = f"<map><mapFile>france.png</mapFile><name>{name}</name>{divisions}</map>"
        (folder / f"{file}.kgm").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each package, with a little of what it holds."""
    root = tmp_path_factory.mktemp("packages")
    found = {package.name: root / str(i) for i, package in enumerate(sources.packages())}
    google, fluent = found[sources.GOOGLE.name] / "package", found[sources.FLUENT.name] / "package/assets"
    (google / "img/google/64").mkdir(parents=True)
    fluent.mkdir(parents=True)
    (google / "emoji.json").write_text(json.dumps(EMOJI), encoding="utf-8")
    for one in EMOJI:
        a_picture(one["name"], "round").save(google / "img/google/64" / one["image"])
        if one["short_name"] != "apple":
            code = one["unified"].lower().replace("-fe0f", "")
            a_picture(one["name"], "square").resize((256, 128)).save(fluent / f"{code}.webp")
    animated = found[sources.ANIMATED.name] / "package/assets"
    animated.mkdir(parents=True)
    steps = [a_picture(f"step {i}", "round") for i in range(16)]
    for code in ("1f415", "1f600"):
        steps[0].save(animated / f"{code}.webp", save_all=True, append_images=steps[1:], lossless=True)
    steps[0].save(animated / "1f34e.webp")
    write_geography(found[sources.GEOGRAPHY.name] / "usr/share/kgeography")
    for split, shape, color in (("train", "circle", "red"), ("test", "triangle", "blue")):
        data = found[sources.SHAPES.name] / "easy_vqa/data" / split
        (data / "images").mkdir(parents=True)
        a_shape(shape, color, 16, 48).save(data / "images/7.png")
        questions = [
            ["what is it?", shape, 7],
            ["what color?", color, 7],
            ["is it?", "yes", 7],
            ["?", "no", 8],
        ]
        (data / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
    fonts = Path(matplotlib.get_data_path()) / "fonts/ttf"
    for package in sources.FONTS:
        (folder := found[package.name] / "usr/share/fonts").mkdir(parents=True)
        if package.name == "fonts-lato":
            shutil.copy(fonts / "DejaVuSans.ttf", folder / "Lato-Regular.ttf")
            shutil.copy(fonts / "DejaVuSans.ttf", folder / "Lato-Hairline.ttf")
    return found


@pytest.fixture(scope="module")
def pack(folders):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sources, "fetch", lambda package: folders[package.name])
        return sources.build_pack()


def test_things_have_plain_names_and_one_category_each(pack):
    found = {(picture.name, picture.category, picture.style) for picture in pack.pictures}
    assert found == {
        ("dog", "nature", "google"),
        ("dog", "nature", "3-D"),
        ("apple", "food", "google"),
        ("fox", "nature", "google"),
        ("fox", "nature", "3-D"),
        ("France", "flag", "google"),
        ("France", "flag", "3-D"),
        ("France", "flag", "flat"),
        ("Turkey", "flag", "flat"),
    }
    assert sum(picture.name == "dog" for picture in pack.pictures) == 4  # two dogs in two styles


def test_pictures_are_small_and_keep_what_is_transparent(pack):
    assert pack.pictures
    for picture in pack.pictures:
        with Image.open(BytesIO(pack.files[picture.file])) as image:
            assert max(image.size) <= sources.SIDE
            alpha = image.convert("RGBA").getchannel("A").getextrema()
        assert alpha == ((0, 255) if picture.style == "google" else (255, 255))


def test_animations_are_strips_spread_over_their_time(pack):
    (found,) = pack.animations  # the apple does not move, and the face has no name
    assert found.name == "dog"
    with Image.open(BytesIO(pack.files[found.file])) as strip:
        assert strip.size == (8 * 96, 96)
        shown = np.asarray(strip.convert("RGB").resize((8 * 48, 48))).astype(int)
    for place in range(8):
        expected = np.asarray(a_picture(f"step {2 * place}", "round").convert("RGB")).astype(int)
        found = shown[:, 48 * place : 48 * place + 48]
        assert np.abs(found[22:40, 10:38] - expected[22:40, 10:38]).mean() < 12


def test_maps_are_those_of_countries_with_the_quarters_of_their_regions(pack):
    assert pack.countries == [Country("France", "Paris"), Country("Turkey", "Ankara")]
    (found,) = pack.maps
    assert found.country == "France"
    assert found.regions == [Region(2, ""), Region(3, "north"), Region(4, "south")]
    values = np.asarray(Image.open(BytesIO(pack.files[found.file])))
    assert values.shape == (128, 64)
    assert set(np.unique(values)) == {0, 1, 2, 3, 4, 255}
    assert (values[2, 20:44] == 3).all()
    assert (values[-2, 20:44] == 4).all()


def test_shapes_are_found_where_they_are(pack):
    train, test = pack.shapes
    assert (train.shape, train.color, train.split) == ("circle", "red", "train")
    assert (test.shape, test.color, test.split) == ("triangle", "blue", "test")
    for shape in pack.shapes:
        assert (shape.x, shape.y) == pytest.approx((0.25, 0.75), abs=0.02)


def test_fonts_are_cut_down_and_still_write(pack):
    (font,) = pack.fonts
    assert font == Font("lato", "fonts/lato/Lato-Regular.ttf")
    whole = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    assert len(pack.files[font.file]) < Path(whole).stat().st_size / 5
    small, large = (ImageFont.truetype(f, 24) for f in (BytesIO(pack.files[font.file]), whole))
    assert small.getlength("Quick fox 17") == pytest.approx(large.getlength("Quick fox 17"), 0.1)
    assert small.getmask("A").getbbox() != small.getmask("B").getbbox()


def test_words_are_plain_and_many(pack):
    assert len(pack.words) > 500
    assert all(
        word.isascii() and word.isalpha() and word.islower() and 3 <= len(word) <= 7 for word in pack.words
    )


def test_every_source_has_a_licence(pack):
    assert len(pack.sources) == len(sources.packages())
    assert all(source.licence and source.holds for source in pack.sources)


def test_a_pack_is_made_once_and_kept(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("LINMU_CACHE", str(tmp_path))
    made = []
    monkeypatch.setattr(sources, "build_pack", lambda: made.append(1) or Pack(words=["owl"]))
    assert load_pack() == load_pack() == Pack(words=["owl"])
    assert len(made) == 1
    assert load_pack(tmp_path / "pictures.zip") == Pack(words=["owl"])
    with pytest.raises(FileNotFoundError):
        load_pack(tmp_path / "none.zip")
