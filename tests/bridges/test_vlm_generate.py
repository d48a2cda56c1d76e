"""M-MATE inside ``generate()`` of every family that sees, all layers converted and the first one left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import bridges
import mixers
from mixers import TokenLayout
from tests.bridges import models, vlms
from tests.bridges.models import Inputs, generated
from tests.helpers import assert_close

pytestmark = pytest.mark.filterwarnings("ignore::bridges.LayoutFallbackWarning")

MMATE = {"mixer": "mmate", "text_window": 6, "window": (2, 2, 2), "chunk_size": 8}
SPECS: dict[str, Any] = {"all": {"*": MMATE}, "last": {"-1": MMATE}}


@pytest.fixture(scope="module", params=vlms.VLMS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=SPECS)
def spec(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str, spec: str) -> Any:
    return models.converted(vlms.teacher(family), SPECS[spec])


def assert_same(wanted: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(wanted[0], found[0])
    assert_close("logits", wanted[1], found[1], 1e-5)


def layout_of(model: Any, inputs: Inputs) -> TokenLayout:
    with models.layouts(model) as seen:
        models.logits(model, inputs)
    return seen[0]


def skip_if_the_prefix_is_cut(family: str, spec: str) -> None:
    if (family, spec) == ("paligemma", "last"):
        pytest.skip(
            "the teacher's layer attends in both directions within the whole prompt, so a cut changes it"
        )


def test_with_a_cache_as_without(family: str, model: Any) -> None:
    inputs = vlms.batch(family)
    assert_same(generated(model, inputs, 12, use_cache=False), generated(model, inputs, 12))


def test_beams_with_a_cache_as_without(family: str, model: Any) -> None:
    settings = {"num_beams": 3, "num_return_sequences": 2, "new_tokens": 5}
    tokens = [
        models.generate(model, vlms.batch(family), use_cache=cached, **settings) for cached in (True, False)
    ]
    assert torch.equal(*tokens)


def test_a_row_as_alone_without_padding(family: str, model: Any) -> None:
    tokens, logits = generated(model, vlms.batch(family))
    for row in range(2):
        alone = generated(model, vlms.row_of(family, row))
        assert_same((tokens[row : row + 1], logits[:, row : row + 1]), alone)


def test_prefill_in_chunks_that_end_between_clips(family: str, spec: str, model: Any) -> None:
    skip_if_the_prefix_is_cut(family, spec)
    inputs = vlms.row_of(family, 1)
    extent = layout_of(model, inputs).extent
    assert extent is not None
    inside = (extent[0, 1:] >= 0) & (extent[0, 1:] == extent[0, :-1])
    length = len(extent[0])
    fitting = [size for size in range(2, length) if not inside[size - 1 :: size].any()]
    wanted, found = generated(model, inputs), generated(model, inputs, prefill_chunk_size=fitting[0])
    assert_same(wanted, found)


def test_a_chunk_that_cuts_a_clip_is_refused(family: str, model: Any) -> None:
    with pytest.raises(mixers.LayoutError, match="goes through a clip"):
        models.generate(model, vlms.row_of(family, 1), prefill_chunk_size=4)


TURN: dict[str, list[vlms.Segment]] = {
    "llava_onevision": [1, ("image", (40, 10)), 3, ("image", (20, 30)), 7, 8]
}


@pytest.fixture
def turns(family: str, spec: str, model: Any) -> tuple[Inputs, Inputs, DynamicCache]:
    """Return the second turn's whole inputs, what of them is new, and the cache of the first turn."""
    skip_if_the_prefix_is_cut(family, spec)
    row = TURN.get(family, vlms.ROWS[family][1])
    image = next(segment for segment in row if not isinstance(segment, int))
    first = vlms.collate(family, [row])
    cache = DynamicCache(config=model.config)
    answer = generated(model, first, past_key_values=cache)[0][0].tolist()
    whole = vlms.collate(family, [[*row, *answer, 7, 9, image, 8, 5]])
    new = dict(whole)
    for name, table in first.items():
        if "pixel" in name or "grid" in name or name == "image_sizes":
            axis = 1 if name == "pixel_values" and family in ("smolvlm", "idefics3") else 0
            new[name] = whole[name].narrow(
                axis, table.shape[axis], whole[name].shape[axis] - table.shape[axis]
            )
    return whole, new, cache


def mrope(model: Any, whole: Inputs) -> Tensor:
    """Positions of text and of vision, which transformers cannot work out from the new grids alone."""
    known = {name: table for name, table in whole.items() if name in ("mm_token_type_ids", "image_grid_thw")}
    vision, _ = model.model.get_rope_index(whole["input_ids"], **known)
    return torch.cat([torch.arange(vision.shape[-1]).view(1, 1, -1), vision])


def test_a_new_image_in_a_later_turn_as_in_one_pass(family: str, model: Any, turns: Any) -> None:
    whole, new, cache = turns
    if family.startswith("qwen"):
        new["position_ids"] = mrope(model, whole)
    found = generated(model, new, past_key_values=cache)
    assert_same(generated(model, whole), found)


def test_a_later_turn_of_text_alone_as_in_one_pass(family: str, spec: str, model: Any) -> None:
    skip_if_the_prefix_is_cut(family, spec)
    row = vlms.ROWS[family][0]
    cache = DynamicCache(config=model.config)
    answer = generated(model, vlms.collate(family, [row]), past_key_values=cache)[0][0].tolist()
    whole = vlms.collate(family, [[*row, *answer, 7, 9, 8, 5]])
    text = {name: whole[name] for name in ("input_ids", "attention_mask")}
    found = generated(model, text, past_key_values=cache)
    assert_same(generated(model, whole), found)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"], scope="module")
def test_the_grids_of_all_turns_may_be_given(model: Any, turns: Any) -> None:
    whole, new, cache = turns
    with torch.no_grad():
        features = model.model.get_image_features(
            new.pop("pixel_values"), new["image_grid_thw"], return_dict=True
        )
    new = {**new, "image_grid_thw": whole["image_grid_thw"], "mm_encoder_outputs": {"image": features}}
    found = generated(model, new, past_key_values=cache)
    assert_same(generated(model, whole), found)


def test_the_identity_bridge(family: str) -> None:
    """Images that see both ways in the teacher do so in its twin."""
    if family == "paligemma":
        pytest.skip("its prefix sees both ways, which is refused")
    teacher, inputs = vlms.teacher(family), vlms.batch(family)
    twin = models.converted(teacher, "attention")
    wanted, found = (models.at_tokens(models.logits(one, inputs), inputs) for one in (teacher, twin))
    assert_close("logits", wanted, found, 1e-5)
    assert_same(generated(teacher, inputs), generated(twin, inputs))


def test_what_a_mixer_cannot_see_of_an_image_is_said() -> None:
    def dropped(name: str, mixer: str) -> set[str]:
        report = bridges.plan(vlms.teacher(name), mixer)
        return {row.name for layer in report.layers for row in layer.transfers if row.action == "dropped"}

    image, prefix = (
        f"attention in both directions within {what}" for what in ("an image", "the text of the prefix")
    )
    assert image in dropped("gemma3", "mamba2")
    assert image not in dropped("gemma3", "mmate")
    assert dropped("paligemma", "mamba2") == {image, prefix}
    assert dropped("paligemma", "mmate") == {prefix}
    with pytest.raises(bridges.UnsupportedAttentionError, match="prefix"):
        bridges.plan(vlms.teacher("paligemma"), "attention")
