"""What a distillation kept of its teacher: every measure of its recipe, and the error of each layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel

from recipes.agreement import agreement
from recipes.alignment import TRACE, Alignment, TeacherTrace
from recipes.data.task import Task
from recipes.evaluate import batches, evaluate, judged, perplexity, spread, to_device
from recipes.plan import AttentionWeights, HiddenStates, Judge, Recipe
from recipes.selection import converted_attention
from recipes.teachers import Teacher
from recipes.weight_alignment import WeightAlignment
from recipes.yardstick import Yardstick

Say = Callable[[str], None]
"""Told what is being measured."""

LAYER_ROWS = 8
"""Test items on which the errors of layers are measured."""


@dataclass(frozen=True)
class Report:
    """How a student stands beside its teacher.

    Attributes:
        rows: A row a task, measure and group: ``task`` (its label), ``measure``, ``group`` (``"all"``, or a category),
            ``teacher``, ``student``, ``recovery`` and ``count`` (questions or tokens). Recovery is
            the student's part of the teacher's score, or the teacher's perplexity over the student's; None
            where the teacher's score is 0. Accuracies also have, where the task knows it, ``trivial``, the score of
            answers without a look, and ``above_trivial``, by how much the teacher's is higher; and, where the task
            shows pictures, ``long_video``, whether the group is one of long videos.
        layers: A row a converted layer: ``layer``, ``injected`` (error of its mixer on the teacher's input) and
            ``chained`` (error of the stream after it), as fractions of the teacher's squared size; and where
            all mixers average ``attention``, the divergence of its attention weights from the teacher's on the
            teacher's input, KL over some text tokens.
        forms: Rows likewise of the accuracies of each ``form`` of question in a group, where items have one.
    """

    rows: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    forms: list[dict[str, Any]] = field(default_factory=list)

    @property
    def figures(self) -> dict[str, float]:
        """The few numbers that sum the rows up.

        By task: perplexity of the student over the teacher's, agreement, and the mean and least recovery of
        accuracies, over the task's groups if it has any. Tasks that show pictures are taken together:
        ``recovery_mean`` and ``recovery_min`` are over the groups of all of them, ``recovery_long_video`` is the mean
        over those of long videos. ``above_trivial_min`` is the least by which the teacher stands above trivial answers.
        """
        found: dict[str, float] = {}
        pictured: list[dict[str, Any]] = []
        for task in dict.fromkeys(row["task"] for row in self.rows):
            own = [row for row in self.rows if row["task"] == task]
            for row in own:
                if row["group"] == "all" and row["measure"] == "perplexity":
                    found[f"{task}_ppl_ratio"] = row["student"] / row["teacher"]
                if row["group"] == "all" and row["measure"] == "agreement":
                    found[f"{task}_agreement"] = row["student"]
            scores = [row for row in own if row["measure"] == "accuracy" and row["recovery"] is not None]
            scores = [row for row in scores if row["group"] != "all"] or scores
            if any("long_video" in row for row in scores):
                pictured += scores
            else:
                found |= {f"{task}_{name}": value for name, value in _recovery(scores).items()}
        found |= _recovery(pictured)
        if long := [row["recovery"] for row in pictured if row["long_video"]]:
            found["recovery_long_video"] = fmean(long)
        if above := [row["above_trivial"] for row in self.rows if "above_trivial" in row]:
            found["above_trivial_min"] = min(above)
        return found


def _recovery(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    values = [row["recovery"] for row in rows]
    return {"recovery_mean": fmean(values), "recovery_min": min(values)} if values else {}


def report(
    recipe: Recipe,
    student: PreTrainedModel,
    teacher: Teacher | Yardstick,
    *,
    limit: int | None = None,
    say: Say | None = None,
) -> Report:
    """Measure a student and its teacher by what the recipe is judged by.

    Args:
        recipe: Its ``judged_by`` says what is measured; if that is empty, accuracy on the test split of its data.
        student: On the teacher's device.
        teacher: What it was distilled from. A yardstick of it measures for all its students only once what is the
            teacher's own.
        limit: Use so many items of each test split, whatever the recipe says. None: as it says.
        say: Told what is being measured.

    Raises:
        recipes.evaluate.EvaluationError: There is nothing to measure.
        recipes.data.task.TaskError: A dataset is missing or does not suit the teacher.
    """
    judges = recipe.judged_by or [Judge(**recipe.data.model_dump())]
    if limit is not None:
        judges = [judge.model_copy(update={"limit": limit}) for judge in judges]
    yardstick = teacher if isinstance(teacher, Yardstick) else Yardstick(teacher)
    rows: list[dict[str, Any]] = []
    forms: list[dict[str, Any]] = []
    for judge in judges:
        for measure in judge.measures:
            if say is not None:
                say(f"{judge.label}: {measure}")
            for row in _measured(judge, measure, student, yardstick):
                (forms if "form" in row else rows).append(row)
    if say is not None:
        say("errors of layers")
    return Report(rows, layer_errors(student, yardstick.teacher.model, yardstick.task(judges[0])), forms)


def _measured(
    judge: Judge, measure: str, student: PreTrainedModel, yardstick: Yardstick
) -> Iterator[dict[str, Any]]:
    task = yardstick.task(judge)
    common = {"task": judge.label, "measure": measure}
    arguments = judge.arguments(measure)
    trivial: Mapping[Any, float] = {}
    long_videos: Collection[str] | None = None
    if measure == "agreement":
        found = agreement(student, yardstick.continuations(judge), batch_size=judge.batch_size)
        values: dict[Any, tuple[float, float, int]] = {"all": (1.0, found.agreement, found.tokens)}
        values |= {name: (1.0, group.accuracy, group.questions) for name, group in found.groups.items()}
    elif measure == "perplexity":
        one, other = yardstick.perplexity(judge), perplexity(student, task, **arguments)
        values = {"all": (one.perplexity, other.perplexity, one.tokens)}
        values |= {n: (g.perplexity, other.groups[n].perplexity, g.tokens) for n, g in one.groups.items()}
    else:
        first, second = yardstick.accuracy(judge), evaluate(student, task, **arguments)
        values = {"all": (first.accuracy, second.accuracy, first.questions)}
        values |= {n: (g.accuracy, second.groups[n].accuracy, g.questions) for n, g in first.groups.items()}
        values |= {n: (g.accuracy, second.forms[n].accuracy, g.questions) for n, g in first.forms.items()}
        trivial, long_videos = getattr(task, "trivial", {}), getattr(task, "long_videos", None)
    for name, (whole, part, count) in values.items():
        better, worse = (whole, part) if measure == "perplexity" else (part, whole)
        named = {"group": name} if isinstance(name, str) else dict(zip(("group", "form"), name))
        row = {**common, **named, "teacher": whole, "student": part}
        row["recovery"] = better / worse if worse else None
        if name in trivial:
            row |= {"trivial": trivial[name], "above_trivial": whole - trivial[name]}
        if long_videos is not None:
            row["long_video"] = row["group"] in long_videos
        yield {**row, "count": count}


def layer_errors(
    student: PreTrainedModel, teacher: PreTrainedModel, task: Task, *, limit: int = LAYER_ROWS
) -> list[dict[str, Any]]:
    """Measure how far each converted layer is from the teacher's, on test items.

    Returns:
        A row a layer: ``layer``, ``injected`` and ``chained``, and ``attention`` where all mixers average; see
        :class:`Report`.
    """
    averages = all(attention.mixer.averages for attention in converted_attention(student).values())
    cuda = [student.device] if student.device.type == "cuda" else []
    found: dict[int, dict[str, float]] = {}
    with torch.random.fork_rng(cuda):
        torch.manual_seed(0)
        for name, settings, weights in (
            ("injected", HiddenStates(form="injected"), AttentionWeights() if averages else None),
            ("chained", HiddenStates(form="chained", at="layer"), None),
        ):
            names = {"hidden_states": name, "attention_weights": "attention"}
            for loss, errors in _errors(student, teacher, task, settings, weights, limit).items():
                for index, error in errors.items():
                    found.setdefault(index, {})[names[loss]] = error
    return [{"layer": index, **errors} for index, errors in sorted(found.items())]


def _errors(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    task: Task,
    settings: HiddenStates,
    weights: AttentionWeights | None,
    limit: int,
) -> dict[str, dict[int, float]]:
    """Loss → layer index → its mean over items."""
    items = spread(task.test, limit, task.name)
    hooks: list[TeacherTrace | Alignment | WeightAlignment] = []
    sums: dict[str, dict[int, float]] = {}
    try:
        if weights is not None:
            hooks.append(WeightAlignment(teacher, student, weights))
        hooks.append(Alignment(student, settings, True))
        hooks.append(recorder := TeacherTrace(teacher, student, settings, inputs=weights is not None))
        with judged(student), judged(teacher):
            for chunk in batches(items, 1):
                batch = to_device(task.collate(chunk), student.device)
                del batch["labels"]
                trace = recorder(batch)
                student(**batch, **{TRACE: trace}, use_cache=False, logits_to_keep=1)
                for name, losses in (trace.losses or {}).items():
                    found = sums.setdefault(name, {})
                    for index, loss in losses.items():
                        found[index] = found.get(index, 0.0) + float(loss) / len(items)
    finally:
        for hook in hooks:
            hook.close()
    return sums
