"""Packages are fetched once, whole or not at all, by tools that stand on PATH; here they are small scripts."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from recipes.data.packages import FetchFailed, MissingTool, Package, WrongArchive, fetch, record

PACKAGES = [
    Package("npm", "words", "1.2.3", "MIT", "some words"),
    Package("pip", "words", "1.2.3", "MIT", "some words"),
    Package("deb", "words", None, "GPL-2.0", "some words"),
]
by_kind = pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.kind)
NPM = PACKAGES[0]


class Registry:
    """Tools that hand out archives with one file, and what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.tools, self.shelf, self.log = folder / "bin", folder / "shelf", folder / "log"
        self.tools.mkdir()
        self.shelf.mkdir()
        content = b"one two three"
        member = tarfile.TarInfo("package/words.txt")
        member.size = len(content)
        for name in ("words.tgz", "words.deb"):
            with tarfile.open(self.shelf / name, "w:gz") as archive:
                archive.addfile(member, io.BytesIO(content))
        with zipfile.ZipFile(self.shelf / "words.whl", "w") as archive:
            archive.writestr("package/words.txt", content)
        for tool, archive in (("npm", "words.tgz"), ("pip", "words.whl"), ("apt-get", "words.deb")):
            self.offer(tool, f'cp "{self.shelf}/{archive}" .')
        self.offer("dpkg-deb", 'tar -xzf "$2" -C "$3"')

    def offer(self, tool: str, action: str) -> None:
        script = self.tools / tool
        script.write_text(f'#!/bin/sh\necho {tool} "$@" >> "{self.log}"\n{action}\n')
        script.chmod(0o755)

    def asked(self) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if not line.startswith("dpkg-deb")]


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    made = Registry(tmp_path)
    monkeypatch.setenv("LINMU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{made.tools}{os.pathsep}{os.environ['PATH']}")
    return made


@by_kind
def test_a_package_is_unpacked_and_its_archive_on_record(registry: Registry, package: Package) -> None:
    folder = fetch(package)
    assert (folder / "package" / "words.txt").read_text() == "one two three"
    archive = registry.shelf / record(package)["archive"]
    assert record(package)["sha256"] == hashlib.sha256(archive.read_bytes()).hexdigest()
    assert record(package)["licence"] == package.licence
    (asked,) = registry.asked()
    assert "words" in asked
    assert package.version is None or package.version in asked


@by_kind
def test_what_is_in_the_cache_is_not_asked_for_again(
    registry: Registry, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch(package)
    monkeypatch.setenv("PATH", str(registry.shelf))
    assert fetch(package) == folder
    assert len(registry.asked()) == 1


def test_a_folder_that_was_brought_by_hand_will_do(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(registry.shelf))
    NPM.folder.mkdir(parents=True)
    assert fetch(NPM) == NPM.folder
    assert record(NPM) == {}


def test_versions_stand_side_by_side(registry: Registry) -> None:
    assert fetch(NPM) != fetch(replace(NPM, version="2.0.0"))
    assert len(registry.asked()) == 2


@by_kind
def test_a_missing_tool_is_named_with_the_way_around(
    registry: Registry, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(registry.shelf))
    with pytest.raises(MissingTool, match=package.command[0]) as error:
        fetch(package)
    assert str(package.folder) in str(error.value)
    assert not package.folder.parent.exists()


@by_kind
def test_a_failed_command_is_told_with_what_it_said(registry: Registry, package: Package) -> None:
    registry.offer(package.command[0], "echo 'no such package' >&2; exit 3")
    with pytest.raises(FetchFailed, match=r"(?s)failed \(3\): no such package") as error:
        fetch(package)
    assert " ".join(package.command) in str(error.value)
    assert not package.folder.exists()


@by_kind
def test_an_archive_that_is_none_leaves_nothing(registry: Registry, package: Package) -> None:
    archive = {"npm": "words.tgz", "pip": "words.whl", "deb": "words.deb"}[package.kind]
    (registry.shelf / archive).write_bytes(b"half of it")
    with pytest.raises(FetchFailed):
        fetch(package)
    assert not package.folder.exists()


def test_another_archive_than_the_recorded_one_is_refused(registry: Registry) -> None:
    digest = hashlib.sha256((registry.shelf / "words.tgz").read_bytes()).hexdigest()
    with pytest.raises(WrongArchive, match=digest):
        fetch(replace(NPM, sha256="0" * 64))
    assert not NPM.folder.exists()
    assert fetch(replace(NPM, sha256=digest)).is_dir()


def test_a_killed_fetch_leaves_nothing_that_counts(registry: Registry) -> None:
    registry.offer("dpkg-deb", 'echo half > "$3/half.txt"; kill -9 $PPID')
    package = PACKAGES[2]
    code = f"from recipes.data.packages import Package, fetch; fetch({package!r})"
    killed = subprocess.run([sys.executable, "-c", code], env=dict(os.environ))
    assert killed.returncode == -signal.SIGKILL
    assert not package.folder.exists()
    registry.offer("dpkg-deb", 'tar -xzf "$2" -C "$3"')
    assert {path.name for path in fetch(package).iterdir() if path.is_dir()} == {"package"}
    assert not (package.folder / "half.txt").exists()


def test_two_at_once_fetch_it_once(registry: Registry) -> None:
    registry.offer("npm", f'sleep 0.2; cp "{registry.shelf}/words.tgz" .')
    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(fetch, [NPM, NPM]))) == 1
    assert len(registry.asked()) == 1
