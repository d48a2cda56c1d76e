"""Configs round-trip and refuse nonsense; a mixer checks its call before it computes anything."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import mixers
from mixers import ConfigError, LayoutError, ShapeError, StateError, TokenLayout, TokenMixer
from tests.mixers.zoo import TINY, VARIANTS, random_rotary, tiny

every_variant = pytest.mark.parametrize("variant", VARIANTS)


# Configs


@every_variant
def test_config_round_trips_through_json(variant: str) -> None:
    config = tiny(variant).config
    again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert type(again) is type(config)
    assert again.to_dict() == config.to_dict()


@every_variant
def test_a_mixer_built_again_from_its_config_takes_the_same_weights(variant: str) -> None:
    mixer = tiny(variant)
    name, _ = VARIANTS[variant]
    again = mixers.build(name, **json.loads(json.dumps(mixer.config.to_dict())))
    again.load_state_dict(mixer.state_dict())
    x, layout = torch.randn(1, 9, TINY["dim"]), TokenLayout.from_grids(9, [[(1, (1, 2, 3))]])
    assert torch.equal(again(x, layout), mixer(x, layout))


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({"dim": 256}, (2, 2, 128)),
        ({"dim": 256, "num_heads": 8}, (8, 8, 32)),
        ({"dim": 256, "num_heads": 8, "num_kv_heads": 2}, (8, 2, 32)),
        ({"dim": 256, "head_dim": 64}, (4, 4, 64)),
        ({"dim": 250, "num_heads": 8, "head_dim": 16}, (8, 8, 16)),
    ],
)
def test_head_defaults(given: dict[str, int], want: tuple[int, int, int]) -> None:
    config = mixers.MixerConfig(**given)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == want
    assert config.scale == want[2] ** -0.5


@pytest.mark.parametrize("name", mixers.available())
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 64, "num_head": 4}, "Did you mean 'num_heads'"),
        ({"dim": 64, "colour": "red"}, "no field 'colour'"),
        ({"num_heads": 4}, "needs dim"),
        ({"dim": 0}, "positive"),
        ({"dim": 64}, "not a multiple of head_dim 128"),
        ({"dim": 64, "num_heads": 5}, "not a multiple of num_heads 5"),
        ({"dim": 64, "num_heads": 0}, "not a multiple of num_heads 0"),
        ({"dim": 64, "num_heads": 4, "num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"dim": 64, "num_heads": 4, "num_kv_heads": 0}, "positive"),
        ({"dim": 64, "num_heads": 4, "head_dim": -16}, "positive"),
        ({"dim": 64, "num_heads": 4, "qk_norm": "layer"}, "'none', 'head', 'full'"),
        ({"dim": "64", "num_heads": 4}, "dim"),
        ({"dim": 64, "num_heads": 4.0}, "num_heads"),
        ({"dim": 64, "num_heads": 4, "layer_idx": "3"}, "layer_idx"),
        ({"dim": 64, "num_heads": 4, "qkv_bias": "yes"}, "qkv_bias"),
    ],
)
def test_bad_configs(name: str, fields: dict[str, Any], message: str) -> None:
    branches = {"branches": {"flex_ma": {}, "swin3d": {}}} if name == "gated" else {}
    with pytest.raises(ConfigError, match=message):
        mixers.build(name, **fields, **branches)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("sliding_window", {"window": 0}, "at least 1"),
        ("sliding_window", {"window": (4, 4)}, "window"),
        ("swin3d", {"window": (4, 4)}, "window"),
        ("swin3d", {"window": (4, 0, 4)}, "three"),
        ("swin3d", {"window": 4}, "window"),
        ("swin3d", {"text_window": -1}, "negative"),
        ("mmate", {"window": [4, 4, 4, 4]}, "window"),
        ("mmate", {"text_window": -1}, "negative"),
        ("mmate", {"gate": "tokens"}, "'token', 'head'"),
        ("mmate", {"scan": "spiral"}, "spiral"),
        ("mmate", {"active": ["flex"]}, "Did you mean 'flex_ma'"),
        ("mmate", {"active": []}, "at least one"),
        ("mamba2", {"decay": "heads"}, "'kv_head', 'head'"),
        ("mamba2", {"conv_size": -1}, "conv_size"),
        ("mamba2", {"memory": [0, 4096]}, "positive numbers of tokens"),
        ("mamba2", {"chunk_size": 0}, "chunk_size"),
        ("mamba2", {"feature_map": "relu"}, "feature_map"),
        ("mamba2", {"normalizer": "denominator"}, "softmax"),
        ("mamba2", {"features": 128}, "go with feature_map='softmax'"),
        ("flex_ma", {"features": 0}, "features must be positive"),
        ("flex_ma", {"feature_map": "none"}, "softmax"),
        ("bimamba2", {"scan": "raters"}, "raters"),
        ("gated", {}, "branches"),
        ("gated", {"branches": {"flex_ma": {}}}, "two branches"),
        ("gated", {"branches": {"flex_ma": {}, "near": {"mixer": "swin3d", "windows": 1}}}, "windows"),
        (
            "gated",
            {"branches": {"flex_ma": {}, "near": {"num_kv_heads": 1, "mixer": "swin3d"}}},
            "num_kv_heads",
        ),
        ("gated", {"branches": ["flex_ma", "swin3d"]}, "branches"),
    ],
)
def test_bad_fields_of_their_own(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mixers.build(name, dim=64, num_heads=4, **fields)


def test_an_unknown_mixer_in_a_branch() -> None:
    with pytest.raises(mixers.UnknownMixerError, match="Did you mean 'swin3d'"):
        mixers.build("gated", dim=64, num_heads=4, branches={"flex_ma": {}, "near": {"mixer": "swin3"}})


# Calls


@every_variant
@pytest.mark.parametrize("shape", [(5, 24), (1, 5, 23), (1, 1, 5, 24)])
def test_wrong_x(variant: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="x must be"):
        tiny(variant)(torch.zeros(shape))


@every_variant
@pytest.mark.parametrize("layout", [TokenLayout.text(1, 4), TokenLayout.text(2, 5)])
def test_a_layout_that_does_not_fit(variant: str, layout: TokenLayout) -> None:
    with pytest.raises(LayoutError, match="the layout is for"):
        tiny(variant)(torch.zeros(1, 5, 24), layout)


def test_a_layout_on_another_device() -> None:
    with pytest.raises(LayoutError, match=r"meta.*layout\.to"):
        tiny("mmate")(torch.zeros(1, 5, 24), TokenLayout.text(1, 5, device="meta"))


@every_variant
@pytest.mark.parametrize("shape", [(5, 8), (1, 4, 8), (2, 5, 8), (1, 5, 10), (1, 5, 7)])
def test_wrong_rotary(variant: str, shape: tuple[int, ...]) -> None:
    table = torch.zeros(shape)
    with pytest.raises(ShapeError, match="rotary"):
        tiny(variant)(torch.zeros(1, 5, 24), None, (table, table))


def test_rotary_tables_unlike_each_other() -> None:
    with pytest.raises(ShapeError, match="rotary"):
        tiny("attention")(torch.zeros(1, 5, 24), None, (torch.zeros(1, 5, 8), torch.zeros(1, 5, 4)))


@every_variant
def test_a_state_of_another_batch(variant: str) -> None:
    mixer = tiny(variant)
    state = mixer.init_state(2)
    if not state:
        return
    with pytest.raises(StateError, match="batch"):
        mixer(torch.zeros(1, 5, 24), state=state)


@every_variant
@pytest.mark.parametrize("other", ["attention", "sliding_window", "mamba2", "flex_ma", "mmate"])
def test_a_state_of_another_mixer(variant: str, other: str) -> None:
    mixer, state = tiny(variant), tiny(other, head_dim=4).init_state(1)
    before = {name: t.clone() for name, t in state.items()}
    with pytest.raises(StateError, match="another mixer"):
        mixer(torch.zeros(1, 5, 24), state=state)
    assert all(torch.equal(state[name], t) for name, t in before.items())


@every_variant
def test_rotary_of_one_row_serves_all(variant: str) -> None:
    mixer, x = tiny(variant), torch.randn(3, 7, 24)
    cos, sin = random_rotary(1, 7)
    assert torch.equal(
        mixer(x, rotary=(cos, sin)), mixer(x, rotary=(cos.expand(3, -1, -1), sin.expand(3, -1, -1)))
    )


@every_variant
def test_no_tokens(variant: str) -> None:
    mixer = tiny(variant)
    state = mixer.init_state(2)
    before = {name: t.clone() for name, t in state.items()}
    assert mixer(torch.zeros(2, 0, 24)).shape == (2, 0, 24)
    assert mixer(torch.zeros(2, 0, 24), state=state).shape == (2, 0, 24)
    assert all(torch.equal(state[name], t) for name, t in before.items())


@every_variant
def test_no_layout_means_text(variant: str) -> None:
    mixer, x = tiny(variant), torch.randn(2, 7, 24)
    assert torch.equal(mixer(x), mixer(x, TokenLayout.text(2, 7)))


# Heads


@pytest.mark.parametrize("heads", [(28, 4), (16, 2), (32, 8), (9, 3)])
@pytest.mark.parametrize("name", mixers.available())
def test_query_head_h_reads_kv_head_h_over_group(name: str, heads: tuple[int, int]) -> None:
    """Another key or value in KV head g changes the query heads of group g, and no other by a bit."""
    h, g = heads
    branches = {"branches": {"flex_ma": {}, "swin3d": {}}} if name == "gated" else {}
    torch.manual_seed(0)
    mixer: TokenMixer = mixers.build(name, dim=8, num_heads=h, num_kv_heads=g, head_dim=4, **branches)
    layout = TokenLayout.from_grids(9, [[(2, (1, 2, 2))]])
    x, q = torch.randn(1, 9, 8), torch.randn(1, 9, h, 4)
    k, v = (torch.randn(1, 9, g, 4) for _ in range(2))

    def mix(k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            return mixer.mix_heads(x, q, k, v, layout, None, None)[0]

    y = mix(k, v)
    assert y.shape == (1, 9, h, 4)
    for group in range(g):
        other = torch.randn(1, 9, 4)
        for which in (0, 1):
            changed = [k.clone(), v.clone()]
            changed[which][:, :, group] = other
            moved = (mix(*changed) != y).flatten(0, 1).any(0).any(-1)
            assert moved.tolist() == [head // (h // g) == group for head in range(h)]


@pytest.mark.parametrize("heads", [(28, 4), (16, 2), (32, 8), (9, 3)])
@pytest.mark.parametrize("name", ["attention", "sliding_window", "swin3d", "flex_ma", "mmate"])
def test_a_mean_of_constant_values_is_the_constant(name: str, heads: tuple[int, int]) -> None:
    """Where y is a weighted mean, a KV head that holds g everywhere comes out as g in its group."""
    h, g = heads
    mixer = mixers.build(
        name,
        dim=8,
        num_heads=h,
        num_kv_heads=g,
        head_dim=4,
        **({"conv_size": 0} if name in ("flex_ma", "mmate") else {}),
    )
    layout = TokenLayout.from_grids(9, [[(2, (1, 2, 2))]])
    x, q, k = torch.randn(1, 9, 8), torch.randn(1, 9, h, 4), torch.randn(1, 9, g, 4)
    v = torch.arange(1.0, g + 1)[:, None].expand(1, 9, g, 4)
    y, _ = mixer.mix_heads(x, q, k, v, layout, None, None)
    want = torch.arange(1.0, g + 1).repeat_interleave(h // g)[:, None].expand(1, 9, h, 4)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_after_prepare_no_table_is_left_to_make(
    variant: str, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer = tiny(variant)
    layout = TokenLayout.from_grids(20, [[(3, (2, 2, 3))], [(5, (1, 3, 4))]])
    mixer.prepare(layout, cached=cached)

    def made(*_: object, **__: object) -> None:
        raise AssertionError("a table was made in forward")

    for name in ("recent_blocks", "window_blocks", "composite"):
        monkeypatch.setattr(f"mixers.layout.{name}", made)
    mixer(torch.randn(2, 20, 24), layout, state=mixer.init_state(2) if cached else None)
