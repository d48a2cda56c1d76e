"""The folder of a run: what it was started with, and what each stage left there.

run.json                    the recipe and the teacher's fingerprint
stages/1-flex-ma/           checkpoints while the stage runs, then result.safetensors and history.json
history.json, student/      when all stages are done
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recipes.checkpoint import read_json, verify, write_json
from recipes.errors import CheckpointError, RecipeError, RunError
from recipes.plan import Recipe, Stage
from recipes.trainer import checkpoints


@dataclass(frozen=True)
class StageFolder:
    """Where one stage leaves its files."""

    path: Path

    @property
    def result(self) -> Path:
        """All weights that differ from the teacher's after the stage; there once the stage is done."""
        return self.path / "result.safetensors"

    @property
    def history(self) -> Path:
        """The stage's log entries; there once the stage is done."""
        return self.path / "history.json"

    @property
    def answers(self) -> Path:
        """What the teacher generated for the stage."""
        return self.path / "teacher_answers.safetensors"

    def checkpoint(self) -> Path | None:
        """Return the checkpoint to resume from, None if there is none.

        Raises:
            CheckpointError: It is not whole.
        """
        found = checkpoints(self.path)
        if not found:
            return None
        verify(found[-1])
        return found[-1]

    def tidy(self) -> None:
        """Remove the checkpoints of a stage that is done."""
        for path in checkpoints(self.path):
            shutil.rmtree(path)


@dataclass(frozen=True)
class Run:
    """The folder of a run."""

    path: Path
    recipe: Recipe

    @classmethod
    def check(cls, path: Path, recipe: Recipe, teacher: nn.Module, resume: bool) -> Run:
        """Make sure that a run may go on, or start, in a folder; nothing is written.

        Raises:
            RunError: The folder holds a run of another recipe or teacher, or ``resume`` is off and it
                holds a run.
            CheckpointError: What is there is damaged.
        """
        run = cls(path, recipe)
        if not run.record.exists():
            return run
        if not resume:
            raise RunError(f"{path} holds a run already; choose another folder, or resume it.")
        stored, ours = read_json(run.record), run._identity(teacher)
        if "recipe" in stored:  # perhaps of a version that knew fewer settings
            stored["recipe"] = run._read(stored["recipe"]).to_dict()
        for facts in (stored.get("recipe") or {}, ours["recipe"]):
            facts.pop("judged_by", None)  # changes nothing of the run
        for key in ("recipe", "teacher"):
            if stored.get(key) != ours[key]:
                where = ", ".join(_differences(stored.get(key), ours[key], key))
                raise RunError(f"{path} holds a run of another {key} ({where}); choose another folder.")
        done = [folder.result.exists() for folder in run.stages]
        if sorted(done, reverse=True) != done:
            raise CheckpointError(
                f"{run.stages[done.index(False)].result} is missing, though a later stage is done; restore it, or "
                f"delete {path / 'stages'} to start again."
            )
        return run

    @property
    def record(self) -> Path:
        """What the run was started with."""
        return self.path / "run.json"

    @property
    def student(self) -> Path:
        """The finished student."""
        return self.path / "student"

    @property
    def stages(self) -> list[StageFolder]:
        """The folders of the stages, in order."""
        named = enumerate(self.recipe.stages, start=1)
        return [StageFolder(self.path / "stages" / f"{number}-{stage.name}") for number, stage in named]

    def start(self, teacher: nn.Module) -> None:
        """Write down what the run is started with; where one goes on, what it shall be judged by from now on."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.record, self._identity(teacher))

    def remove(self) -> None:
        """Remove a run from its folder, if it holds one; anything else in it stays."""
        if self.record.is_file():
            for path in (self.path / "stages", self.student):
                shutil.rmtree(path, ignore_errors=True)
            for path in (self.path / "history.json", self.record):
                path.unlink(missing_ok=True)

    def pending(self) -> Iterator[tuple[int, Stage, StageFolder]]:
        """Yield (number, stage, folder) of each stage that is not done when its turn comes."""
        for number, (stage, folder) in enumerate(zip(self.recipe.stages, self.stages), start=1):
            if not folder.result.exists():
                yield number, stage, folder

    def latest_result(self) -> Path | None:
        """Return the result of the last stage that is done."""
        done = [folder.result for folder in self.stages if folder.result.exists()]
        return done[-1] if done else None

    def history(self) -> list[dict[str, Any]]:
        """Return the log entries of the stages that are done."""
        return [
            entry for folder in self.stages if folder.history.exists() for entry in read_json(folder.history)
        ]

    def _read(self, fields: dict[str, Any]) -> Recipe:
        try:
            return Recipe.from_dict(fields)
        except RecipeError as error:
            raise RunError(
                f"{self.record} holds a recipe that this version of linmu does not read: {error} Choose another "
                "folder, or the version that began the run."
            ) from error

    def _identity(self, teacher: nn.Module) -> dict[str, Any]:
        return {"recipe": self.recipe.to_dict(), "teacher": fingerprint(teacher)}


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return a few facts and a hash that another model would not share; reads 16 numbers a tensor."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().flatten()[:16].to("cpu", torch.float32).numpy().tobytes())
    return {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "sha256": digest.hexdigest(),
    }


def _differences(stored: Any, ours: Any, where: str) -> Iterator[str]:
    if isinstance(stored, dict) and isinstance(ours, dict):
        for key in sorted({*stored, *ours}):
            yield from _differences(stored.get(key), ours.get(key), f"{where}.{key}")
    elif isinstance(stored, list) and isinstance(ours, list) and len(stored) == len(ours):
        for index, pair in enumerate(zip(stored, ours)):
            yield from _differences(*pair, f"{where}.{index}")
    elif stored != ours:
        yield f"{where}: {stored!r} there, {ours!r} here"
