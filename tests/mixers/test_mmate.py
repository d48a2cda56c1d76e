"""``mmate`` is a gate over Flex-MA and Local-Swin, and nothing else."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

import mixers
from mixers import TokenLayout
from mixers.flex_ma import FlexMA, FlexMAConfig
from mixers.gated import GateConfig
from mixers.swin3d import Swin3D, Swin3DConfig
from tests.mixers.zoo import TINY, random_rotary, shaken

CHANGED = {
    "decay": "head",
    "conv_size": 2,
    "output_gate": True,
    "rotary": True,
    "chunk_size": 16,
    "scan": "raster",
    "backward": False,
    "window": (2, 3, 4),
    "shift": False,
    "text_window": 9,
    "layer_idx": 3,
    "qk_norm": "head",
    "norm_eps": 1e-3,
    "scale": 0.5,
}


def test_branches() -> None:
    mixer = mixers.build("mmate", dim=256)
    assert type(mixer.branches["flex_ma"]) is FlexMA
    assert type(mixer.branches["local_swin"]) is Swin3D


def test_defaults_are_those_of_its_branches_but_for_what_each_leaves_to_the_other() -> None:
    config = mixers.get("mmate").config_class(dim=256)
    for kind in (FlexMAConfig, Swin3DConfig):
        default = kind(dim=256)
        for field in fields(kind):
            if field.name not in ("memory", "text_window", "sinks"):
                assert getattr(config, field.name) == getattr(default, field.name), field.name


@pytest.mark.parametrize(
    ("given", "sinks"), [({}, 4), ({"text_window": 0}, 0), ({"sinks": 2}, 2), ({"sinks": 0}, 0)]
)
def test_sinks_come_with_the_text_window(given: dict[str, int], sinks: int) -> None:
    mixer = mixers.build("mmate", **TINY, **given)
    assert mixer.config.sinks == mixer.branches["local_swin"].config.sinks == sinks


def test_the_gate_starts_on_the_window() -> None:
    mixer = mixers.build("mmate", **TINY)
    x, layout = torch.randn(1, 40, TINY["dim"]), TokenLayout.text(1, 40)
    whole = mixer(x, layout)
    mixer.set_active(["local_swin"])
    window = mixer(x, layout)
    mixer.set_active(["flex_ma"])
    torch.testing.assert_close(whole, torch.lerp(window, mixer(x, layout), torch.tensor(-3.0).sigmoid()))


@pytest.mark.parametrize("field", CHANGED)
def test_every_setting_reaches_its_branch(field: str) -> None:
    mixer = mixers.build("mmate", **TINY, **{field: CHANGED[field]})
    reached = [b.config for b in mixer.branches.values() if hasattr(b.config, field)]
    assert reached
    assert all(getattr(config, field) == CHANGED[field] for config in reached)


def test_every_field_of_its_branches_is_a_field_of_its_own() -> None:
    own = {f.name for f in fields(mixers.get("mmate").config_class)}
    assert own == {f.name for kind in (GateConfig, FlexMAConfig, Swin3DConfig) for f in fields(kind)}


def test_is_the_gated_mixer_of_its_branches() -> None:
    settings = {"rotary": True, "layer_idx": 1}
    block = shaken(mixers.build("mmate", **TINY, **settings, window=(2, 2, 2), text_window=4))
    branches = {
        "flex_ma": {"rotary": True},
        "local_swin": {"mixer": "swin3d", "window": (2, 2, 2), "text_window": 4, "sinks": 4},
    }
    gated = mixers.build("gated", **TINY, layer_idx=1, branches=branches)
    gated.load_state_dict(block.state_dict())
    x, layout = torch.randn(1, 20, 24), TokenLayout.from_grids(20, [[(4, (2, 3, 2))]])
    rotary = random_rotary(1, 20)
    assert torch.equal(block(x, layout, rotary), gated(x, layout, rotary))
