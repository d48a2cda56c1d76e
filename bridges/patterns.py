"""Which mixer goes to which layer: ``"mmate"`` or ``{"*": "mmate", "0,4-7,-1": "attention"}``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from bridges.errors import LayerPatternError
from mixers import get

Spec = str | Mapping[str, str | Mapping[str, Any]]
"""A mixer name, or layer pattern → mixer name or settings with a ``mixer`` key."""

_ITEM = re.compile(r"(-?\d+)(?:-(\d+))?")


def layer_indices(layers: str | int | Iterable[int], count: int) -> list[int]:
    """Turn ``"all"``, ``"*"``, ``"0,4-7,-1"``, an index or indices into sorted layer indices.

    Args:
        layers: The pattern; negative indices count from the end.
        count: Layers of the model.

    Raises:
        LayerPatternError: The pattern is malformed or names no layer of the model.
    """
    if isinstance(layers, str):
        if layers in ("all", "*"):
            return list(range(count))
        chosen: set[int] = set()
        for item in layers.split(","):
            match = _ITEM.fullmatch(item.strip())
            if match is None:
                raise LayerPatternError(
                    f"cannot read {item.strip()!r} in the layer pattern {layers!r}; write 'all', or indices and "
                    "ranges such as '0,4-7,-1'."
                )
            first = int(match[1])
            chosen.update(range(first, int(match[2]) + 1) if match[2] else [first])
    else:
        chosen = {layers} if isinstance(layers, int) else set(layers)
    outside = sorted(i for i in chosen if not -count <= i < count)
    if outside or not chosen:
        raise LayerPatternError(
            f"the layer pattern {layers!r} names {outside or 'no layer'}; the model has layers 0 to {count - 1}."
        )
    return sorted({i % count for i in chosen})


def resolve(
    spec: Spec, layers: str | int | Iterable[int], count: int, config: Mapping[str, Any]
) -> dict[int, tuple[str, dict[str, Any]]]:
    """Say for each layer to convert which mixer it gets, with which settings.

    ``"*"`` is what the other patterns leave over. ``config`` applies to the mixers that have its
    fields; settings inside the spec win.

    Raises:
        LayerPatternError: A pattern is malformed, names no layer, or two name the same layer.
        mixers.UnknownMixerError: A mixer is not registered.
    """
    among = layer_indices(layers, count)
    if isinstance(spec, str):
        spec = {"*": spec}
    if not spec:
        raise LayerPatternError("the spec names no mixer; write a mixer name or {layer pattern: mixer name}.")
    assigned: dict[int, tuple[str, dict[str, Any]]] = {}
    claimed: dict[int, str] = {}
    for pattern, entry in sorted(spec.items(), key=lambda item: item[0] != "*"):
        settings = {"mixer": entry} if isinstance(entry, str) else dict(entry)
        name = settings.pop("mixer", None)
        if name is None:
            raise LayerPatternError(f"the settings for layers {pattern!r} name no mixer; add a 'mixer' key.")
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
        raise LayerPatternError(f"no mixer of the spec has the fields {unknown}.")
    return dict(sorted(assigned.items()))
