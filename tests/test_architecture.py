"""The direction of imports, mixers <- bridges <- recipes, and what waits until it is used."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("mixers", "bridges", "recipes")
MAY_IMPORT = {"mixers": set(), "bridges": {"mixers"}, "recipes": {"mixers", "bridges"}}
NEVER_AT_IMPORT = (
    "triton",
    "mamba_ssm",
    "causal_conv1d",
    "xformers",
    "timm",
    "torchvision",
    "matplotlib",
    "datasets",
)


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(node: ast.AST, *, deferred: bool = True) -> Iterator[str]:
    """Yield the top-level name of every import; without ``deferred``, of those that run at import time."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name.split(".")[0] for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield (child.module or "").split(".")[0]
        elif isinstance(child, ast.If) and getattr(child.test, "id", None) == "TYPE_CHECKING":
            continue
        elif deferred or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(child, deferred=deferred)


@pytest.mark.parametrize("package", OURS)
def test_direction(package: str) -> None:
    assert files(package)
    for path in files(package):
        found = set(imports(ast.parse(path.read_text()))) & set(OURS)
        assert found <= {package} | MAY_IMPORT[package], path.relative_to(ROOT)


def of_kernels(path: Path) -> bool:
    """Are these kernels? They are imported when they first run; that ``import mixers`` leaves triton out is tested."""
    parts = path.relative_to(ROOT).parts
    return parts[:2] == ("mixers", "ops") and "triton" in imports(ast.parse(path.read_text()), deferred=False)


def test_mixers_know_torch_alone() -> None:
    allowed = {"mixers", "torch", "einops"} | set(sys.stdlib_module_names)
    for path in filter(lambda path: not of_kernels(path), files("mixers")):
        assert set(imports(ast.parse(path.read_text()), deferred=False)) <= allowed, path.relative_to(ROOT)


@pytest.mark.parametrize("package", OURS)
def test_heavy_packages_wait_until_they_are_used(package: str) -> None:
    for path in files(package):
        found = set(imports(ast.parse(path.read_text()), deferred=False)) & set(NEVER_AT_IMPORT)
        assert found <= ({"triton"} if of_kernels(path) else set()), path.relative_to(ROOT)
