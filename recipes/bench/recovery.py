"""What recipes recover of their teachers: each is run, measured, and laid beside the others."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recipes.distill import distill
from recipes.errors import InvalidRecipeError
from recipes.minutes import FOREVER
from recipes.plan import Recipe, TeacherSpec
from recipes.report import Report, report
from recipes.results import Results, ResultsError, spent, write_atomically, write_rows
from recipes.teachers import load_teacher
from recipes.yardstick import Yardstick

Row = dict[str, Any]
Say = Callable[..., None]
"""Told what is being done."""

FIGURES = (
    "ppl_ratio",
    "agreement",
    "recovery_mean",
    "recovery_min",
    "recovery_long_video",
    "recall_ratio_mean",
    "recall_ratio_min",
)
"""What a row sums a student up by, in order."""
OF_TEACHER = "above_trivial_min"
"""The figure that only the teacher's row has."""
BY_STAGE = ("seconds_a_step", "tokens_a_second", "gpu_busy", "peak_gib")
"""What a row says of each stage, as ``"gpu_busy STAGE"``."""
TEACHER = "the teacher"
"""What stands for a recipe's name in the teacher's row."""
ERROR = "error.txt"
"""File in a run's folder, with the traceback of a run that failed."""
COMPARED = ("peer-", "ablate-")
"""How the names of recipes begin that others are compared with."""


class Shelf:
    """Teachers, each loaded once for all the recipes that name it, with their datasets and scores."""

    def __init__(self) -> None:
        self._teachers: dict[str, Yardstick] = {}

    def teacher(self, spec: TeacherSpec) -> Yardstick:
        """Return a recipe's teacher."""
        key = spec.model_dump_json()
        if key not in self._teachers:
            self._teachers[key] = Yardstick(load_teacher(spec))
        return self._teachers[key]


def chosen(names: Iterable[str]) -> list[Recipe]:
    """Load recipes, each once.

    Args:
        names: Names of the library, YAML files, or patterns of names such as ``peer-*``.

    Raises:
        recipes.errors.UnknownRecipeError: A name or pattern finds none.
        recipes.errors.InvalidRecipeError: Two that differ have the same name.
    """
    known, found = Recipe.names(), dict[str, Recipe]()
    for name in names:
        for each in [one for one in known if fnmatchcase(one, name)] or [name]:
            recipe = Recipe.load(each)
            if found.setdefault(recipe.name, recipe) != recipe:
                raise InvalidRecipeError(f"two recipes are called {recipe.name!r}; give {each} another name.")
    return list(found.values())


def scaled(
    recipe: Recipe, scale: float = 1.0, seed: int | None = None, minutes: float | None = None
) -> Recipe:
    """Return a recipe of another length.

    Args:
        recipe: What to change.
        scale: Factor on the steps of every stage; at least 1 stays.
        seed: Another seed. None: its own.
        minutes: Of all stages together, divided among them as their steps are, in place of these. None: steps count.
    """
    fields = recipe.to_dict()
    whole = sum(stage["steps"] for stage in fields["stages"])
    for stage in fields["stages"]:
        if minutes is not None:
            stage["minutes"] = minutes * stage["steps"] / whole
        stage["steps"] = max(1, round(stage["steps"] * scale))
    return Recipe.from_dict(fields if seed is None else {**fields, "seed": seed})


def recovery(recipe: Recipe, folder: Path, shelf: Shelf, say: Say, *, debug: bool = False) -> list[Row]:
    """Run a recipe and measure its student by what the recipe is judged by.

    Args:
        recipe: The plan; a run of it that is in the folder already goes on, or is only measured.
        folder: Of the run.
        shelf: Holds teachers; what it has measured of one already is not measured again.
        say: Told what is being done.
        debug: Whether an error is raised, rather than noted.

    Returns:
        The row of ``"the teacher"``, then the student's. Both: ``recipe``, those of :data:`FIGURES` that were
        measured, and a score a task, measure and group, such as ``"text perplexity fortunes"``, or form of question
        in it, ``"pictures form slideshow 1024: after"``. The teacher's
        also, where trivial answers are known: ``above_trivial_min``, the least by which it stands above them. The
        student's also: ``seed``, ``steps`` taken, ``tokens`` read, ``minutes`` of training (without loading and the
        teacher's own answers), ``seconds_a_step``, and by stage those of :data:`BY_STAGE` that are known. A run
        that fails has one row, with a ``note``; its traceback is in the folder, as ``error.txt``.
    """
    own: Row = {"recipe": recipe.name, "seed": recipe.seed, "steps": sum(s.steps for s in recipe.stages)}
    gc.collect()  # models refer to themselves through their hooks, and stay after a run
    torch.cuda.empty_cache()
    (folder / ERROR).unlink(missing_ok=True)
    try:
        say("loading")
        yardstick = shelf.teacher(recipe.teacher)
        task = None if any(stage.data for stage in recipe.stages) else yardstick.task(recipe.data)
        done = distill(recipe, folder, teacher=yardstick.teacher, task=task, callbacks=[_Steps(say)])
        found = report(recipe, done.student, yardstick, say=say)
    except Exception as error:  # whatever it is, the other recipes go on
        if debug:
            raise
        return [{**own, "note": _noted(error, folder / ERROR)}]
    measured = _figures(found)
    of_teacher = {OF_TEACHER: measured.pop(OF_TEACHER)} if OF_TEACHER in measured else {}
    return [
        {"recipe": TEACHER, **dict.fromkeys(measured, 1.0), **of_teacher, **_scores(found, "teacher")},
        {**own, **_cost(done.history), **measured, **_scores(found, "student")},
    ]


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """Return the figures of the first recipe, as means over its seeds; none if it failed.

    Those of :data:`FIGURES` that it has, ``minutes``, and ``best_peer_ppl_ratio``: the least ``ppl_ratio`` of
    the recipes named ``peer-*``, likewise as means. And the teacher's ``above_trivial_min``, if it has one.
    """
    means: dict[str, dict[str, float]] = {}
    runs = [row for row in rows if row["recipe"] != TEACHER]
    for name in dict.fromkeys(row["recipe"] for row in runs):
        own = [row for row in runs if row["recipe"] == name and "note" not in row]
        keys = [key for key in (*FIGURES, "minutes") if own and all(key in row for row in own)]
        means[name] = {key: sum(row[key] for row in own) / len(own) for key in keys}
    found = dict(next(iter(means.values()), {}))
    for row in rows:
        if OF_TEACHER in row:
            found[OF_TEACHER] = row[OF_TEACHER]
    peers = [m["ppl_ratio"] for name, m in means.items() if name.startswith("peer-") and "ppl_ratio" in m]
    return {**found, "best_peer_ppl_ratio": min(peers)} if peers else found


