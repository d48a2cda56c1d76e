"""The surgery record: what a converted model's config says of its conversion, and how older ones are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bridges.errors import CheckpointError
from bridges.plan import Report

RECORD = "linmu"
"""Its name in the text config."""

FORMAT_VERSION = 3

NEW_WEIGHTS = "new_weights.json"
"""The file that describes a checkpoint of new weights alone."""


def surgery_record(report: Report, layer_count: int, teacher: str | None) -> dict[str, Any]:
    """Return what the config keeps of a conversion: enough to build the same modules again."""
    return {
        "version": FORMAT_VERSION,
        "teacher": teacher,
        "layer_count": layer_count,
        "layers": {
            str(row.index): {"mixer": row.mixer, "config": row.config.to_dict()} for row in report.layers
        },
    }


def teacher_name(model: PreTrainedModel) -> str | None:
    """Return where a model was loaded from: its name on the hub, or its folder's own name; None if it was not."""
    name = getattr(model.config, "_name_or_path", "") or ""
    if not name:
        return None
    return Path(name).name if Path(name).is_absolute() or Path(name).exists() else name


def record_of(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the record in a config's JSON; empty if there is none."""
    return fields.get(RECORD) or (fields.get("text_config") or {}).get(RECORD) or {}


def upgraded(record: dict[str, Any], source: object) -> dict[str, Any]:
    """Return a record in today's format.

    Args:
        record: Of this version or an older one.
        source: What it was read from, for the error.

    Raises:
        CheckpointError: It is of a newer version, or of none.
    """
    version = record.get("version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{source} is of format version {version}, this linmu reads 1 to {FORMAT_VERSION}; update linmu."
        )
    for older in range(version, FORMAT_VERSION):
        record = MIGRATIONS[older](record)
    return record


def _name_no_teacher(record: dict[str, Any]) -> dict[str, Any]:
    return {**record, "version": 2, "teacher": None}


def _without_sinks(record: dict[str, Any]) -> dict[str, Any]:
    layers = {
        number: {**layer, "config": {"sinks": 0, **layer["config"]}} if layer["mixer"] == "mmate" else layer
        for number, layer in record["layers"].items()
    }
    return {**record, "version": 3, "layers": layers}


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _name_no_teacher, 2: _without_sinks}
"""Version → what makes a record of the next."""
