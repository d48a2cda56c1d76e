"""Every public name is on the site, and every page is in its navigation."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from mkdocstrings import Inventory

import bridges
import mixers
import recipes
from tests.docs.pages import ROOT

COMMAND_LINE = {
    "recipes.cli",
    "recipes.terminal",
    "recipes.progress",
    "recipes.bench.commands",
    "recipes.data_commands",
}
"""These make the command, whose help is a page of its own."""


@pytest.fixture(scope="module")
def documented(site: Path) -> set[str]:
    """Every name that the API reference describes."""
    with (site / "objects.inv").open("rb") as file:
        return set(Inventory.parse_sphinx(file))


@pytest.mark.parametrize("package", [mixers, bridges, recipes])
def test_every_exported_name_is_on_the_site(package: ModuleType, documented: set[str]) -> None:
    for module in _modules(package):
        exported = getattr(module, "__all__", ())
        missing = [name for name in exported if f"{module.__name__}.{name}" not in documented]
        assert not missing, f"{module.__name__} exports {missing}; put them on a page under docs/reference"


def test_every_public_name_of_recipes_is_on_the_site(documented: set[str]) -> None:
    for module in _modules(recipes):
        if module.__name__ in COMMAND_LINE | {"recipes"}:
            continue
        assert module.__name__ in documented, f"{module.__name__} is on no page under docs/reference"
        missing = [
            name for name in _own_public_names(module) if f"{module.__name__}.{name}" not in documented
        ]
        assert not missing, f"{module.__name__} has {missing}, which the site does not show"


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    nav = list(_leaves(yaml.safe_load(text)["nav"]))
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert len(nav) == len(set(nav))
    assert set(nav) == pages


def _modules(package: ModuleType) -> Iterator[ModuleType]:
    yield package
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        yield importlib.import_module(found.name)


def _own_public_names(module: ModuleType) -> list[str]:
    """Classes and functions that the module itself defines, without an underscore."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]


def _leaves(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for part in nav.values():
            yield from _leaves(part)
    elif isinstance(nav, list):
        for part in nav:
            yield from _leaves(part)
