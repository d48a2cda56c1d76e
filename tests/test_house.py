"""The house: what a newcomer finds at the door, and what must never come in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = ("triton", "mamba_ssm", "xformers", "timm", "torchvision", "matplotlib", "datasets")
EXTRAS = {"triton", "mamba", "xformers", "vision", "eval", "demo", "docs", "dev"}

# Written so that this file does not contain what it looks for.
MACHINE_PATH = re.compile(
    r"(?<![\w.-])/(?:work|farm|root|tmp/bash)/|\.lib" r"rary/|\bshared/(?:facts|design)"
)
LARGEST_FILE = 9 * 2**20


def tracked() -> list[Path]:
    """Files that are committed or would be."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def requirements(names: list[str]) -> list[Requirement]:
    return [requirement for name in names if (requirement := Requirement(name)).name != "linmu"]


def test_the_readme_names_both_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "make demo" in readme
    assert "make test" in readme


def test_ci_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.search(r"^(?:exec )?make test\b", script.read_text(), re.MULTILINE)


def test_make_knows_every_command_it_speaks_of() -> None:
    told = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for command in ("demo", "test", "lint", "docs", "serve", "clean"):
        assert re.search(rf"^make {command}\s+\w", told, re.MULTILINE)


def test_make_says_in_one_line_that_python_is_too_old(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    tried = subprocess.run(
        ["make", "--no-print-directory", "demo", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert tried.returncode != 0
    assert "needs Python 3.11 or newer" in tried.stdout
    assert not (tmp_path / "venv").exists()


def test_a_second_set_up_installs_nothing(tmp_path: Path) -> None:
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").touch()
    plan = ["make", "--dry-run", "demo", f"VENV={tmp_path / 'venv'}"]
    first = subprocess.run(plan, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    stamps = re.findall(r"touch (.+)", first)
    assert "pip install" in first
    assert stamps
    for stamp in stamps[0].split():
        Path(stamp).touch()
    second = subprocess.run(plan, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "pip" not in second
    assert "linmu demo" in second


def test_the_extras_are_those_that_are_promised() -> None:
    assert set(PROJECT["optional-dependencies"]) == EXTRAS


def test_constraints_agree_with_what_the_project_asks_for() -> None:
    asked = requirements(PROJECT["dependencies"])
    for extra in PROJECT["optional-dependencies"].values():
        asked += requirements(extra)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    for pinned in (Requirement(line) for line in lines if line and not line.startswith("#")):
        wanted = [r.specifier for r in asked if r.name == pinned.name]
        (version,) = (pin.version for pin in pinned.specifier)
        assert wanted, f"constraints.txt pins {pinned.name}, which nothing asks for"
        assert all(SpecifierSet(str(s)).contains(version) for s in wanted), f"{pinned} is outside {wanted}"


def test_importing_the_packages_imports_nothing_heavy() -> None:
    code = f"""
import sys
import mixers
print([m for m in {(*HEAVY, "transformers", "bridges", "recipes")!r} if m in sys.modules])
import bridges, recipes, recipes.cli
print([m for m in {tuple(m for m in HEAVY if m != "triton")!r} if m in sys.modules])  # transformers imports triton
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["[]", "[]"]


def test_no_path_of_a_machine_is_committed() -> None:
    for path in tracked():
        if path.suffix in (".png", ".safetensors") or path == Path(__file__):
            continue
        found = MACHINE_PATH.search(path.read_text(encoding="utf-8", errors="replace"))
        assert not found, f"{path.relative_to(ROOT)}: {found and found[0]!r}"


def test_no_large_file_is_committed() -> None:
    large = {str(p.relative_to(ROOT)): p.stat().st_size for p in tracked() if p.stat().st_size > LARGEST_FILE}
    assert not large
