"""Gather tables: who looks at whom, the same pairs the other way round, and how large the tables are."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from mixers import TokenLayout
from mixers.blocks import Blocks
from tests.mixers.strategies import Rows, rows


def pairs(blocks: Blocks) -> list[tuple[int, int]]:
    """List every (query, key) that the table lets look at each other, as often as it does."""
    found = []
    allowed = blocks.allowed
    for block, (queries, keys) in enumerate(zip(blocks.queries.tolist(), blocks.keys.tolist())):
        for i, query in enumerate(queries):
            for j, key in enumerate(keys):
                if query >= 0 and key >= 0 and (allowed is None or bool(allowed[block, i, j])):
                    found.append((query, key))
    return sorted(found)


def check(blocks: Blocks | None, tokens: int) -> None:
    if blocks is None:
        return
    assert blocks.transposed is not None
    assert blocks.idle is not None
    back = blocks.transposed
    assert pairs(blocks) == sorted((query, key) for key, query in pairs(back))
    for table in (blocks, back):
        members = table.queries[table.queries >= 0]
        if table.idle is not None:
            assert sorted([*members.tolist(), *table.idle.tolist()]) == list(range(tokens))
        assert table.count == len(members) == len(members.unique())
    assert set(back.queries[back.queries >= 0].tolist()) == {key for _, key in pairs(blocks)}


@given(rows=rows(holes=True), size=st.tuples(*[st.integers(1, 3)] * 3), history=st.integers(0, 3))
def test_windows(rows: Rows, size: tuple[int, int, int], history: int) -> None:
    plain, moved = (rows.layout.windows(size, True, history=h) for h in (0, history))
    check(moved, rows.valid.numel())
    if plain is None or moved is None:
        return
    length = rows.shape[1]
    shifted = [(q, k + (k // length + 1) * history) for q, k in pairs(plain)]
    assert pairs(moved) == sorted(shifted)


@given(rows=rows(holes=True), window=st.integers(1, 9), text_only=st.booleans(), history=st.integers(0, 4))
def test_last_tokens(rows: Rows, window: int, text_only: bool, history: int) -> None:
    check(rows.layout.recent(window, text_only=text_only, history=history), rows.valid.numel())


def test_tables_grow_with_the_row_alone() -> None:
    length = 20_000
    layout = TokenLayout.from_grids(length, [[(100, (4, 60, 60))]])
    for blocks in (layout.windows((4, 4, 4)), layout.recent(128, text_only=False)):
        assert blocks is not None
        assert blocks.transposed is not None
        for table in (blocks, blocks.transposed):
            held = [table.queries, table.keys, table.first, table.stop, table.idle]
            held = [t for t in held if t is not None]
            assert sum(t.numel() for t in held) < 6 * length
            assert all(t.dtype == torch.int32 for t in held)


def test_without_gradients_there_is_no_transpose() -> None:
    with torch.no_grad():
        blocks = TokenLayout.text(1, 9).recent(4, text_only=False)
    assert blocks is not None
    assert blocks.transposed is None
