"""The gate: weights that sum to one over the branches that have something, shared or own projections."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mixers
from mixers import ConfigError, TokenLayout, TokenMixer
from tests.helpers import assert_close
from tests.mixers.strategies import Rows, rows
from tests.mixers.zoo import TINY, random_rotary, shaken, tiny

GATES = pytest.mark.parametrize("gate", ["token", "head"])
SHARED = pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])


def gated(**config: Any) -> TokenMixer:
    """Two windows of different size and a Flex-MA."""
    torch.manual_seed(0)
    branches = {
        "short": {"mixer": "sliding_window", "window": 2},
        "flex_ma": {},
        "sliding_window": {"window": 6},
    }
    return shaken(mixers.build("gated", **{**TINY, "branches": branches, **config}))


def gate_weights(mixer: TokenMixer, rows: Rows, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each branch is multiplied by, seen by letting every branch return ones where it has something."""
    for branch in mixer.branches.values():
        mixed = branch.mix_heads

        def ones(*args: Any, mixed: Any = mixed) -> tuple[torch.Tensor, torch.Tensor | None]:
            y, covered = mixed(*args)
            return torch.ones_like(y), covered

        branch.mix_heads = ones
    outputs, weights = mixer._branches(x, mixer.project(x), rows.layout, None, None)
    return {name: (weights[name] * y)[..., 0] for name, y in outputs.items()}


def test_the_bias_says_what_the_last_branch_starts_with() -> None:
    for bias, share in ((0.0, 0.5), (-3.0, 0.9526)):
        mixer = mixers.build("mmate", **TINY, gate="head", gate_bias=bias)
        assert_close(
            "share", torch.full((1, 4, 4), share), 1 - mixer.gate(torch.randn(1, 4, 24)).sigmoid(), 1e-4
        )


@GATES
@given(rows=rows())
def test_weights_sum_to_one(gate: str, rows: Rows) -> None:
    weights = gate_weights(gated(gate=gate), rows, torch.randn(*rows.shape, 24))
    assert list(weights) == ["short", "flex_ma", "sliding_window"]
    total = sum(weights.values())
    torch.testing.assert_close(total, torch.ones_like(total))
    assert all((w > 0).all() for w in weights.values())
    for w in weights.values():
        per_head = (w != w[..., :1]).any()
        assert bool(per_head) == (gate == "head")


@GATES
@given(rows=rows())
def test_a_branch_with_nothing_leaves_the_other_alone(gate: str, rows: Rows) -> None:
    """Local-Swin without a text window has nothing for text: there g is exactly 1."""
    mixer = tiny("mmate", text_window=0, gate=gate)
    weights = gate_weights(mixer, rows, torch.randn(*rows.shape, 24))
    text, vision = rows.valid & (rows.clip < 0), rows.clip >= 0
    assert (weights["flex_ma"][text] == 1).all()
    assert (weights["local_swin"][text] == 0).all()
    assert ((weights["flex_ma"][vision] > 0) & (weights["flex_ma"][vision] < 1)).all()


@given(rows=rows())
def test_what_no_branch_covers_is_zero_not_nan(rows: Rows) -> None:
    windows = {"one": {"mixer": "swin3d", "text_window": 0}, "two": {"mixer": "swin3d", "text_window": 0}}
    mixer = gated(branches=windows, out_bias=False)
    x = torch.randn(*rows.shape, 24, requires_grad=True)
    y = mixer(x, rows.layout)
    assert (y[rows.clip < 0] == 0).all()
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.isfinite(gradient).all()


def test_two_branches_are_a_sigmoid() -> None:
    mixer, x = tiny("mmate", out_bias=False), torch.randn(2, 9, 24)
    parts = {}
    for name in ("flex_ma", "local_swin"):
        mixer.set_active([name])
        parts[name] = mixer(x)
    mixer.set_active(None)
    g = torch.sigmoid(mixer.gate(x))
    assert_close("y", g * parts["flex_ma"] + (1 - g) * parts["local_swin"], mixer(x), 1e-5)


def test_branches_start_equal() -> None:
    mixer = mixers.build("gated", **TINY, branches={"flex_ma": {}, "swin3d": {}, "mamba2": {}})
    rows_ = Rows(*(f((1, 4)) for f in (torch.ones, torch.zeros)), -torch.ones(1, 4), torch.zeros(1, 4, 3))
    weights = gate_weights(mixer, rows_, torch.randn(1, 4, 24))
    for w in weights.values():
        torch.testing.assert_close(w, torch.full_like(w, 1 / 3))


@SHARED
@pytest.mark.parametrize("active", ["short", "flex_ma", "sliding_window"])
def test_one_active_branch_is_that_mixer_alone(shared: bool, active: str) -> None:
    mixer = gated(share_projections=shared, active=[active])
    settings = dict(mixer.config.branches[active])
    alone = mixers.build(settings.pop("mixer", active), **TINY, **settings)
    weights, prefix = mixer.state_dict(), f"branches.{active}."
    own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    common = {name: w for name, w in weights.items() if name.split(".")[0].endswith("_proj")}
    bias = {} if shared else {"o_proj.bias": weights["branches.short.o_proj.bias"]}
    alone.load_state_dict({**common, **own, **bias})
    layout, x = TokenLayout.from_grids(14, [[(3, (2, 2, 2))]] * 2), torch.randn(2, 14, 24)
    rotary = random_rotary(2, 14)
    assert_close("y", alone(x, layout, rotary), mixer(x, layout, rotary), 1e-5)


