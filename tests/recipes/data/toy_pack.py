"""The `pictures` task on a pack of a few drawn pictures, maps, shapes and fonts."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from io import BytesIO
from random import Random

import matplotlib
from PIL import Image, ImageDraw
from transformers import Qwen2VLConfig

from recipes.data.pictures.pack import STEPS, Animation, Country, Font, Map, Pack, Picture, Region, Shape
from recipes.data.pictures.task import GROUPS, Pictures
from recipes.data.problems import WORDS
from recipes.data.task import Item
from tests.recipes.data.test_recall import build_tokenizer

THINGS = {
    "food": [
        "apple",
        "bread",
        "cheese",
        "corn",
        "egg",
        "lemon",
        "melon",
        "olive",
        "pear",
        "soup",
        "tea",
        "wine",
    ],
    "nature": [
        "bear",
        "bee",
        "cat",
        "dog",
        "elk",
        "fox",
        "goat",
        "hen",
        "lion",
        "owl",
        "pig",
        "seal",
        "wolf",
    ],
    "object": [
        "axe",
        "bag",
        "bell",
        "book",
        "chair",
        "clock",
        "drum",
        "key",
        "lamp",
        "pen",
        "ring",
        "saw",
        "sock",
    ],
    "flag": [
        "Chad",
        "Chile",
        "China",
        "Cuba",
        "Egypt",
        "Fiji",
        "Ghana",
        "Haiti",
        "India",
        "Iran",
        "Japan",
        "Mali",
    ],
}
STYLES = ("round", "square")
PARTS = {"north": (64, 20), "south": (64, 108), "west": (20, 64), "east": (108, 64)}
COLORS = {"red": (220, 0, 0), "blue": (0, 0, 220), "green": (0, 160, 0)}


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    stream = BytesIO()
    image.save(stream, form)
    return stream.getvalue()


def a_picture(name: str, style: str) -> Image.Image:
    """A disc or a square with stripes whose colours depend on the name."""
    draw = Random(name)
    image = Image.new("RGBA", (48, 32 if style == "square" else 48), (0, 0, 0, 0))
    canvas = ImageDraw.Draw(image)
    shape = canvas.ellipse if style == "round" else canvas.rectangle
    shape((0, 0, image.width - 1, image.height - 1), fill=tuple(draw.randrange(200) for _ in range(3)))
    canvas.rectangle((16, 12, 30, 20), fill=tuple(draw.randrange(200) for _ in range(3)))
    return image


def a_map() -> Image.Image:
    image = Image.new("L", (128, 128), 0)
    canvas = ImageDraw.Draw(image)
    canvas.ellipse((2, 2, 126, 126), fill=255)
    for value, (x, y) in enumerate(PARTS.values(), start=2):
        canvas.rectangle((x - 15, y - 15, x + 15, y + 15), fill=value)
    return image


def a_shape(shape: str, color: str, x: int, y: int) -> Image.Image:
    image = Image.new("RGB", (64, 64), (240, 240, 235))
    canvas, box = ImageDraw.Draw(image), (x - 8, y - 8, x + 8, y + 8)
    if shape == "triangle":
        canvas.polygon([(x, y - 8), (x - 8, y + 8), (x + 8, y + 8)], fill=COLORS[color])
    else:
        (canvas.ellipse if shape == "circle" else canvas.rectangle)(box, fill=COLORS[color])
    return image


@cache
def toy_pack() -> Pack:
    """50 names in two styles, 13 animations, 14 maps, 90 shapes, 8 families of fonts and some hundred words."""
    pack = Pack(words=sorted(word for word in WORDS.split() if len(word) <= 6))
    for category, names in THINGS.items():
        for name in names:
            for style in STYLES:
                file = f"{style}/{name}.webp"
                pack.pictures.append(Picture(name, category, style, file))
                pack.files[file] = encoded(a_picture(name, style), "WEBP")
    for name in THINGS["nature"]:
        file, strip = f"animated/{name}.webp", Image.new("RGBA", (STEPS * 48, 48))
        for step in range(STEPS):
            strip.paste(a_picture(f"{name} {step}", "round"), (48 * step, 0))
        pack.animations.append(Animation(name, "round", file))
        pack.files[file] = encoded(strip, "WEBP")
    pack.countries = [Country(name, f"{name} City") for name in THINGS["flag"]]
    for number in range(14):
        file = f"map/{number}.png"
        regions = [Region(value, part) for value, part in enumerate(PARTS, start=2)]
        pack.maps.append(Map(THINGS["flag"][number % 12], file, regions))
        pack.files[file] = encoded(a_map())
    draw = Random(0)
    for number in range(90):
        shape, color = draw.choice(("circle", "rectangle", "triangle")), draw.choice(list(COLORS))
        x, y = draw.randint(10, 54), draw.randint(10, 54)
        file = f"shapes/{number}.png"
        pack.shapes.append(Shape(shape, color, x / 64, y / 64, "test" if number % 3 == 0 else "train", file))
        pack.files[file] = encoded(a_shape(shape, color, x, y))
    with open(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", "rb") as file:
        pack.files["sans.ttf"] = file.read()
    pack.fonts = [Font(f"family {number}", "sans.ttf") for number in range(14)]
    return pack


@cache
def toy_config() -> Qwen2VLConfig:
    """Of a small Qwen2-VL whose tokens have 32 pixels a side."""
    tokenizer = build_tokenizer()
    first = len(tokenizer)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return Qwen2VLConfig(
        text_config={
            "vocab_size": first + 4,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 16,
            "temporal_patch_size": 1,
            "spatial_merge_size": 2,
        },
        **{name: first + i for i, name in enumerate(names)},
    )


def toy_task(*groups: str, **options: object) -> Pictures:
    """The task on the toy pack, of all groups if none is named."""
    return Pictures(toy_config(), build_tokenizer(), toy_pack(), groups or tuple(GROUPS), **options)


def of(split: Iterable[Item], group: str) -> list[Item]:
    """The items of a group."""
    return [item for item in split if item["group"] == group]


def one_of_each_form(split: Iterable[Item]) -> list[Item]:
    """An item of each form in each category."""
    return list({(item["category"], item["form"]): item for item in split}.values())
