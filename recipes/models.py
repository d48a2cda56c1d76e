"""The models to measure: whatever can be a teacher, and the folders of converted models."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer

import bridges
from bridges.pretrained import MODEL_TYPE
from recipes.teachers import Teacher, load_teacher


def load_model(name: str) -> Teacher:
    """Load a model and its tokenizer, in fp32 on the CPU.

    Args:
        name: As for :func:`recipes.teachers.load_teacher`, or the folder of a converted model.

    Raises:
        bridges.CheckpointError: The converted model is incomplete or damaged.
        TeacherError: There is no such model, or it cannot be loaded.
    """
    config = Path(name) / "config.json"
    if not config.is_file() or json.loads(config.read_text()).get("model_type") != MODEL_TYPE:
        return load_teacher(name)
    model = bridges.load_pretrained(name)
    return Teacher(model.eval(), AutoTokenizer.from_pretrained(name), Path(name).name)
