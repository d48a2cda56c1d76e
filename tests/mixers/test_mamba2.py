"""``mamba2``, ``bimamba2`` and ``flex_ma`` against the dense sums, and their parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import mixers
from mixers import ROTARY_MAJOR_SCAN, TokenLayout
from mixers.rotary import apply_rotary
from tests.helpers import assert_close
from tests.mixers.oracles import dense_ssd, naive_conv
from tests.mixers.strategies import Rows, rows
from tests.mixers.zoo import TINY, random_rotary, tiny

WITH_CONV = ["mamba2", "bimamba2", "flex_ma"]


@pytest.mark.parametrize(
    "variant", ["mamba2", "mamba2-head-decay", "bimamba2", "bimamba2-l2", "flex_ma", "flex_ma-features"]
)
@given(rows=rows(max_batch=2), layer=st.integers(0, 3))
def test_is_the_dense_sums(variant: str, rows: Rows, layer: int) -> None:
    """The whole block, written out: convolution, rotary, feature map, sums, skip, norm, gate."""
    mixer = tiny(variant, dtype=torch.float64, layer_idx=layer)
    cfg, heads = mixer.config, (mixer.num_heads, mixer.num_kv_heads)
    x = torch.randn(*rows.shape, 24, dtype=torch.float64)
    x = x * rows.valid[..., None]
    rotary = random_rotary(*rows.shape, torch.float64)
    axes = ROTARY_MAJOR_SCAN[layer % 4] if getattr(cfg, "scan", "raster") == "rms" else "thw"

    q, k, v = mixer.project(x)
    if cfg.conv_size:
        joined = torch.cat([t.flatten(2) for t in (q, k, v)], dim=-1)
        joined = naive_conv(joined, mixer.conv_weight, rows, axes).unflatten(-1, (-1, 8))
        q, k, v = joined.split([heads[0], heads[1], heads[1]], dim=2)
    q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
    if cfg.feature_map == "softmax":
        q, k = torch.einsum("bnhp,hpr->bnhr", q, mixer.c_map), torch.einsum("bngp,gpr->bngr", k, mixer.b_map)
        q, k = (torch.cat([F.softmax(t, -1), F.softmax(-t, -1)], -1) for t in (q, k))
    elif cfg.feature_map == "l2":
        q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
    else:
        q = q * mixer.scale

    def decay(module: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        dt = torch.log1p(torch.exp(module.proj(x) + module.rates.dt_bias))
        return -module.rates.A_log.exp() * dt, dt

    both = decay(mixer.backward_decay) if variant not in ("mamba2", "mamba2-head-decay") else None
    mean = cfg.normalizer == "denominator"
    y, _ = dense_ssd(q, k, v, decay(mixer.decay), both, rows, axes, denominator=mean)
    y = y + mixer.skip[:, None] * v.repeat_interleave(heads[0] // heads[1], dim=2)
    if cfg.normalizer == "rms":
        y = y / (y.square().mean(-1, keepdim=True) + cfg.norm_eps).sqrt() * mixer.norm_weight
    if cfg.output_gate:
        y = y * F.silu(mixer.gate_proj(x)).unflatten(-1, (-1, 8))
    found = mixer(x, rows.layout, rotary)
    assert_close("y", mixer.o_proj(y.flatten(2))[rows.valid], found[rows.valid], 1e-9)


@pytest.mark.parametrize("name", WITH_CONV)
@given(rows=rows(max_batch=2))
def test_convolution_is_the_identity_at_init(name: str, rows: Rows) -> None:
    torch.manual_seed(0)
    plain, conv = (mixers.build(name, **TINY, conv_size=size) for size in (0, 4))
    conv.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(*rows.shape, 24)
    assert torch.equal(plain(x, rows.layout)[rows.valid], conv(x, rows.layout)[rows.valid])


def test_output_gate_is_one_at_init() -> None:
    mixer = mixers.build("mamba2", **TINY)
    gate = F.silu(mixer.gate_proj.bias)
    torch.testing.assert_close(gate, torch.ones_like(gate), rtol=0, atol=1e-3)


def test_denominator_gives_a_mean_of_values() -> None:
    mixer = tiny("flex_ma", conv_size=0)
    mixer.skip.data.zero_()
    x, layout = torch.randn(1, 30, 24), TokenLayout.from_grids(30, [[(5, (2, 3, 3))]])
    q, k, v = mixer.project(x)
    y, _ = mixer.mix_heads(x, q, k, v, layout, None, None)
    low, high = (f(v.repeat_interleave(2, dim=2), dim=1, keepdim=True)[0] for f in (torch.min, torch.max))
    assert ((y >= low - 1e-4) & (y <= high + 1e-4)).all()


def test_rms_order_follows_the_layer() -> None:
    """Layers a multiple of four apart read alike, others do not."""
    layout, x = TokenLayout.from_grids(20, [[(1, (2, 3, 3))]]), torch.randn(1, 20, 24)
    y = [tiny("flex_ma", layer_idx=layer)(x, layout) for layer in range(5)]
    assert torch.equal(y[0], y[4])
    for layer in range(1, 4):
        assert not torch.allclose(y[0], y[layer], atol=1e-4)
    raster = [tiny("bimamba2", layer_idx=layer)(x, layout) for layer in range(2)]
    assert torch.equal(*raster)


def test_without_backward_it_is_mamba2() -> None:
    one, two = tiny("mamba2"), tiny("bimamba2", backward=False)
    two.load_state_dict(one.state_dict())
    layout, x = TokenLayout.from_grids(20, [[(1, (2, 3, 3))]]), torch.randn(1, 20, 24)
    assert torch.equal(one(x, layout), two(x, layout))


@pytest.mark.parametrize(("decay", "per"), [("kv_head", 2), ("head", 4)])
def test_decay_is_per_head_or_kv_head(decay: str, per: int) -> None:
    mixer = tiny("flex_ma", decay=decay)
    assert mixer.decay.rates.A_log.shape == mixer.backward_decay.rates.A_log.shape == (per,)
    state = mixer.init_state(3)
    assert state["ssd"].shape == (3, per, 16, 9)
    assert state["conv"].shape == (3, 3, (4 + 2 * 2) * 8)


def test_flex_ma_is_bimamba2_with_its_settings() -> None:
    settings = {"scan": "rms", "feature_map": "softmax", "normalizer": "denominator", "output_gate": False}
    flex, bi = tiny("flex_ma", layer_idx=1), tiny("bimamba2", layer_idx=1, **settings)
    bi.load_state_dict(flex.state_dict())
    layout, x = TokenLayout.from_grids(20, [[(1, (2, 3, 3))]]), torch.randn(1, 20, 24)
    assert torch.equal(flex(x, layout), bi(x, layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_begin_with_the_head_and_go_on_with_rotations_of_it_alike_in_queries_and_keys(
    dtype: torch.dtype,
) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        mixer = mixers.build("flex_ma", **TINY, features=20)
    finally:
        torch.set_default_dtype(before)
    for maps, heads in ((mixer.c_map, 4), (mixer.b_map, 2)):
        assert maps.shape == (heads, 8, 20)
        assert maps.dtype == dtype
        first, second, third = (t.double() for t in maps.split([8, 8, 4], dim=2))
        unit = torch.eye(8, dtype=torch.float64).expand_as(first)
        assert torch.equal(first, unit)
        assert_close("rotation", unit, second.mT @ second, 1e-2 if dtype == torch.bfloat16 else 1e-6)
        assert_close(
            "part of one", unit[:, :4, :4], third.mT @ third, 1e-2 if dtype == torch.bfloat16 else 1e-6
        )
    assert torch.equal(mixer.c_map, mixer.b_map.repeat_interleave(2, dim=0))
    assert mixer.c_map.data_ptr() != mixer.b_map.data_ptr()
    assert mixers.build("flex_ma", **TINY, features=5).c_map.shape == (4, 8, 5)
    with torch.device("meta"):
        assert mixers.build("flex_ma", **TINY, features=20).b_map.shape == (2, 8, 20)