def ordered(rows: Iterable[Row]) -> list[Row]:
    """Order rows: the teacher, recipes, peers, ablations; within these as they come, a recipe's seeds rising.

    Of rows of the same recipe and seed the last stays; the teacher's, which may be of several tasks, are joined.
    """
    teacher: Row = {}
    last: dict[tuple[str, int], Row] = {}
    for row in rows:
        if row["recipe"] == TEACHER:
            teacher |= row
        else:
            last[row["recipe"], row["seed"]] = row
    names = list(dict.fromkeys(name for name, _ in last))

    def place(run: tuple[str, int]) -> tuple[int, int, int]:
        name, seed = run
        kind = next((i for i, prefix in enumerate(COMPARED, 1) if name.startswith(prefix)), 0)
        return kind, names.index(name), seed

    return [*([teacher] if teacher else []), *(last[run] for run in sorted(last, key=place))]


def read(path: Path) -> Results:
    """Read a file that :func:`write` made.

    Raises:
        recipes.results.ResultsError: It is no results file, or one of other rows.
    """
    results = Results.read(path)
    for row in results.rows:
        if missing := {"recipe", "seed"} - row.keys() - ({"seed"} if row.get("recipe") == TEACHER else set()):
            raise ResultsError(
                f"{path} holds no recoveries: a row has no {min(missing)!r}; choose another file, or write it anew "
                "without adding to it."
            )
    return results


def write(path: Path, command: str, rows: Sequence[Row], *, add: bool) -> None:
    """Write rows as a results file.

    Args:
        path: The file.
        command: What made the rows.
        rows: Of :func:`recovery`.
        add: Whether the rows that the file has stay, but for those of the same recipe and seed; other processes
            may add to it at the same time.

    Raises:
        recipes.results.ResultsError: What is there is not such a file.
    """
    write_rows(path, command, ordered(rows), figures, join=ordered if add else None, read=read)


class _Steps(TrainerCallback):
    """Says how far the training is."""

    def __init__(self, say: Say) -> None:
        self.say = say

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        of = "" if state.max_steps >= FOREVER else f" of {state.max_steps}"
        self.say(f"{args.run_name}, step {state.global_step}{of}")


def _noted(error: Exception, file: Path) -> str:
    """Write an error's traceback to a file, and return what a note says of it."""
    note = f"{type(error).__name__}: {' '.join(str(error).split())}"
    try:
        write_atomically(file, "".join(traceback.format_exception(error)))
    except OSError:  # the disk may be full, which may be the error
        return note
    return f"{note} ({file})"


def _cost(history: Sequence[Row]) -> Row:
    stages = spent(history)
    steps, tokens, minutes = (sum(stage[key] for stage in stages) for key in ("steps", "tokens", "minutes"))
    for stage in stages:
        stage["seconds_a_step"] = 60 * stage["minutes"] / stage["steps"]
    by_stage = {
        f"{name} {stage['stage']}": round(stage[name], 4)
        for name in BY_STAGE
        for stage in stages
        if stage.get(name) is not None
    }
    total = round(60 * minutes / steps, 4)
    cost = {"steps": steps, "tokens": tokens, "minutes": round(minutes, 3), "seconds_a_step": total}
    return {**cost, **by_stage}


def _figures(found: Report) -> dict[str, float]:
    """Name the report's figures without their task, where recall is not the task and no two tasks have them."""
    named: dict[str, float] = {}
    for key, value in found.figures.items():
        measure = next((measure for measure in FIGURES if key.endswith(f"_{measure}")), key)
        if key.removesuffix(measure) == "recall_":
            measure = measure.replace("recovery", "recall_ratio")
        named[key if measure in named else measure] = value
    order = [*(name for name in FIGURES if name in named), *(name for name in named if name not in FIGURES)]
    return {name: named[name] for name in order}


def _scores(found: Report, side: str) -> dict[str, float]:
    groups = {f"{row['task']} {row['measure']} {row['group']}": row[side] for row in found.rows}
    return groups | {f"{row['task']} form {row['group']}: {row['form']}": row[side] for row in found.forms}
