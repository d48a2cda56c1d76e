"""A finished run, loaded again to be measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

import bridges
from recipes.checkpoint import read_json
from recipes.errors import RunError
from recipes.models import best_device
from recipes.plan import Recipe
from recipes.run import Run, fingerprint
from recipes.teachers import Teacher, load_teacher


@dataclass(frozen=True)
class FinishedRun:
    """What a distillation left in its folder, and the teacher that it began with.

    Attributes:
        recipe: As the run was started with.
        teacher: In eval mode.
        student: In eval mode, of the teacher's dtype and on its device.
        history: Log entries of all stages; see :class:`recipes.distill.Distilled`.
    """

    recipe: Recipe
    teacher: Teacher
    student: PreTrainedModel
    history: list[dict[str, Any]]

    @classmethod
    def load(cls, folder: str | Path, device: str | None = None) -> FinishedRun:
        """Load the run in a folder.

        Args:
            folder: That ``linmu distill --out`` wrote.
            device: Where to put both models. Default: :func:`recipes.models.best_device`.

        Raises:
            RunError: The folder holds no run, or one that is not finished, or the teacher has become another.
            CheckpointError: One of its files is damaged.
            bridges.CheckpointError: The student is incomplete or damaged.
            TeacherError: The teacher cannot be loaded.
        """
        run = _check(Path(folder))
        teacher = load_teacher(run.recipe.teacher)
        found, began = fingerprint(teacher.model), read_json(run.record)["teacher"]
        if found != began:
            raise RunError(
                f"{run.path} began with another teacher than {run.recipe.teacher.model!r} is now "
                f"(a {began['class']} with the hash {began['sha256'][:8]} there, a {found['class']} with "
                f"{found['sha256'][:8]} here); put that teacher back, or distil again."
            )
        student = bridges.load_pretrained(run.student, dtype=teacher.model.dtype).eval()
        for model in (teacher.model, student):
            model.requires_grad_(False).to(device or best_device())  # type: ignore[arg-type]
        return cls(run.recipe, teacher, student, read_json(run.path / "history.json"))


def _check(folder: Path) -> Run:
    record = folder / "run.json"
    if not record.is_file():
        raise RunError(
            f"{folder} holds no run: there is no {record}. Give the folder that `linmu distill RECIPE --out` wrote."
        )
    stored = read_json(record)
    if not isinstance(stored, dict) or not {"recipe", "teacher"} <= stored.keys():
        raise RunError(f"{record} is not what a run was started with: it needs a recipe and a teacher.")
    run = Run(folder, Recipe.from_dict(stored["recipe"], source=str(record)))
    pending = [stage.name for _, stage, _ in run.pending()]
    if pending or not (folder / "history.json").is_file() or not run.student.is_dir():
        still = f"stages still to do: {', '.join(pending)}" if pending else "its student was not saved"
        raise RunError(
            f"the run in {folder} is not finished ({still}); go on with it by "
            f"`linmu distill {run.recipe.name} --out {folder}`."
        )
    return run
