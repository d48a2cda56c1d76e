"""The peers behind attention over gather tables give what the reference gives, and say where they cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixers import BackendError, TokenLayout
from mixers.blocks import Blocks
from mixers.ops import block_attention
from mixers.ops.window_attention import flex
from tests.helpers import assert_close


def layout() -> TokenLayout:
    valid = torch.ones(2, 300, dtype=torch.bool)
    valid[1, :30] = False
    return TokenLayout.from_grids(300, [[(4, (5, 6, 9))], [(50, (3, 8, 8))]], valid=valid)


TABLES = {
    "windows of 64": lambda rows: [rows.windows((4, 4, 4), True)],
    "windows of 30": lambda rows: [rows.windows((3, 5, 2))],
    "last 7": lambda rows: [rows.recent(7, text_only=False)],
    "last 200": lambda rows: [rows.recent(200, text_only=False)],
    "both": lambda rows: [rows.windows((4, 4, 4)), rows.recent(60, text_only=True)],
}


def inputs(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 300, heads, 16).to(device, dtype).requires_grad_() for heads in (4, 2, 2)]


def results(
    tensors: list[Tensor], tables: list[Blocks], backend: str, softcap: float | None = None
) -> list[Tensor]:
    y = block_attention(*tensors, tables, scale=0.3, softcap=softcap, backend=backend)
    weigh = torch.cos(torch.arange(y.numel(), device=y.device)).view_as(y).to(y)
    return [y, *torch.autograd.grad(y, tensors, weigh)]


@pytest.mark.parametrize("name", TABLES)
def test_flex_masks_what_the_tables_say(name: str) -> None:
    for table in TABLES[name](layout()):
        (groups, queries), keys = table.queries.shape, table.keys.shape[1]
        seen = flex.in_order(table.keys) >= 0
        mask = flex.block_mask(table, seen)
        i, j = torch.arange(len(flex.in_order(table.queries)))[:, None], torch.arange(len(seen))
        found = mask.mask_mod(torch.tensor(0), torch.tensor(0), i, j)
        allowed = (
            (table.keys >= 0)[:, None].expand(-1, queries, -1) if table.allowed is None else table.allowed
        )
        want = torch.block_diag(*allowed.float()).bool()
        assert torch.equal(found[: groups * queries, : groups * keys], want)
        visited = torch.zeros(len(i) // flex.TILE, len(seen) // flex.TILE, dtype=torch.bool)
        for row, (count, index) in enumerate(zip(mask.kv_num_blocks[0, 0], mask.kv_indices[0, 0])):
            visited[row, index[:count]] = True
        tiles = found.view(len(visited), flex.TILE, -1, flex.TILE).any(3).any(1)
        assert not (tiles & ~visited).any()


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("name", TABLES)
def test_flex_on_the_chip(name: str, softcap: float | None) -> None:
    tables = TABLES[name](layout().to("cuda"))
    tensors = inputs("cuda")
    for a, b in zip(*(results(tensors, tables, backend, softcap) for backend in ("reference", "flex"))):
        assert_close(name, a, b, 5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["windows of 64", "windows of 30"])
def test_xformers_on_the_chip(name: str) -> None:
    pytest.importorskip("xformers")
    tables = TABLES[name](layout().to("cuda"))
    exact, tensors = inputs("cuda", torch.float64), inputs("cuda", torch.bfloat16)
    try:
        found = results(tensors, tables, "xformers")
    except BackendError as error:
        pytest.skip(str(error))
    for a, b in zip(results(exact, tables, "reference"), found):
        assert_close(name, a, b, 2e-2)


@pytest.mark.parametrize("backend", ["flex", "xformers"])
def test_say_why_they_cannot_run(backend: str) -> None:
    with pytest.raises(BackendError, match=r"CUDA|not installed"):
        results(inputs(), TABLES["both"](layout()), backend)
