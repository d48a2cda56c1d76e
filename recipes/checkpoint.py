"""Tensors and folders on disk: written whole or not at all, checked before they are read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recipes.errors import CheckpointError
from recipes.replacing import flush, replacing

MANIFEST = "manifest.json"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file in one move; an error or a kill leaves what stood there.

    Raises:
        CheckpointError: It could not be written, for example because the disk is full.
    """
    try:
        with replacing(path) as partial:
            # A copy each: tied weights share memory, which the format refuses.
            save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, partial)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not write {path}: {error}; free some space and start again to resume."
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: It is missing, or truncated.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; delete {path.parent} to do this stage again.") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or truncated ({error}); delete {path.parent} to do this stage again."
        ) from error


def write_json(path: Path, data: Any) -> None:
    """Write JSON in one move.

    Raises:
        CheckpointError: It could not be written.
    """
    try:
        with replacing(path) as partial:
            partial.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"could not write {path}: {error}") from error


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        CheckpointError: It is missing, or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; delete {path.parent} to do it again.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete {path.parent} to do it again.") from error


def load_parameters(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Put tensors into the parameters of those names; a parameter takes the dtype it is given.

    Raises:
        CheckpointError: A name or shape is not the module's; nothing is changed then.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            found = "no such parameter" if name not in parameters else f"shape {list(parameters[name].shape)}"
            raise CheckpointError(
                f"{source} does not fit the student: it has {name} {list(tensor.shape)}, the student {found}."
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].data = tensor.to(parameters[name].device)


def seal(folder: Path) -> None:
    """Flush a folder's files to disk and write the manifest of their sizes."""
    files = [path for path in _files(folder) if path.name != MANIFEST]
    for path in files:
        flush(path)
    write_json(folder / MANIFEST, {str(path.relative_to(folder)): path.stat().st_size for path in files})


def verify(folder: Path) -> None:
    """Make sure that a sealed folder is as it was sealed.

    Raises:
        CheckpointError: A file is missing or of another size.
    """
    for name, size in read_json(folder / MANIFEST).items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"is truncated: {found} bytes instead of {size}"
            raise CheckpointError(
                f"{path} {what}. Restore it, or delete {folder} to resume from what came before it."
            )


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
