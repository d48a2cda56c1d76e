"""The built site asks the network for nothing, shows results as they are, and draws what the code does."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from recipes import diagrams
from recipes.results import Results
from tests.docs.pages import ROOT

LOADED = re.compile(
    r"""<(?:link|script|img|iframe|source)\b[^>]*?\b(?:href|src)=["']?((?:https?:)?//[^"' >]+)"""
)


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """docs/hooks.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_page_loads_anything_from_the_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert pages
    for page in pages:
        assert not LOADED.findall(page.read_text()), page
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text()), style


def test_formulas_and_cross_references_are_rendered(site: Path) -> None:
    assert "<math" in (site / "mmate" / "index.html").read_text()
    for page in (site / "reference").rglob("*.html"):
        assert not re.search(r":(?:class|func|meth|mod|attr):<code>", page.read_text()), page


def test_results_are_shown_with_what_made_them(hooks: ModuleType, tmp_path: Path) -> None:
    assert "Not measured yet" in hooks.results_page(tmp_path)
    rows = [
        {"measure": "accuracy", "tokens": None, "teacher": 0.95, "student": 0.94},
        {"measure": "a|b", "tokens": 1024, "teacher": 1.0, "student": 3.0},
        {"measure": "a|b", "tokens": 4096, "teacher": 16.0, "student": 12.0},
        {"measure": "a|b", "tokens": 16384, "teacher": None, "student": 48.0},
    ]
    Results("linmu demo", {"recovery": 0.989}, rows, device="a chip").write(tmp_path / "demo.json")
    shown = hooks.results_page(tmp_path)
    assert "Not measured yet" not in shown
    assert "| `recovery` | 0.989 |" in shown
    assert "| a\\|b | 16,384 | – | 48 |" in shown
    assert "`linmu demo` on a chip" in shown
    short = hooks.readme_table(tmp_path)
    assert "| accuracy | – | 0.95 | 0.94 |" in short
    assert "| a\\|b | 4,096 | 16 | 12 |" in short
    assert "1,024" not in short


def test_the_table_in_the_readme_is_the_measured_one(hooks: ModuleType) -> None:
    found = hooks.README_TABLE.search((ROOT / "README.md").read_text())
    assert found is not None
    assert found[0].strip() == hooks.readme_table().strip(), "run: python docs/hooks.py"


def test_the_committed_pictures_are_what_the_code_draws(tmp_path: Path) -> None:
    committed = ROOT / "docs" / "assets"
    drawn = diagrams.draw_all(tmp_path)
    assert {picture.name for picture in drawn} == {picture.name for picture in committed.iterdir()}
    for picture in drawn:
        old = Image.open(committed / picture.name).info["Description"]
        assert Image.open(picture).info["Description"] == old, "run: python -m recipes.diagrams docs/assets"
