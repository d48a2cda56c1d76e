from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bridges
from bridges.families import Clips, family_of
from mixers import TokenLayout
from tests.bridges import models
from tests.bridges.models import END, IMAGE, MERGE, START, VIDEO

FAMILY = family_of("qwen2_5_vl")
CONFIG = models.teacher("qwen2_5_vl").config

Row = list[models.Segment]


def clips(inputs: Any) -> Clips | None:
    return FAMILY.clips(CONFIG, inputs["input_ids"], inputs)


def expected(inputs: models.Inputs, rows: list[Row]) -> TokenLayout:
    """Lay the rows out from what they were made of."""
    length = inputs["input_ids"].shape[1]
    placed = []
    for number, row in enumerate(rows):
        at = int((inputs["attention_mask"][number] == 0).sum())  # padded on the left
        found = []
        for segment in row:
            if isinstance(segment, int):
                at += 1
                continue
            _, (t, h, w) = segment
            grid = (t, h // MERGE, w // MERGE)
            found.append((at, grid))
            at += grid[0] * grid[1] * grid[2]
        placed.append(found)
    return TokenLayout.from_grids(length, placed)


def assert_same_clips(found: Clips | TokenLayout, wanted: TokenLayout) -> None:
    """The numbers of clips may differ, what belongs together and where it stands may not."""
    assert found.clip is not None
    assert found.coords is not None
    assert torch.equal(found.clip >= 0, wanted.clip >= 0)
    vision = found.clip >= 0
    for ours, theirs in zip(found.clip, wanted.clip):
        same = [(clip[:, None] == clip) for clip in (ours, theirs)]
        assert torch.equal(*same)
    assert torch.equal(found.coords[vision], wanted.coords[vision])


sides = st.sampled_from([MERGE, 2 * MERGE, 3 * MERGE])
segments = st.one_of(
    st.integers(3, 110),
    st.tuples(st.just("image"), st.tuples(st.just(1), sides, sides)),
    st.tuples(st.just("video"), st.tuples(st.integers(1, 3), sides, sides)),
)


@given(st.lists(st.lists(segments, min_size=1, max_size=6), min_size=1, max_size=3))
def test_grids_are_found_where_they_were_put(rows: list[Row]) -> None:
    """In any mix of text, images and videos, adjacent ones included, and padded rows."""
    inputs = models.vision_batch(*rows)
    found, wanted = clips(inputs), expected(inputs, rows)
    if wanted.clip is None:
        assert found is None
    else:
        assert found is not None
        assert_same_clips(found, wanted)


def test_text_has_no_clips() -> None:
    assert clips(models.text_batch()) is None


def run_of(kind: str, tokens: int) -> torch.Tensor:
    token = IMAGE if kind == "image" else VIDEO
    return torch.tensor([[1, START, *[token] * tokens, END, 5]])


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize(
    ("tokens", "grids", "words"),
    [
        (6, None, "more .* tokens than"),
        (6, [], "more .* tokens than"),
        (6, [[1, 4, 4]], "more .* tokens than"),
        (6, [[1, 4, 8]], r"\(1, 2, 4\) = 8"),
        (6, [[1, 4, 6], [1, 4, 6]], "1 more than"),
        (0, [[1, 4, 6]], "1 more than"),
        (1, [[1, 1, 2]], "multiple of 2 patches"),
        (4, [[1, 5, 4]], "multiple of 2 patches"),
        (1, [[0, 2, 2]], "at least one temporal patch"),
        (1, [[1, 0, 2]], "multiple of 2 patches"),
    ],
)
def test_grids_that_do_not_fit_are_refused(kind: str, tokens: int, grids: Any, words: str) -> None:
    table = None if grids is None else torch.tensor(grids, dtype=torch.long).reshape(-1, 3)
    inputs = {"input_ids": run_of(kind, tokens), f"{kind}_grid_thw": table}
    with pytest.raises(bridges.LayoutCaptureError, match=words):
        clips(inputs)


def test_grids_without_ids_are_refused() -> None:
    with pytest.raises(bridges.LayoutCaptureError, match="input_ids"):
        FAMILY.clips(CONFIG, None, {"video_grid_thw": torch.tensor([[1, 4, 4]])})
    assert FAMILY.clips(CONFIG, None, {}) is None


def test_grids_of_one_kind_are_not_taken_for_the_other() -> None:
    inputs = {"input_ids": run_of("image", 4), "video_grid_thw": torch.tensor([[1, 4, 4]])}
    with pytest.raises(bridges.LayoutCaptureError, match="image tokens"):
        clips(inputs)
