"""Attention weights: what they say is in an output is in it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mixers
from mixers import TokenLayout, TokenMixer
from mixers.mamba2 import Mamba2
from tests.helpers import assert_close
from tests.mixers.strategies import Rows, rows
from tests.mixers.zoo import AVERAGES, TINY, VARIANTS, random_rotary, tiny


def averaging(variant: str, layer: int) -> TokenMixer:
    """A variant whose scans leave values as they are and add no skip, so that weights say all."""
    mixer = tiny(variant, dtype=torch.float64, layer_idx=layer)
    for part in mixer.modules():
        if isinstance(part, Mamba2):
            with torch.no_grad():
                part.skip.zero_()
                if part.config.conv_size:
                    values = part.conv_weight[-part.num_kv_heads * part.head_dim :]
                    values.zero_()
                    values[:, -1] = 1
    return mixer


def random_case(rows: Rows) -> tuple[Tensor, Tensor]:
    """x, NaN at padding, and tokens to ask about, repeats among them."""
    torch.manual_seed(rows.shape[1])
    x = torch.randn(*rows.shape, TINY["dim"], dtype=torch.float64)
    x[~rows.valid] = float("nan")
    return x, torch.randint(rows.shape[1], (rows.shape[0], 2 * rows.shape[1]))


@pytest.mark.parametrize("variant", AVERAGES)
@given(rows=rows(holes=True), layer=st.integers(0, 5))
def test_outputs_are_values_by_their_weights(variant: str, rows: Rows, layer: int) -> None:
    mixer, layout = averaging(variant, layer), rows.layout
    x, queries = random_case(rows)
    rotary = random_rotary(*rows.shape, torch.float64)
    with torch.no_grad():
        weights = mixer.attention_weights(x, queries, layout, rotary)
        expected = mixer(x, layout, rotary)
        values = mixer.project(x.masked_fill(~rows.valid[..., None], 0))[2]
        values = values.repeat_interleave(mixer.num_heads // mixer.num_kv_heads, dim=2)
        made = mixer.o_proj(torch.einsum("bhqn,bnhp->bqhp", weights, values).flatten(2))
    row = torch.arange(rows.shape[0])[:, None]
    asked = rows.valid[row, queries]
    assert torch.isfinite(weights).all()
    assert_close("output", expected[row, queries][asked], made[asked], 1e-10)


@pytest.mark.parametrize("variant", AVERAGES)
@given(rows=rows(holes=True), layer=st.integers(0, 5))
def test_they_are_shares_of_what_the_law_allows(variant: str, rows: Rows, layer: int) -> None:
    """Not negative, nothing where causality forbids it, and one in sum; nothing at all only without a text window."""
    mixer = averaging(variant, layer)
    x, queries = random_case(rows)
    with torch.no_grad():
        weights = mixer.attention_weights(x, queries, rows.layout, random_rotary(*rows.shape, torch.float64))
    row = torch.arange(rows.shape[0])[:, None]
    asked, allowed = rows.valid[row, queries], rows.dependencies()[row, queries]
    assert (weights >= 0).all()
    assert (weights.masked_fill(allowed[:, None], 0).sum(-1).transpose(1, 2)[asked] == 0).all()
    total = weights.sum(-1).transpose(1, 2)[asked]
    if variant == "swin3d-paper":
        text = ~(rows.layout.vision[row, queries] if rows.layout.vision is not None else asked & False)[asked]
        assert (total[text] == 0).all()
        total = total[~text]
    assert_close("sum", torch.ones_like(total), total, 1e-12)


@pytest.mark.parametrize("variant", AVERAGES)
def test_a_layout_may_be_asked_about_one_token_after_another(variant: str) -> None:
    """What it keeps of one question, all layers' masks, is not taken for another's."""
    layers = [averaging(variant, layer) for layer in range(2)]
    x, rotary = torch.randn(1, 20, TINY["dim"], dtype=torch.float64), random_rotary(1, 20, torch.float64)
    layout = TokenLayout.from_grids(20, [[(4, (2, 2, 2))]])
    for token in (19, 6, 13, 3):
        queries = torch.tensor([[token, 8]])
        for mixer in layers:
            fresh = TokenLayout.from_grids(20, [[(4, (2, 2, 2))]])
            found, expected = (mixer.attention_weights(x, queries, at, rotary) for at in (layout, fresh))
            assert torch.equal(found, expected)


def test_a_branch_that_takes_no_part_has_no_weight() -> None:
    mixer = averaging("mmate", 0)
    x, queries = torch.randn(1, 30, TINY["dim"], dtype=torch.float64), torch.tensor([[29]])
    assert (mixer.attention_weights(x, queries)[0, :, 0] > 0).all()
    mixer.set_active(["local_swin"])
    weights = mixer.attention_weights(x, queries)[0, :, 0]
    assert (weights[:, -5:] > 0).all()
    assert (weights[:, 4:-5] == 0).all()  # the first four are sinks


@pytest.mark.parametrize("variant", ["flex_ma", "mmate-sinks"])
def test_gradients_reach_all_that_weighs(variant: str) -> None:
    mixer = averaging(variant, 1)
    layout = TokenLayout.from_grids(20, [[(4, (2, 2, 2))]])
    x, queries = torch.randn(1, 20, TINY["dim"], dtype=torch.float64), torch.tensor([[6, 13, 19]])
    weights = mixer.attention_weights(x, queries, layout, random_rotary(1, 20, torch.float64))
    (weights * torch.randn_like(weights)).sum().backward()
    values = ("v_proj", "o_proj", "skip")
    for name, parameter in mixer.named_parameters():
        if not any(part in name for part in values):
            assert parameter.grad is not None, name
            # Softmax does not see what is added to all keys.
            assert variant != "flex_ma" or name == "k_proj.bias" or parameter.grad.abs().max() > 1e-9, name


@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - set(AVERAGES)))
def test_mixers_that_are_no_average_say_so(variant: str) -> None:
    mixer = tiny(variant)
    assert not mixer.averages
    with pytest.raises(mixers.ConfigError, match="no average of values"):
        mixer.attention_weights(torch.randn(1, 4, TINY["dim"]), torch.tensor([[3]]))


@pytest.mark.parametrize(
    "queries", [torch.tensor([3]), torch.tensor([[3], [3]]), torch.tensor([[3.0]]), torch.tensor([[4]])]
)
def test_queries_must_be_tokens(queries: Tensor) -> None:
    with pytest.raises(mixers.ShapeError, match="queries"):
        tiny("attention").attention_weights(torch.randn(1, 4, TINY["dim"]), queries)
