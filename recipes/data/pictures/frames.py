"""Frames as data, and the canvas that draws them: an item of the task holds what is seen, not its pixels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from recipes.data.patches import Patcher, Pixels
from recipes.data.pictures.pack import Pack

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

Color = tuple[int, int, int]

PALE: tuple[Color, ...] = (
    (255, 255, 255),
    (244, 238, 226),
    (226, 240, 250),
    (229, 245, 229),
    (252, 230, 235),
    (236, 230, 250),
    (250, 246, 214),
    (232, 232, 232),
)
"""Grounds that every picture stands out from."""


class Sprite(NamedTuple):
    """A picture of the pack: its number, its middle (x, y) and longest side as fractions of the frame's side.

    It is turned counter-clockwise by `turn` degrees and shines through but for a fraction `opacity`.
    """

    picture: int
    x: float = 0.5
    y: float = 0.5
    size: float = 0.85
    turn: int = 0
    opacity: float = 1.0


class Step(NamedTuple):
    """A frame of an animation of the pack, in the middle, `size` its side."""

    animation: int
    step: int
    size: float


class Line(NamedTuple):
    """A line of text in a font of the pack, its middle at (x, y), `size` the height of its letters."""

    text: str
    font: int
    color: Color
    x: float = 0.5
    y: float = 0.5
    size: float = 0.2


class Chart(NamedTuple):
    """A map of the pack that fills the frame, with one region marked."""

    map: int
    region: int
    land: Color
    mark: Color


class Card(NamedTuple):
    """An easy-VQA image of the pack that fills the frame."""

    shape: int


class Frame(NamedTuple):
    """One image: a plain ground and what lies on it, the first lowest."""

    things: tuple[Sprite | Step | Line | Chart | Card, ...]
    ground: Color = PALE[0]


Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(OrderedDict[Key, Value]):
    """The values last asked for, at most `most` of them."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def get_or_make(self, key: Key, make: Callable[[Key], Value]) -> Value:
        """The kept value, or a new one in place of the one that was not asked for for the longest time."""
        if key in self:
            self.move_to_end(key)
        else:
            self[key] = make(key)
            if len(self) > self.most:
                self.popitem(last=False)
        return self[key]


class Canvas:
    """Draws frames of a pack, and keeps the patches of those drawn last: a slideshow costs little more than a copy.

    Args:
        pack: Where pictures come from.
        side: Pixels of a frame's side.
        kept: Frames kept as patches, at 128 pixels 96 KB each in bf16.
    """

    def __init__(self, pack: Pack, side: int = 128, kept: int = 2048) -> None:
        self.pack, self.side = pack, side
        self._patches: Recent[Frame, Pixels] = Recent(kept)
        self._decoded: Recent[str, Image] = Recent(kept)
        self._scaled: Recent[tuple[int, int], Image] = Recent(64)
        self._fonts: Recent[tuple[int, int], FreeTypeFont] = Recent(256)

    def cut(self, frame: Frame, patcher: Patcher) -> Pixels:
        """The patches of a frame."""
        return self._patches.get_or_make(frame, lambda frame: patcher.cut([self.draw(frame)])[0])

    def draw(self, frame: Frame) -> Image:
        """The frame as an RGB image."""
        import PIL.Image

        image = PIL.Image.new("RGB", (self.side, self.side), frame.ground)
        draw: dict[type, Callable[[Image, Any], None]] = {
            Sprite: self._sprite,
            Step: self._step,
            Line: self._line,
            Chart: self._chart,
            Card: self._card,
        }
        for thing in frame.things:
            draw[type(thing)](image, thing)
        return image

    def _open(self, file: str, mode: str) -> Image:
        import PIL.Image

        return self._decoded.get_or_make(
            file, lambda file: PIL.Image.open(BytesIO(self.pack.files[file])).convert(mode)
        )

    def _sprite(self, image: Image, sprite: Sprite) -> None:
        import PIL.Image

        longest = max(1, round(sprite.size * self.side))
        picture = self._scaled.get_or_make((sprite.picture, longest), self._scale)
        if sprite.turn:
            picture = picture.rotate(sprite.turn, PIL.Image.Resampling.BILINEAR, expand=True)
        alpha = picture.getchannel("A")
        if sprite.opacity < 1:
            alpha = alpha.point([round(value * sprite.opacity) for value in range(256)])
        corner = (
            round(sprite.x * self.side - picture.width / 2),
            round(sprite.y * self.side - picture.height / 2),
        )
        image.paste(picture, corner, alpha)

    def _step(self, image: Image, step: Step) -> None:
        strip = self._open(self.pack.animations[step.animation].file, "RGBA")
        side, drawn = strip.height, round(step.size * self.side)
        picture = strip.crop((step.step * side, 0, (step.step + 1) * side, side)).resize((drawn, drawn))
        corner = (self.side - drawn) // 2
        image.paste(picture, (corner, corner), picture.getchannel("A"))

    def _scale(self, key: tuple[int, int]) -> Image:
        import PIL.Image

        picture = self._open(self.pack.pictures[key[0]].file, "RGBA")
        ratio = key[1] / max(picture.size)
        size = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
        return picture.resize(size, PIL.Image.Resampling.BILINEAR)

    def _line(self, image: Image, line: Line) -> None:
        from PIL import ImageDraw

        font = self._font(line.font, line.text, round(line.size * self.side))
        place = (round(line.x * self.side), round(line.y * self.side))
        ImageDraw.Draw(image).text(place, line.text, line.color, font, anchor="mm")

    def _font(self, number: int, text: str, size: int) -> FreeTypeFont:
        """The font at a size, or smaller where the text would not fit into the frame."""
        from PIL import ImageFont

        def load(key: tuple[int, int]) -> FreeTypeFont:
            return ImageFont.truetype(BytesIO(self.pack.files[self.pack.fonts[key[0]].file]), key[1])

        font = self._fonts.get_or_make((number, size), load)
        widest = 0.92 * self.side
        if (width := font.getlength(text)) > widest:
            font = self._fonts.get_or_make((number, max(6, int(size * widest / width))), load)
        return font

    def _chart(self, image: Image, chart: Chart) -> None:
        import numpy as np
        import PIL.Image

        values = np.asarray(self._open(self.pack.maps[chart.map].file, "L"))
        colors = np.full((256, 3), chart.land, dtype=np.uint8)
        colors[0], colors[1] = np.asarray(image)[0, 0], (60, 60, 60)
        colors[chart.region] = chart.mark
        drawn = PIL.Image.fromarray(colors[values])
        drawn.thumbnail((self.side, self.side))
        image.paste(drawn, ((self.side - drawn.width) // 2, (self.side - drawn.height) // 2))

    def _card(self, image: Image, card: Card) -> None:
        drawn = self._open(self.pack.shapes[card.shape].file, "RGB")
        image.paste(drawn.resize(image.size))
