"""Variants of a recipe: a file that names a ``base`` says only what differs from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixers.errors import near
from recipes.errors import InvalidRecipeError, UnknownKeyError, UnknownRecipeError

LIBRARY = Path(__file__).parent / "library"
FOLDERS = (LIBRARY, LIBRARY / "ablations")
"""Where recipes are found by name, in the order in which they are listed."""

OWN = ("name", "description")
"""Keys that a variant does not take from its base."""


def library() -> dict[str, Path]:
    """Return name → file of every recipe that ships, sorted within its folder, ablations last."""
    return {path.stem: path for folder in FOLDERS for path in sorted(folder.glob("*.yaml"))}


def find(name_or_path: str | Path, beside: Path | None = None) -> Path:
    """Return the file of a recipe.

    Args:
        name_or_path: A YAML file, or a name of the library.
        beside: Folder that a relative path is looked for in. None: the working directory.

    Raises:
        UnknownRecipeError: There is no such recipe or file; near names are listed.
    """
    path = Path(name_or_path) if beside is None else beside / name_or_path
    if path.is_file():
        return path
    known = library()
    if str(name_or_path) not in known:
        raise UnknownRecipeError(
            f"no recipe is called {str(name_or_path)!r}, and there is no such file."
            f"{near(str(name_or_path), known)} Recipes: {', '.join(known)}."
        )
    return known[str(name_or_path)]


def lay_over(base: Mapping[str, Any], changes: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Lay the keys of a variant over its base.

    Mappings merge, lists and scalars replace, and None removes a key. ``stages``, given as a mapping of names,
    changes the stages of those names, or drops those of None; given as a list, it replaces all.

    Args:
        base: A whole recipe as plain data.
        changes: What the variant says.
        source: What to call the variant in an error.

    Returns:
        The variant as a whole recipe; ``name`` and ``description`` are its own or absent.

    Raises:
        UnknownKeyError: A key or stage to be changed or removed is not in the base; near names are listed.
        InvalidRecipeError: A stage is changed to something that is no mapping.
    """
    inherited = {key: value for key, value in base.items() if key not in OWN}
    stages = changes.get("stages")
    if isinstance(stages, Mapping):
        changes = {**changes, "stages": _merge_stages(base["stages"], stages, source)}
    return _merge(inherited, changes, source)


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        if value is None:
            if key not in merged:
                raise UnknownKeyError(
                    f"{where} removes {key!r}, which its base does not have.{near(str(key), merged)} "
                    f"Its keys: {', '.join(map(str, merged)) or 'none'}."
                )
            del merged[key]
        elif isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value, f"{where}, {key}")
        else:
            merged[key] = value
    return merged


def _merge_stages(
    base: list[dict[str, Any]], changes: Mapping[str, Any], source: str
) -> list[dict[str, Any]]:
    names = [stage["name"] for stage in base]
    for name, change in changes.items():
        if name not in names:
            raise UnknownKeyError(
                f"{source} changes the stage {name!r}, which its base does not have.{near(str(name), names)} "
                f"Its stages: {', '.join(names)}; a list of stages replaces them all."
            )
        if change is not None and not isinstance(change, Mapping):
            raise InvalidRecipeError(
                f"{source} must change the stage {name!r} by a mapping of its keys, or drop it by null; "
                f"found {change!r}."
            )
    kept = [stage for stage in base if changes.get(stage["name"], stage) is not None]
    return [_merge(s, changes.get(s["name"], {}), f"{source}, stage {s['name']!r}") for s in kept]
