"""TokenLayout: its constructors, what it refuses, its tables, and that it travels."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixers import LayoutError, TokenLayout
from tests.mixers.strategies import Rows, rows

TABLES = ("valid", "sequence", "clip", "coords")


def assert_same(a: TokenLayout, b: TokenLayout) -> None:
    assert (a.batch_size, a.length) == (b.batch_size, b.length)
    for name in TABLES:
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None), name
        assert left is None or torch.equal(left, right), name


# Constructors


def test_text_has_no_tables() -> None:
    layout = TokenLayout.text(2, 5)
    assert all(getattr(layout, name) is None for name in (*TABLES, "vision", "extent"))
    assert layout.end.tolist() == [[1, 2, 3, 4, 5]] * 2
    scan = layout.scan("hwt")
    assert scan.order is None
    assert scan.run is None


def test_mask() -> None:
    layout = TokenLayout.from_mask(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]))
    assert layout.valid.tolist() == [[False, False, True, True], [True, True, True, False]]
    assert layout.padding.tolist() == [[True, True, False, False], [False, False, False, True]]
    full = TokenLayout.from_mask(torch.ones(2, 3))
    assert full.valid is full.padding is None


@pytest.mark.parametrize("kind", [list, torch.tensor, lambda c: torch.tensor(c, dtype=torch.int32)])
def test_packed(kind: Any) -> None:
    layout = TokenLayout.packed(kind([0, 2, 2, 5]))
    assert (layout.batch_size, layout.length) == (1, 5)
    same = layout.sequence[0][:, None] == layout.sequence[0]
    assert same.tolist() == torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool().tolist()


def test_grids() -> None:
    layout = TokenLayout.from_grids(9, [[(1, (2, 1, 2)), (6, (1, 1, 1))], [(0, (1, 3, 3))]])
    assert layout.clip.tolist() == [[-1, 0, 0, 0, 0, -1, 1, -1, -1], [0] * 9]
    assert layout.coords[0, 1:5].tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]
    assert layout.coords[1].tolist() == [[0, h, w] for h in range(3) for w in range(3)]
    assert layout.end.tolist() == [[1, 5, 5, 5, 5, 6, 7, 8, 9], [9] * 9]


def test_no_vision_token_means_no_clip() -> None:
    layout = TokenLayout(1, 3, clip=torch.full((1, 3), -1), coords=torch.zeros(1, 3, 3))
    assert layout.clip is None
    assert layout.windows((2, 2, 2)) is None


def test_no_tokens() -> None:
    layout = TokenLayout.from_mask(torch.ones(2, 0))
    assert layout.length == 0
    assert layout.recent(4, text_only=False) is None
    assert layout.end.shape == (2, 0)


# What is refused


def text_tables(**changes: Any) -> dict[str, Tensor]:
    clip = torch.tensor([[-1, 0, 0, -1, 1, 1]])
    coords = torch.zeros(1, 6, 3, dtype=torch.long)
    coords[0, :, 2] = torch.arange(6)
    return {"clip": clip, "coords": coords, **{k: torch.as_tensor(v) for k, v in changes.items()}}


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("valid must be", {"valid": [[True] * 5]}),
        ("valid must be", {"valid": [True] * 6}),
        ("sequence must be", {"sequence": [[0] * 7]}),
        ("clip must be", {"clip": [[0, 0]]}),
        ("coords must be", {"coords": [[[0, 0, 0]]]}),
        ("vision token stands at padding", {"valid": [[True, True, False, True, True, True]]}),
        ("interleave", {"clip": [[-1, 0, 1, 0, 1, -1]]}),
        ("interleave", {"clip": [[0, 1, 1, 0, -1, -1]]}),
        ("must not be negative", {"coords": [[[0, 0, c] for c in (0, 1, 2, 3, -1, 5)]]}),
        ("same", {"coords": [[[0, 0, c] for c in (0, 1, 1, 3, 4, 5)]]}),
        ("crosses", {"sequence": [[0, 0, 1, 1, 1, 1]]}),
        ("must not fall", {"sequence": [[1, 1, 1, 0, 0, 0]]}),
    ],
)
def test_contradictions(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(LayoutError, match=message):
        TokenLayout(1, 6, **text_tables(**changes))


def test_the_tables_that_contradictions_change_are_good() -> None:
    TokenLayout(1, 6, **text_tables())


@pytest.mark.parametrize("missing", ["clip", "coords"])
def test_clip_and_coords_come_together(missing: str) -> None:
    tables = text_tables()
    del tables[missing]
    with pytest.raises(LayoutError, match="come together"):
        TokenLayout(1, 6, **tables)


def test_sequence_numbers_at_padding_do_not_count() -> None:
    valid = torch.tensor([[False, True, True, False, True, False]])
    layout = TokenLayout(1, 6, valid=valid, sequence=torch.tensor([[9, 1, 1, 0, 2, -5]]))
    assert layout.sequence.tolist() == [[1, 1, 1, 1, 2, 2]]


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        ([(0, (0, 2, 2))], "does not fit"),
        ([(-1, (1, 1, 2))], "does not fit"),
        ([(3, (1, 2, 2))], "does not fit"),
        ([(0, (1, 2, 2)), (3, (1, 1, 1))], "overlaps"),
    ],
)
def test_bad_grids(clips: list[tuple[int, tuple[int, int, int]]], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        TokenLayout.from_grids(6, [clips])


@pytest.mark.parametrize("bounds", [[], [0], [1, 3], [0, 3, 2], 5, [[0, 2]]])
def test_bad_cumulative_lengths(bounds: Any) -> None:
    with pytest.raises(LayoutError, match="cu_seqlens"):
        TokenLayout.packed(bounds)


def test_bad_mask() -> None:
    with pytest.raises(LayoutError, match="attention_mask"):
        TokenLayout.from_mask(torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize("axes", ["th", "tth", "xyz", ""])
def test_bad_axes(axes: str) -> None:
    with pytest.raises(LayoutError, match="permutation"):
        TokenLayout.text(1, 3).scan(axes)


# Its tables


@given(rows=rows(holes=True))
def test_end_and_extent(rows: Rows) -> None:
    layout = rows.layout
    for row in range(rows.shape[0]):
        spans = rows.extents(row)
        for i in range(rows.shape[1]):
            inside = [span for span in spans if span[0] <= i < span[1]]
            assert layout.end[row, i] == (inside[0][1] if inside else i + 1)
            if layout.extent is not None:
                number = rows.clip[row, inside[0][0]] if inside else -1
                assert layout.extent[row, i] == number


def test_text_inside_a_clip_has_the_end_of_the_clip() -> None:
    coords = torch.zeros(1, 6, 3, dtype=torch.long)
    coords[0, 4, 0] = 1
    layout = TokenLayout(1, 6, clip=torch.tensor([[-1, 7, -1, -1, 7, -1]]), coords=coords)
    assert layout.end.tolist() == [[1, 5, 5, 5, 5, 6]]
    assert layout.vision.tolist() == [[False, True, False, False, True, False]]


@given(rows=rows(holes=True))
def test_runs_end_at_every_edge(rows: Rows) -> None:
    run, layout = rows.layout.scan().run, rows.layout
    if run is None:
        assert layout.valid is layout.clip is None
        return
    for row in range(rows.shape[0]):
        for i in range(1, rows.shape[1]):
            valid, clip = rows.valid[row, i - 1 : i + 1], rows.clip[row, i - 1 : i + 1]
            edge = bool(valid[0] != valid[1]) or bool(clip[0] != clip[1])
            if valid.all():
                edge |= bool(rows.sequence[row, i - 1] != rows.sequence[row, i])
            if valid.any():
                assert bool(run[row, i] != run[row, i - 1]) == edge


# It travels


@given(rows=rows())
def test_pickle_and_copies(rows: Rows) -> None:
    layout = rows.layout
    layout.scan("hwt")
    layout.windows((2, 2, 2))
    layout.recent(3, text_only=True)
    for other in (pickle.loads(pickle.dumps(layout)), copy.copy(layout), copy.deepcopy(layout)):
        assert_same(layout, other)
        assert torch.equal(layout.end, other.end)


def test_to_another_device() -> None:
    layout = TokenLayout.from_grids(9, [[(1, (2, 2, 2))]])
    layout.scan("hwt")
    moved = layout.to("meta")
    assert layout.to("cpu") is layout
    assert moved.device.type == moved.clip.device.type == "meta"
    assert layout.scan("hwt").order.device.type == "cpu"


@pytest.mark.gpu
def test_to_cuda() -> None:
    layout = TokenLayout.from_grids(9, [[(1, (2, 2, 2))]])
    moved = layout.to("cuda")
    assert moved.device == moved.clip.device
    assert moved.to("cuda") is moved.to(moved.clip.device) is moved
    for table in (moved.end, moved.scan("hwt").order, moved.windows((2, 2, 2)).queries):
        assert table.is_cuda
    assert torch.equal(moved.end.cpu(), layout.end)


def test_tables_are_computed_once() -> None:
    layout = TokenLayout.from_grids(9, [[(1, (2, 2, 2))]])
    assert layout.scan("hwt") is layout.scan("hwt")
    assert layout.windows((2, 2, 2), True) is layout.windows((2, 2, 2), True)
    assert layout.windows((2, 2, 2), True) is not layout.windows((2, 2, 2), False)
    assert layout.recent(4, text_only=True) is layout.recent(4, text_only=True)


def test_repr_says_what_it_is() -> None:
    layout = TokenLayout.from_grids(9, [[(1, (2, 1, 1)), (4, (1, 1, 1))], [(0, (1, 2, 2))]])
    assert "clips=3" in repr(layout)
    assert "padded=False" in repr(layout)


# Parts of it


@given(rows=rows(), data=st.data())
def test_select(rows: Rows, data: st.DataObject) -> None:
    batch, length = rows.shape
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4)))
    start, stop = sorted(data.draw(st.tuples(*[st.sampled_from([0, *rows.cuts(), length])] * 2)))
    part = rows.layout.select(chosen, slice(start, stop))
    want = Rows(*(t[chosen, start:stop] for t in (rows.valid, rows.sequence, rows.clip, rows.coords)))
    assert (part.batch_size, part.length) == want.shape
    for table, expected, text in (("clip", want.clip, -1), ("valid", want.valid, True)):
        found = getattr(part, table)
        assert torch.equal(torch.full_like(expected, text) if found is None else found, expected)
    assert torch.equal(part.sequence[want.valid], want.sequence[want.valid])
    if part.clip is not None:
        assert torch.equal(part.coords[want.clip >= 0], want.coords[want.clip >= 0])


@given(rows=rows(), data=st.data())
def test_select_through_a_clip_is_refused(rows: Rows, data: st.DataObject) -> None:
    inside = sorted(set(range(1, rows.shape[1])) - set(rows.cuts()))
    if not inside:
        return
    cut = data.draw(st.sampled_from(inside))
    for tokens in (slice(0, cut), slice(cut, None)):
        with pytest.raises(LayoutError, match="goes through a clip"):
            rows.layout.select(tokens=tokens)


def test_select_with_a_step_is_refused() -> None:
    with pytest.raises(LayoutError, match="contiguous"):
        TokenLayout.text(1, 6).select(tokens=slice(0, 6, 2))
