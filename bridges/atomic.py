"""Write a directory whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_directory(target: str | Path, *, replaces: str) -> Iterator[Path]:
    """Yield a temporary directory that takes the place of ``target`` if the block succeeds.

    Until then ``target`` is untouched, and an error removes what was written. The swap is two
    renames; after a kill between them the older directory stands whole beside it, as ``.<name>.old``,
    and the next call puts it back first.

    Args:
        target: The directory to write, or a link to it; its parents are made.
        replaces: Shell pattern of the names that the block writes anew. Other entries of an older
            ``target`` are carried over unless the block wrote them too.

    Raises:
        NotADirectoryError: ``target`` is a file.
        OSError: ``target`` cannot be swapped, being the working directory or a mount point, or its
            parent cannot be written.
    """
    target = Path(target).resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; choose a directory to save to.")
    if target == Path.cwd() or target.is_mount():
        raise OSError(
            f"{target} is the working directory or a mount point, which cannot be replaced in one move; save to a "
            "directory inside it."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    old = older(target)
    if old.exists() and not target.exists():
        old.rename(target)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".saving", dir=target.parent))
    try:
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if target.exists():
            _carry_over(target, temporary, replaces)
            _swap(target, temporary, old)
        else:
            temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def older(target: Path) -> Path:
    """Return where a kill in the middle of the swap leaves the older directory."""
    return target.with_name(f".{target.name}.old")


def _carry_over(source: Path, destination: Path, replaces: str) -> None:
    """Give the new directory the older one's other entries, as second names of the same files."""
    for entry in source.iterdir():
        new = destination / entry.name
        if new.exists() or entry.match(replaces):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new, symlinks=True, copy_function=_link)
        else:
            _link(entry, new)


def _link(source: str | Path, destination: str | Path) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:  # the file system has no second names
        shutil.copy2(source, destination, follow_symlinks=False)


def _swap(target: Path, temporary: Path, old: Path) -> None:
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
