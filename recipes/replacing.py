"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside a file; what the block writes there takes the file's place once it is on disk.

    An error or a kill leaves what stood there, and an error no half-written file. The folder must exist.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have a file on disk."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
