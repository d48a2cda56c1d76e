"""Which mixer goes to which layer: ``"mmate"`` or ``{"*": "mmate", "0,4-7,-1": "attention"}``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from bridges.errors import LayerPatternError
from mixers import ConfigError, get
from mixers.errors import near

Spec = str | Mapping[str, str | Mapping[str, Any]]
"""A mixer name, or layer pattern → mixer name or settings with a ``mixer`` key."""

_ITEM = re.compile(r"(-?\d+)(?:-(\d+))?")


def layer_indices(layers: str | int | Iterable[int], count: int) -> list[int]:
    """Turn ``"all"``, ``"*"``, ``"0,4-7,-1"``, an index or indices into sorted layer indices.

    Args:
        layers: The pattern; negative indices count from the end.
        count: Layers of the model.

    Raises:
        LayerPatternError: The pattern is malformed, or a part of it names no layer of the model.
    """
    if isinstance(layers, str):
        if layers in ("all", "*"):
            return list(range(count))
        spans = [_span(item.strip(), layers) for item in layers.split(",")]
    else:
        items = list(layers) if isinstance(layers, Iterable) else [layers]
        if any(not isinstance(i, int) or isinstance(i, bool) for i in items):
            raise LayerPatternError(f"cannot read the layers {layers!r}; write 'all', a pattern, or indices.")
        spans = [(i, i) for i in items]
    outside = sorted({i for span in spans for i in span if not -count <= i < count})
    if outside or not spans:
        raise LayerPatternError(
            f"the layer pattern {layers!r} names {outside or 'no layer'}; the model has layers 0 to {count - 1}."
        )
    return sorted({i % count for first, last in spans for i in range(first, last + 1)})


def _span(item: str, pattern: str) -> tuple[int, int]:
    """Read an index or a range, such as ``-1`` or ``4-7``, as (first, last)."""
    match = _ITEM.fullmatch(item)
    if match is None:
        raise LayerPatternError(
            f"cannot read {item!r} in the layer pattern {pattern!r}; write 'all', or indices and ranges such as "
            "'0,4-7,-1'."
        )
    first = int(match[1])
    last = first if match[2] is None else int(match[2])
    if match[2] is not None and not 0 <= first <= last:
        raise LayerPatternError(
            f"the range {item!r} in the layer pattern {pattern!r} must rise, from 0 or above."
        )
    return first, last


def resolve(
    spec: Spec, layers: str | int | Iterable[int], count: int, config: Mapping[str, Any]
) -> dict[int, tuple[str, dict[str, Any]]]:
    """Say for each layer to convert which mixer it gets, with which settings.

    ``"*"`` is what the other patterns leave over. ``config`` applies to the mixers that have its
    fields; settings inside the spec win.

    Raises:
        LayerPatternError: A pattern is malformed, names no layer, or two name the same layer.
        mixers.UnknownMixerError: A mixer is not registered.
        mixers.ConfigError: No mixer of the spec has a field of ``config``; near names are listed.
    """
    among = layer_indices(layers, count)
    if isinstance(spec, str):
        spec = {"*": spec}
    if not isinstance(spec, Mapping) or not spec:
        raise LayerPatternError("the spec names no mixer; write a mixer name or {layer pattern: mixer name}.")
    assigned: dict[int, tuple[str, dict[str, Any]]] = {}
    claimed: dict[int, str] = {}
    for pattern, entry in sorted(spec.items(), key=lambda item: item[0] != "*"):
        settings = dict(entry) if isinstance(entry, Mapping) else {"mixer": entry}
        name = settings.pop("mixer", None)
        if not isinstance(name, str):
            raise LayerPatternError(
                f"the settings for layers {pattern!r} name no mixer; write its name, or add a 'mixer' key."
            )
        known = get(name).config_class.__dataclass_fields__
        shared = {k: v for k, v in config.items() if k in known or len(spec) == 1}
        for index in layer_indices(pattern, count):
            if pattern == "*":
                if index not in among:
                    continue
            elif index in claimed:
                raise LayerPatternError(f"layer {index} is named by {claimed[index]!r} and by {pattern!r}.")
            else:
                claimed[index] = pattern
            assigned[index] = (name, {**shared, **settings})
    fields = {f for name, _ in assigned.values() for f in get(name).config_class.__dataclass_fields__}
    if unknown := sorted(set(config) - fields) if len(spec) > 1 else []:
        hints = "".join(near(field, fields) for field in unknown)
        raise ConfigError(f"no mixer of the spec has the fields {unknown}.{hints}")
    return dict(sorted(assigned.items()))
