from __future__ import annotations

from typing import Any

import pytest

import mixers
from bridges import LayerPatternError
from bridges.patterns import layer_indices, resolve


@pytest.mark.parametrize(
    ("pattern", "indices"),
    [
        ("all", [0, 1, 2, 3, 4]),
        ("*", [0, 1, 2, 3, 4]),
        ("0", [0]),
        ("-1", [4]),
        ("0,2-3,-1", [0, 2, 3, 4]),
        (" 1 , 3 ", [1, 3]),
        ("3,1,3", [1, 3]),
        (2, [2]),
        (-5, [0]),
        ([4, 0, -1], [0, 4]),
        (range(1, 3), [1, 2]),
    ],
)
def test_a_pattern_names_layers(pattern: Any, indices: list[int]) -> None:
    assert layer_indices(pattern, 5) == indices


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "x",
        "1-",
        "1--2",
        "0;1",
        "3-1",
        "3-1,0",
        "-2-1",
        "5",
        "-6",
        "2-9",
        5,
        [],
        [7],
        [1.5],
        ["0"],
        None,
        True,
    ],
)
def test_a_bad_pattern_is_refused(pattern: Any) -> None:
    with pytest.raises(LayerPatternError):
        layer_indices(pattern, 5)


def test_a_huge_range_is_refused_without_being_written_out() -> None:
    with pytest.raises(LayerPatternError, match="999999999999"):
        layer_indices("0-999999999999", 5)


def test_star_is_what_the_others_leave() -> None:
    chosen = resolve({"0,-1": "attention", "*": "mmate"}, "all", 4, {})
    assert {i: name for i, (name, _) in chosen.items()} == {
        0: "attention",
        1: "mmate",
        2: "mmate",
        3: "attention",
    }


def test_layers_limit_star_alone() -> None:
    chosen = resolve({"*": "mmate", "3": "attention"}, "0-1", 4, {})
    assert {i: name for i, (name, _) in chosen.items()} == {0: "mmate", 1: "mmate", 3: "attention"}


def test_settings_of_a_pattern_win_and_config_goes_where_it_fits() -> None:
    spec = {"*": {"mixer": "mmate", "text_window": 3}, "0": "attention", "1": {"mixer": "swin3d"}}
    chosen = resolve(spec, "all", 3, {"text_window": 9})
    assert chosen == {
        0: ("attention", {}),
        1: ("swin3d", {"text_window": 9}),
        2: ("mmate", {"text_window": 3}),
    }


@pytest.mark.parametrize(
    "spec",
    [
        {},
        None,
        7,
        {"*": 3},
        {"0": None},
        {"0": {"window": 3}},
        {"0-1": "mmate", "1": "attention"},
        {"0": "mmate", "-3": "attention"},
        {"9": "mmate"},
    ],
)
def test_a_bad_spec_is_refused(spec: Any) -> None:
    with pytest.raises(LayerPatternError):
        resolve(spec, "all", 3, {})


def test_an_unknown_mixer_is_refused_with_near_names() -> None:
    with pytest.raises(mixers.UnknownMixerError, match="'mmate'"):
        resolve({"0": "mmat"}, "all", 3, {})


def test_a_field_that_no_mixer_of_the_spec_has_is_refused_with_near_names() -> None:
    with pytest.raises(mixers.ConfigError, match="'text_window'"):
        resolve({"*": "mmate", "0": "attention"}, "all", 3, {"text_windw": 4})
