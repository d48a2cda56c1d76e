"""The models to measure: whatever can be a teacher, and the folders of converted models."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

import bridges
from bridges.pretrained import MODEL_TYPE
from recipes.teachers import Teacher, load_teacher


def load_model(name: str, device: str | None = None) -> Teacher:
    """Load a model and its tokenizer, in fp32.

    Args:
        name: As for :func:`recipes.teachers.load_teacher`, or the folder of a converted model.
        device: Where to put it. Default: :func:`best_device`.

    Raises:
        bridges.CheckpointError: The converted model is incomplete or damaged.
        TeacherError: There is no such model, or it cannot be loaded.
    """
    config = Path(name) / "config.json"
    if not config.is_file() or json.loads(config.read_text()).get("model_type") != MODEL_TYPE:
        loaded = load_teacher(name)
    else:
        model = bridges.load_pretrained(name, dtype=torch.float32)
        loaded = Teacher(model.eval(), AutoTokenizer.from_pretrained(name), Path(name).name)
    loaded.model.to(device or best_device())  # type: ignore[arg-type]
    return loaded


def best_device() -> str:
    """Return ``"cuda"`` where there is a GPU, else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"
