"""Where vision stands in every family that sees, told by what reaches the decoder.

The tower is replaced by one that passes each patch's painted place on, so that the embeddings say
which patch a token holds, by transformers' own packing.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

import bridges
from bridges.errors import LayoutFallbackWarning, warn_once
from mixers import TokenLayout
from tests.bridges import models, vlms
from tests.bridges.models import IMAGE, VIDEO
from tests.bridges.vlms import COLON, DIGIT, FRAME, LINE_BREAK, PATCH, Segment

VIEWS_APART = ("llava_onevision", "llava_next_video", "smolvlm", "idefics3")


class Painting(nn.Module):
    """A vision tower whose features are the mean colours of patches, and a 1 that marks vision."""

    def __init__(self, class_token: bool) -> None:
        super().__init__()
        self.class_token = class_token

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        colours = F.avg_pool2d(pixel_values, PATCH).flatten(2).transpose(1, 2)
        features = F.pad(F.pad(colours, (0, 1), value=1.0), (0, 60))
        if self.class_token:
            features = F.pad(features, (0, 0, 1, 0))
        return BaseModelOutputWithPooling(last_hidden_state=features, hidden_states=(features,))


class MeanOfFour(nn.Module):
    """Average the four patches that a pixel shuffle puts side by side."""

    def forward(self, features: Tensor) -> Tensor:
        return features.unflatten(-1, (4, -1)).mean(-2)


def _look(self: Any, pixels: Tensor, grid_thw: Tensor, **_: Any) -> Any:
    """Forward of Qwen's towers: the mean of the patches that make a token."""
    colours = pixels.view(-1, 4, 3, pixels.shape[1] // 3).mean((1, 3))
    features = F.pad(F.pad(colours, (0, 1), value=1.0), (0, 60))
    if hasattr(self, "deepstack_merger_list"):
        return BaseModelOutputWithDeepstackFeatures(
            pooler_output=features, deepstack_features=[torch.zeros_like(features)]
        )
    return BaseModelOutputWithPooling(pooler_output=features)


def painted(family: str, spec: Any = "mamba2") -> Any:
    """Return a converted model that sees places, and nothing in text."""
    model = models.converted(vlms.teacher(family), spec)
    inner = model.model
    nn.init.zeros_(model.get_input_embeddings().weight)
    if family.startswith("qwen"):
        inner.visual.forward = types.MethodType(_look, inner.visual)
    elif family in ("smolvlm", "idefics3"):
        inner.vision_model, inner.connector.modality_projection = Painting(False), MeanOfFour()
    else:
        inner.vision_tower = Painting(family in ("llava_next_video", "internvl"))
        if family == "gemma3":
            inner.multi_modal_projector.mm_soft_emb_norm = nn.Identity()
            inner.multi_modal_projector.mm_input_projection_weight = nn.Parameter(torch.eye(64))
        else:
            inner.multi_modal_projector = MeanOfFour() if family == "internvl" else nn.Identity()
    if family.startswith("llava"):
        nn.init.zeros_(inner.image_newline)
    return model


def seen_by(model: Any, call: Callable[[], Any]) -> tuple[Tensor, TokenLayout]:
    """Return the embeddings and the layout that the first pass of the decoder gets."""
    embeddings: list[Tensor] = []

    def note(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        embeddings.append(kwargs["inputs_embeds"])

    handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad(), models.layouts(model) as layouts:
            call()
    finally:
        handle.remove()
    return embeddings[0], layouts[0]


def assert_layout_is_what_was_seen(
    family: str, rows: Sequence[Sequence[Segment]], embeddings: Tensor, layout: TokenLayout
) -> None:
    vision = embeddings[..., 3] > 0.5
    assert vision.any()
    assert layout.clip is not None
    assert layout.coords is not None
    assert torch.equal(layout.clip >= 0, vision)
    copies = len(embeddings) // len(rows)
    for number, (places, clip, coords) in enumerate(zip(embeddings[..., :3], layout.clip, layout.coords)):
        row = rows[number // copies]
        code = places[:, 0].round().long()
        segment, frame = code // 16, code % 16
        clips = set()
        for at in sorted(set(segment[vision[number]].tolist())):
            kind = row[at - 1][0]  # type: ignore[index]
            of_segment = vision[number] & (segment == at)
            apart = kind == "image" and family in VIEWS_APART
            for view in sorted(set(frame[of_segment].tolist())) if apart else [None]:
                part = of_segment if view is None else of_segment & (frame == view)
                assert len(set(clip[part].tolist())) == 1
                clips.add(int(clip[part][0]))
                t = frame[part] if view is None else torch.zeros_like(frame[part])
                y, x = (_ranks(places[part, axis]) for axis in (1, 2))
                assert torch.equal(coords[part], torch.stack([t, y, x], 1))
        assert len(clips) == len(set(clip[vision[number]].tolist()))
        assert len(clips) == sum(
            len(set(frame[vision[number] & (segment == at)].tolist()))
            if row[at - 1][0] == "image" and family in VIEWS_APART  # type: ignore[index]
            else 1
            for at in set(segment[vision[number]].tolist())
        )


def _ranks(values: Tensor) -> Tensor:
    return torch.unique((values * 1e3).round(), return_inverse=True)[1]


LLAVA_SIZES = [(16, 16), (31, 32), (7, 40), (40, 7), (16, 47), (100, 99), (33, 21), (480, 640), (10, 300)]
MORE: dict[str, list[list[list[Segment]]]] = {
    "qwen": [
        [[("image", (1, 4, 4)), ("image", (1, 4, 6)), ("video", (3, 4, 4)), ("video", (1, 6, 4)), 3]],
        [[4, 5, 6], [("video", (2, 2, 2)), 7, ("image", (1, 2, 2)), 8], [9]],
    ],
    "llava": [[[1, ("image", size), 5], [("video", 3), 4, ("video", 3), 6]] for size in LLAVA_SIZES[::2]]
    + [[[1, ("image", size), 5], [3, 4, 5, ("image", size), 6]] for size in LLAVA_SIZES[1::2]],
    "llava_onevision": [
        [[1, ("image", (20, 30)), 5, ("image", (40, 10)), 6], [1, ("image", (20, 30)), 7], [5, 6]],
        [[("image", (20, 30)), ("image", (40, 10)), ("image", (9, 9)), 6]],
    ],
    "llava_next_video": [[[1, ("image", (20, 30)), ("image", (40, 10)), 6], [1, ("image", (9, 9)), 7]]],
    "tiles": [
        [[1, ("image", (3, 1)), 5], [1, ("image", (1, 3)), 6], [1, ("image", (2, 3)), ("image", (0, 0)), 6]],
        [[("image", (1, 2)), ("image", (2, 1)), 6, ("image", (2, 2)), 7], [8]],
        [
            [("image", (0, 0)), ("image", (0, 0)), ("image", (0, 0)), 6],
            [("video", 4), 3, 4, 5, ("video", 2), 3],
        ],
    ],
    "internvl": [
        [
            [("image", 1), ("image", 4), ("image", 1), ("image", 1), 6],
            [("video", 4), 3, 4, 5, ("video", 2), 3],
        ],
        [[1, 5, ("video", 10), 6, 7, 8]],
    ],
    "paligemma": [[[("image", None), 5, 6], [("image", None), ("image", None), ("image", None), 7]]],
    "gemma3": [[[("image", None), ("image", None), 5, 6], [3, 4, ("image", None), 7], [8]]],
}
GROUPS = {"qwen": "qwen", "llava": "llava", "smolvlm": "tiles", "idefics3": "tiles"}


def more_rows(family: str) -> list[list[list[Segment]]]:
    shared = [rows for prefix, group in GROUPS.items() if family.startswith(prefix) for rows in MORE[group]]
    return [vlms.ROWS[family], *shared, *MORE.get(family, [])]


@pytest.fixture(scope="module", params=vlms.VLMS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def painting(family: str) -> Any:
    return painted(family)


@pytest.mark.filterwarnings("ignore::bridges.LayoutFallbackWarning")
class TestPlaces:
    def test_forward(self, family: str, painting: Any) -> None:
        for rows in more_rows(family):
            inputs = vlms.collate(family, rows, painted=True)
            seen = seen_by(painting, lambda inputs=inputs: models.logits(painting, inputs))
            assert_layout_is_what_was_seen(family, rows, *seen)

    @pytest.mark.parametrize("beams", [1, 3])
    def test_generate(self, family: str, painting: Any, beams: int) -> None:
        for rows in more_rows(family):
            inputs = vlms.collate(family, rows, painted=True)
            seen = seen_by(
                painting, lambda inputs=inputs: models.generate(painting, inputs, 2, num_beams=beams)
            )
            assert_layout_is_what_was_seen(family, rows, *seen)


def layout_of(model: Any, inputs: models.Inputs) -> TokenLayout:
    with models.layouts(model) as seen:
        models.logits(model, inputs)
    return seen[0]


def clip_sizes(layout: TokenLayout) -> list[list[int]]:
    """Return the grid of each clip of a batch's only row, in order."""
    assert layout.clip is not None
    assert layout.coords is not None
    numbers = [n for n in dict.fromkeys(layout.clip[0].tolist()) if n >= 0]
    return [(layout.coords[0][layout.clip[0] == n].amax(0) + 1).tolist() for n in numbers]


@pytest.fixture
def internvl() -> Any:
    return models.converted(vlms.teacher("internvl"), "mamba2")


class TestFallbacks:
    """What is assumed where the model is not told, and the warning that says so."""

    @pytest.fixture(autouse=True)
    def _nothing_warned_yet(self) -> None:
        warn_once.cache_clear()

    @pytest.mark.parametrize("family", ["internvl", "smolvlm", "idefics3"])
    def test_frames_are_told_by_their_captions_with_a_warning(self, family: str) -> None:
        model = models.converted(vlms.teacher(family), "mamba2")
        inputs = vlms.collate(family, [[1, ("video", 3), 9]])
        with pytest.warns(LayoutFallbackWarning, match="captions"):
            layout = layout_of(model, inputs)
        assert clip_sizes(layout) == [[3, 2, 2]]
        with warnings.catch_warnings():  # it is said once
            warnings.simplefilter("error", LayoutFallbackWarning)
            models.generate(model, inputs, 2)

    def test_tiles_are_frames_with_a_warning(self, internvl: Any) -> None:
        with pytest.warns(LayoutFallbackWarning, match="arrangement"):
            layout = layout_of(internvl, vlms.collate("internvl", [[1, ("image", 5), 9]]))
        assert clip_sizes(layout) == [[5, 2, 2]]

    @pytest.mark.parametrize(
        ("captions", "frames"),
        [
            ([(FRAME, 8), (FRAME, 9), (FRAME, 1, 0), (FRAME, 1, 1)], [4]),
            ([(FRAME, 0), (FRAME, 1), (FRAME, 1), (FRAME, 2)], [4]),
            ([(FRAME, 0), (FRAME, 1), (5, 6, 7, FRAME, 0), (FRAME, 1)], [2, 2]),
            ([(FRAME, 0), (*range(43, 83), FRAME, 1)], [1, 1]),
        ],
        ids=["a digit more", "a second twice", "two videos", "far apart"],
    )
    @pytest.mark.filterwarnings("ignore::bridges.LayoutFallbackWarning")
    def test_captions(self, internvl: Any, captions: list[tuple[int, ...]], frames: list[int]) -> None:
        row: list[Segment] = [1]
        for caption in captions:
            row += [
                LINE_BREAK,
                *(DIGIT + c if c < 5 or c in (8, 9) else c for c in caption),
                COLON,
                ("image", 1),
            ]
        sizes = clip_sizes(layout_of(internvl, vlms.collate("internvl", [row])))
        assert sizes == [[t, 2, 2] for t in frames]

    def test_images_without_captions_stay_apart(self, internvl: Any) -> None:
        row: list[Segment] = [1, ("image", 1), LINE_BREAK, ("image", 1), LINE_BREAK, ("image", 1), 5]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layout = layout_of(internvl, vlms.collate("internvl", [row]))
        assert clip_sizes(layout) == [[1, 2, 2]] * 3

    def test_tiles_that_make_no_grid_are_read_alone(self) -> None:
        model = models.converted(vlms.teacher("smolvlm"), "mamba2")
        inputs = vlms.collate("smolvlm", [[1, ("image", (2, 2)), 9]])
        broken = inputs["input_ids"][0].tolist()
        broken.insert(broken.index(IMAGE) + 4, LINE_BREAK)  # between two tiles of a row
        inputs = {"input_ids": torch.tensor([broken]), "pixel_values": inputs["pixel_values"]}
        with pytest.warns(LayoutFallbackWarning, match="no full grid"):
            layout = layout_of(model, inputs)
        assert clip_sizes(layout) == [[1, 2, 2]] * 5

    def test_embeddings_without_ids_are_text(self, family: str) -> None:
        model = models.converted(vlms.teacher(family), "mamba2")
        embeddings = model.get_input_embeddings()(torch.arange(3, 11)[None]).detach()
        with pytest.warns(LayoutFallbackWarning, match="inputs_embeds"):
            assert layout_of(model, {"inputs_embeds": embeddings}).clip is None
        pixels = {n: t for n, t in vlms.batch(family).items() if "pixel" in n or "grid" in n or "sizes" in n}
        for call in (models.logits, models.generate):
            with pytest.raises(bridges.LayoutCaptureError, match="without input_ids"):
                call(model, {"inputs_embeds": embeddings, **pixels})

    @pytest.mark.parametrize("known", ["qwen2_vl", "qwen3_vl", "llava_onevision", "paligemma", "gemma3"])
    def test_no_warning_where_the_model_is_told(self, known: str) -> None:
        model = models.converted(vlms.teacher(known), "mamba2")
        with warnings.catch_warnings():
            warnings.simplefilter("error", LayoutFallbackWarning)
            models.generate(model, vlms.batch(known), 2)


def less(inputs: models.Inputs, name: str) -> models.Inputs:
    """Leave out the last entry of an input."""
    return {**inputs, name: inputs[name][:-1]}


def changed(inputs: models.Inputs, name: str, value: Any) -> models.Inputs:
    return {**inputs, name: value}


def without_a_token(inputs: models.Inputs, token: int) -> models.Inputs:
    """Turn the last token of a kind into text."""
    ids = inputs["input_ids"].clone()
    row, at = (ids == token).nonzero()[-1].tolist()
    ids[row, at] = 5
    return {**inputs, "input_ids": ids}


WRONG: list[tuple[str, Callable[[models.Inputs], models.Inputs], str]] = [
    ("qwen3_vl", lambda i: less(i, "video_grid_thw"), "more video tokens"),
    ("qwen3_vl", lambda i: without_a_token(i, VIDEO), r"are 5, but .* = 12 tokens, 6 a frame"),
    ("llava_onevision", lambda i: changed(i, "image_sizes", None), "more image tokens than image_sizes"),
    ("llava_onevision", lambda i: less(i, "image_sizes"), "more image tokens than image_sizes"),
    (
        "llava_onevision",
        lambda i: changed(i, "image_sizes", torch.tensor([[32, 32], [40, 10]])),
        r"are 12, but the next of image_sizes makes 40 tokens",
    ),
    ("llava_onevision", lambda i: without_a_token(i, VIDEO), r"are 8, but a video of 2 frames .* makes 9"),
    ("llava_onevision", lambda i: less(i, "pixel_values_videos"), "has 0 videos, the tokens 1"),
    ("llava_next_video", lambda i: without_a_token(i, VIDEO), r"are 7, but a video of 2 frames .* makes 8"),
    ("smolvlm", lambda i: without_a_token(i, IMAGE), r"are 3, but a tile of 16 pixels a side makes 4"),
    ("smolvlm", lambda i: less(i, "pixel_values"), "has 8 tiles, but there are tokens for 12"),
    ("internvl", lambda i: without_a_token(i, IMAGE), r"are 3, but a tile of 16 pixels a side makes 4"),
    ("internvl", lambda i: less(i, "pixel_values"), "has 7 tiles, but there are tokens for 8"),
    ("paligemma", lambda i: less(i, "pixel_values"), "has 2 images, but there are tokens for 3"),
    ("gemma3", lambda i: without_a_token(i, IMAGE), "are 3, but an image makes 4"),
]


@pytest.mark.filterwarnings("ignore::bridges.LayoutFallbackWarning")
@pytest.mark.parametrize("call", [models.logits, models.generate])
@pytest.mark.parametrize(
    ("name", "change", "words"), WRONG, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_does_not_fit_is_refused(name: str, change: Any, words: str, call: Any) -> None:
    model = models.converted(vlms.teacher(name), "mamba2")
    with pytest.raises(bridges.LayoutCaptureError, match=words):
        call(model, change(vlms.batch(name)))
