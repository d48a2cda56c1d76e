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
    renames; a kill between them leaves the older directory whole beside it, as ``.<name>.old``.

    Args:
        target: The directory to write; its parents are made.
        replaces: Shell pattern of the names that the block writes anew. Other entries of an older
            ``target`` are carried over unless the block wrote them too.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".saving", dir=target.parent))
    try:
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if not target.exists():
        temporary.rename(target)
        return
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    temporary.rename(target)
    for entry in old.iterdir():
        if not (target / entry.name).exists() and not entry.match(replaces):
            entry.rename(target / entry.name)
    shutil.rmtree(old)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
