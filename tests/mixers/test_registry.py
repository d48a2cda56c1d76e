"""Names to mixers, and what a plugin, a typo or a collision gets."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
import torch

import mixers
from mixers import ConfigError, DuplicateMixerError, MixerConfig, TokenMixer, UnknownMixerError, registry
from mixers.attention import Attention, AttentionConfig


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


def test_all_mixers_of_the_design_are_there() -> None:
    names = {"attention", "sliding_window", "mamba2", "bimamba2", "flex_ma", "swin3d", "gated", "mmate"}
    assert names <= set(mixers.available())


def test_available_takes_wildcards_and_sorts() -> None:
    assert mixers.available("*mamba*") == ["bimamba2", "mamba2"]
    assert mixers.available("nothing*") == []
    assert mixers.available() == sorted(mixers.available())


def test_build_takes_config_fields() -> None:
    mixer = mixers.build("attention", dim=256)
    assert isinstance(mixer, Attention)
    assert (mixer.num_heads, mixer.num_kv_heads, mixer.head_dim) == (2, 2, 128)


def test_unknown_mixer_lists_near_names() -> None:
    with pytest.raises(UnknownMixerError, match="Did you mean 'mmate'") as error:
        mixers.build("mmatte", dim=64)
    assert "sliding_window" in str(error.value)
    assert isinstance(error.value, mixers.MixerError)
    for use in (mixers.get, mixers.describe):
        with pytest.raises(UnknownMixerError):
            use("mmatte")


def test_register_and_describe() -> None:
    @mixers.register("echo", config=MixerConfig)
    class Echo(TokenMixer):
        """Returns what it hears.

        More words.
        """

        def forward(self, x, layout=None, rotary=None, state=None):
            return x

    assert "echo" in mixers.available()
    assert mixers.get("echo") is Echo
    x = torch.randn(1, 2, 8)
    assert mixers.build("echo", dim=8, num_heads=2)(x) is x
    described = mixers.describe("echo")
    assert described.summary == "Returns what it hears."
    assert described.fields["dim"] == ("int", "required")
    assert described.fields["layer_idx"][1] == 0


def test_duplicate_name_is_refused_and_changes_nothing() -> None:
    before = mixers.get("attention")
    with pytest.raises(DuplicateMixerError, match="already"):

        @mixers.register("attention", config=MixerConfig)
        class Impostor(TokenMixer):
            pass

    assert mixers.get("attention") is before


def test_the_same_class_may_be_registered_again() -> None:
    mixers.register("attention", config=AttentionConfig)(Attention)
    assert mixers.get("attention") is Attention


@pytest.mark.parametrize("name", mixers.available())
def test_describe_names_every_field(name: str) -> None:
    described = mixers.describe(name)
    assert described.summary
    assert {"dim", "num_heads", "layer_idx"} <= described.fields.keys()
    assert all(field in str(described) for field in described.fields)


class Plugin(TokenMixer):
    """From another distribution."""


def load_plugin(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    entry = EntryPoint(name="theirs", value=value, group=registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "_plugins_loaded", False)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])


def test_entry_points_are_loaded_at_the_first_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    load_plugin(monkeypatch, f"{__name__}:register_plugin")
    monkeypatch.setattr(
        EntryPoint, "load", lambda self: mixers.register("theirs", config=MixerConfig)(Plugin)
    )
    assert "theirs" in mixers.available()
    assert mixers.get("theirs") is Plugin


def test_a_plugin_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    load_plugin(monkeypatch, "no_such_module_of_theirs")
    with pytest.raises(ConfigError, match=r"'theirs' \(no_such_module_of_theirs\) failed to load"):
        mixers.build("attention", dim=128)
