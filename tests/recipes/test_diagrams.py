"""The pictures of the docs show the law of causality, the scan orders and the windows as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mixers
from mixers import TokenLayout
from recipes import diagrams

LAYOUT = TokenLayout.from_grids(
    14, [[(3, (1, 2, 2)), (9, (3, 1, 1))]], valid=torch.arange(14)[None] >= 1
)  # padding, two words, an image, two words, a video, two words


def law(layout: TokenLayout) -> torch.Tensor:
    """Where output i may depend on input j."""
    valid = torch.ones(layout.length, dtype=torch.bool) if layout.valid is None else layout.valid[0]
    may = torch.arange(layout.length)[None] < layout.end[0][:, None]
    return may & valid[None] & valid[:, None]


def test_flex_ma_depends_on_all_that_the_law_allows() -> None:
    mixer = mixers.build("flex_ma", dim=8, num_heads=1)
    assert torch.equal(diagrams.dependencies(mixer, LAYOUT), law(LAYOUT))


def test_attention_depends_on_what_came_before() -> None:
    mixer = mixers.build("attention", dim=8, num_heads=1)
    assert torch.equal(diagrams.dependencies(mixer, LAYOUT), law(LAYOUT).tril())


@pytest.mark.parametrize("name", ["swin3d", "mmate", "sliding_window"])
def test_no_mixer_depends_on_more_than_the_law_allows(name: str) -> None:
    mixer = mixers.build(name, dim=8, num_heads=1)
    depends = diagrams.dependencies(mixer, LAYOUT)
    assert not (depends & ~law(LAYOUT)).any()
    assert depends.any()


def test_asking_a_mixer_leaves_it_as_it_was() -> None:
    mixer = mixers.build("swin3d", dim=8, num_heads=1)
    diagrams.dependencies(mixer, LAYOUT)
    assert {p.dtype for p in mixer.parameters()} == {torch.float32}
    assert all(p.grad is None for p in mixer.parameters())


def test_any_grid_and_window_can_be_drawn(tmp_path: Path) -> None:
    diagrams.save(diagrams.scan_orders((1, 1, 2)), tmp_path / "new" / "orders.png")
    diagrams.save(diagrams.windows((1, 3, 5), (4, 4, 4), token=(0, 2, 4)), tmp_path / "windows.svg")
    diagrams.save(
        diagrams.reach(TokenLayout.text(1, 4), {"m": mixers.build("mmate", dim=8, num_heads=1)}),
        tmp_path / "r.png",
    )
    assert all(p.stat().st_size for p in tmp_path.rglob("*.*"))


def test_a_fingerprint_changes_with_what_is_shown() -> None:
    tokens = [(1, 3, 3), (1, 3, 3), (1, 3, 4), (0, 3, 3)]
    prints = [diagrams.fingerprint(diagrams.windows((2, 4, 6), (2, 4, 4), token)) for token in tokens]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