@SHARED
def test_inactive_branches_neither_run_nor_train(shared: bool) -> None:
    mixer, x = gated(share_projections=shared), torch.randn(1, 5, 24)
    mixer.set_active(["flex_ma", "short"])
    before = mixer(x)
    for p in mixer.branches["sliding_window"].parameters():
        p.data.fill_(float("nan"))
    assert torch.equal(mixer(x), before)
    mixer(x).sum().backward()
    grads = {n: p.grad for n, p in mixer.named_parameters()}
    assert all(g is None for n, g in grads.items() if n.startswith("branches.sliding_window."))
    assert grads["branches.flex_ma.decay.proj.weight"] is not None


def test_active_branches_are_saved_with_the_config() -> None:
    mixer = tiny("mmate")
    mixer.set_active(["flex_ma"])
    again = mixers.build("mmate", **mixer.config.to_dict())
    assert again.config.active == ("flex_ma",)
    mixer.set_active(None)
    assert mixer.config.active is None


def test_setting_active_on_one_layer_leaves_others_of_the_same_config() -> None:
    config = tiny("mmate").config
    one, two = (mixers.get("mmate")(config) for _ in range(2))
    one.set_active(["flex_ma"])
    assert two.config.active is config.active is None


@pytest.mark.parametrize(("names", "message"), [(["flexma"], "Did you mean 'flex_ma'"), ([], "at least one")])
def test_bad_active_branches_change_nothing(names: list[str], message: str) -> None:
    mixer = tiny("mmate")
    mixer.set_active(["local_swin"])
    with pytest.raises(ConfigError, match=message):
        mixer.set_active(names)
    assert mixer.config.active == ("local_swin",)


@SHARED
def test_projections_are_shared_or_own(shared: bool) -> None:
    names = set(dict(gated(share_projections=shared).named_parameters()))
    assert ("q_proj.weight" in names) == shared
    assert ("branches.flex_ma.q_proj.weight" in names) == (not shared)
    assert ("branches.short.o_proj.weight" in names) == (not shared)


@given(rows=rows(max_batch=1), active=st.sampled_from([None, ("flex_ma",), ("local_swin",)]))
def test_own_projections_that_are_equal_are_as_good_as_shared(rows: Rows, active: Any) -> None:
    shared, own = (tiny("mmate", share_projections=s, active=active, out_bias=False) for s in (True, False))
    weights = shared.state_dict()
    for name in list(weights):
        if name.split(".")[0] in ("q_proj", "k_proj", "v_proj", "o_proj"):
            value = weights.pop(name)
            weights |= {f"branches.{branch}.{name}": value for branch in shared.branches}
    own.load_state_dict(weights)
    x = torch.randn(*rows.shape, 24)
    assert_close("y", shared(x, rows.layout), own(x, rows.layout), 1e-5)


@pytest.mark.parametrize("active", [None, ["flex_ma"], ["local_swin"]])
def test_the_output_bias_counts_once(active: list[str] | None) -> None:
    """Whatever branches are active: the sum of the branches' outputs has one bias."""
    mixer = tiny("mmate", share_projections=False, active=active)
    for name, p in mixer.named_parameters():
        p.data.fill_(1 if name.endswith("o_proj.bias") else 0)
    y = mixer(torch.randn(1, 4, 24))
    torch.testing.assert_close(y, torch.ones_like(y))


def test_a_gated_mixer_may_be_a_branch() -> None:
    inner = {"mixer": "gated", "branches": {"flex_ma": {}, "sliding_window": {"window": 3}}}
    mixer = gated(branches={"inner": inner, "swin3d": {}})
    x = torch.randn(2, 9, 24)
    state = mixer.init_state(2)
    assert {"inner.flex_ma.ssd", "inner.sliding_window.k", "swin3d.k"} <= state.keys()
    with torch.no_grad():
        parts = [mixer(x[:, a:b], state=state) for a, b in ((0, 4), (4, 5), (5, 9))]
        assert_close("y", mixer(x), torch.cat(parts, dim=1), 1e-5)


def test_attention_as_a_branch_keeps_its_growing_state() -> None:
    mixer = gated(branches={"attention": {}, "flex_ma": {}})
    x, state = torch.randn(2, 9, 24), mixer.init_state(2)
    with torch.no_grad():
        parts = [mixer(x[:, a:b], state=state) for a, b in ((0, 4), (4, 5), (5, 9))]
        assert_close("y", mixer(x), torch.cat(parts, dim=1), 1e-5)
    assert state["attention.k"].shape[1] == 9


def test_building_leaves_the_given_branches_alone() -> None:
    branches = {"near": {"mixer": "swin3d", "window": [2, 2, 2]}, "flex_ma": {}}
    before = copy.deepcopy(branches)
    mixers.build("gated", **TINY, branches=branches)
    assert branches == before
