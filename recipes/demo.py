"""`linmu demo`: a small vision-language model linearised from end to end, and what it gains."""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from transformers import PreTrainedModel, set_seed

import bridges
from recipes import plots
from recipes.bench.decode import decode
from recipes.bench.inputs import inputs_for
from recipes.bench.prefill import prefill, side_by_side
from recipes.checkpoint import load_parameters, read_tensors
from recipes.data import load_task
from recipes.data.task import Task
from recipes.distill import distill
from recipes.evaluate import Evaluation, evaluate
from recipes.explain import Explanation
from recipes.models import best_device
from recipes.plan import Recipe, Stage
from recipes.progress import ProgressBars
from recipes.results import Results, describe_device, show
from recipes.run import Run
from recipes.selection import activate
from recipes.teachers import load_teacher
from recipes.terminal import out, progress, spinner

RECIPE = "linmu-tiny-vlm"
LENGTHS = (1024, 2048, 4096, 8192, 16384)
MAX_PREFILL_SECONDS = 10.0
STAGE_QUESTIONS = 500
TARGET = 0.97
"""Least recovery (student's accuracy over the teacher's) that the demo is content with."""


def run(
    folder: Path,
    *,
    command: str = "linmu demo",
    questions: int = 2000,
    recipe: Recipe | str = RECIPE,
    lengths: Sequence[int] = LENGTHS,
) -> bool:
    """Convert, distil in stages, evaluate and measure; print one table, write one picture and ``demo.json``.

    Args:
        folder: Takes the picture, the results file and the student; a run in it is begun anew.
        command: For the results file.
        questions: Test questions asked of teacher and of student.
        recipe: What to do.
        lengths: Vision tokens of the slideshows whose prefill is measured.

    Returns:
        Whether the student keeps :data:`TARGET` of the teacher's accuracy.
    """
    start = time.perf_counter()
    recipe = Recipe.load(recipe) if isinstance(recipe, str) else recipe

    _heading("1  The teacher")
    with spinner("loading"):
        teacher = load_teacher(recipe.teacher)
        teacher.model.to(best_device())  # type: ignore[arg-type]
        task = load_task(recipe.data, teacher.model.config, teacher.tokenizer)
    _introduce(teacher.model, task)
    teacher_found = _ask("the teacher", teacher.model, task, questions)

    _heading("2  The surgery")
    converted = _convert(recipe, teacher.model)
    _ask("the converted model, before any training,", converted, task, STAGE_QUESTIONS)

    _heading("3  The distillation")
    out.print("The student learns from the teacher, stage by stage:")
    out.print(_plan(recipe, recipe.explain(teacher.model)))
    with ProgressBars(recipe) as bars:
        distilled = distill(recipe, folder, teacher=teacher, task=task, restart=True, callbacks=[bars])

    _heading("4  Teacher and student")
    accuracy = {"teacher": teacher_found.accuracy}
    results = Run(folder, recipe).stages
    for number, (stage, result) in enumerate(zip(recipe.stages[:-1], results), start=1):
        load_parameters(converted, read_tensors(result.result), result.result)
        activate(converted, stage.active)
        found = _ask(f"the student after stage {number}, {stage.name},", converted, task, STAGE_QUESTIONS)
        accuracy[_label(number, stage)] = found.accuracy
    student_found = _ask("the student", distilled.student, task, questions)
    accuracy[_label(len(recipe.stages), recipe.stages[-1])] = student_found.accuracy

    models = {"teacher": teacher.model, "student": distilled.student}
    slideshow = inputs_for(teacher.model, teacher.tokenizer)
    with spinner("prefill of slideshows") as now:
        prefills = prefill(
            models, slideshow, lengths, repeats=2, max_seconds=MAX_PREFILL_SECONDS, progress=now
        )
    with spinner("decoding after slideshows") as now:
        decodes = decode(models, slideshow, lengths[::2], new_tokens=8, progress=now)

    recovery = student_found.accuracy / teacher_found.accuracy if teacher_found.accuracy else 0.0
    rows = _comparison(teacher_found, student_found, prefills, decodes)
    plots.demo(
        folder / "demo.png",
        f"{task.name}: the student keeps {recovery:.1%} of the teacher's accuracy "
        f"({student_found.questions:,} questions; {describe_device()})",
        accuracy,
        prefills,
        decodes,
        distilled.history,
    )
    figures = {
        "teacher_accuracy": teacher_found.accuracy,
        "student_accuracy": student_found.accuracy,
        "recovery": recovery,
        "questions": student_found.questions,
        "seconds": round(time.perf_counter() - start, 1),
    }
    Results(command, figures, rows).write(folder / "demo.json")
    out.print(_table(rows))
    _conclude(figures, folder)
    return recovery >= TARGET


def _introduce(teacher: PreTrainedModel, task: Task) -> None:
    layers = teacher.config.get_text_config().num_hidden_layers
    out.print(
        f"A {type(teacher).__name__} of {teacher.num_parameters():,} weights. Each of its {layers} decoder layers "
        "attends from every token to all before it, so the cost of a prompt grows with the square of its length. "
        f"It answers questions about images ({task.name}):"
    )
    for item in task.test[:: max(1, len(task.test) // 3)][:3]:
        out.print(f"  {item['question']}  → {item['answer']}", style="dim", markup=False)


def _convert(recipe: Recipe, teacher: PreTrainedModel) -> PreTrainedModel:
    """Convert a copy of the teacher, as :func:`recipes.distill.distill` will."""
    spec, student = recipe.student, copy.deepcopy(teacher)
    set_seed(recipe.seed)
    report = bridges.replace_attention(student, spec.mixer, layers=spec.layers, init=spec.init, **spec.config)
    weights: Counter[str] = Counter()
    for layer in report.layers:
        for transfer in layer.transfers:
            weights[transfer.action] += math.prod(transfer.shape or (0,))
    names = ", ".join(dict.fromkeys(layer.mixer for layer in report.layers))
    out.print(
        f"In {len(report.layers)} layers, attention makes way for [bold]{names}[/], whose cost is linear: a scan "
        "with a state of constant size (Flex-MA) beside attention inside small windows (Local-Swin), weighed by a "
        f"gate. It keeps the layer's own projections ({weights['kept']:,} weights) and adds "
        f"{weights['initialised']:,} new ones. [dim]All of it: linmu convert {recipe.teacher.model} OUT --dry-run[/]"
    )
    return student


def _plan(recipe: Recipe, explanation: Explanation) -> Table:
    """What the recipe will do, a row a stage."""
    drawn = Table(
        box=box.SIMPLE_HEAD, caption=f"All of it: linmu explain {recipe.name}", caption_justify="left"
    )
    for column in ("stage", "branches", "losses", "trained weights", "steps × rows"):
        drawn.add_column(column, justify="right" if column in ("trained weights", "steps × rows") else "left")
    for number, stage in enumerate(explanation.stages, start=1):
        drawn.add_row(
            f"{number} {stage.name}",
            ", ".join(stage.active or ["all"]),
            " + ".join(stage.losses),
            f"{stage.trained_parameters:,}" + (" (LoRA)" if stage.adapted else ""),
            f"{stage.steps:,} × {stage.rows_per_step}",
        )
    return drawn


def _ask(who: str, model: PreTrainedModel, task: Task, questions: int) -> Evaluation:
    with progress(f"asking {who}") as report:
        found = evaluate(model, task, limit=questions, progress=report)
    out.print(
        f"{who[0].upper()}{who[1:]} answers [bold]{found.accuracy:.1%}[/] of {found.questions:,} questions rightly."
    )
    return found


def _label(number: int, stage: Stage) -> str:
    return f"stage {number}\n{stage.name}"


def _comparison(
    teacher: Evaluation,
    student: Evaluation,
    prefills: Sequence[Mapping[str, Any]],
    decodes: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """One row a measure and length, teacher beside student."""
    accuracy = {"teacher": teacher.accuracy, "student": student.accuracy}
    rows: list[dict[str, Any]] = [{"measure": "accuracy", "tokens": None, **accuracy}]
    for label, measured, value in (
        ("prefill, seconds", prefills, "seconds"),
        ("prefill memory above weights, MiB", prefills, "peak_mib"),
        ("cache for decoding, MiB", decodes, "state_mib"),
        ("time of a new token, ms", decodes, "ms_per_token"),
    ):
        for tokens, found in side_by_side(measured, value).items():
            rows.append({"measure": label, "tokens": tokens, **found})
    for row in rows:
        both = row["teacher"] and row["student"]
        row["student_over_teacher"] = row["student"] / row["teacher"] if both else None
    return rows


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    drawn = Table(
        box=box.SIMPLE_HEAD,
        title="Teacher and student",
        title_style="bold",
        title_justify="left",
        caption="– : left out, it would have taken too long"
        if any(r["teacher"] is None for r in rows)
        else None,
    )
    drawn.add_column("")
    for column in ("tokens", "teacher", "student", "student / teacher"):
        drawn.add_column(column, justify="right")
    before = None
    for row in rows:
        first = row["measure"] != before
        if first and before is not None:
            drawn.add_section()
        before = row["measure"]
        value = (lambda fraction: f"{fraction:.1%}") if row["measure"] == "accuracy" else show
        ratio = row["student_over_teacher"]
        drawn.add_row(
            row["measure"] if first else "",
            "" if row["tokens"] is None else show(row["tokens"]),
            value(row["teacher"]),
            value(row["student"]),
            show(None) if ratio is None else f"{ratio:.3f}" if row["measure"] == "accuracy" else show(ratio),
        )
    return drawn


def _conclude(figures: Mapping[str, Any], folder: Path) -> None:
    said = f"The student keeps {figures['recovery']:.1%} of the teacher's accuracy"
    if figures["recovery"] >= TARGET:
        out.print(f"[bold green]{said}.[/]")
    else:
        out.print(f"[bold red]{said}: it falls short of the {TARGET:.0%} that this demo asks for.[/]")
    for what, name in (("picture", "demo.png"), ("figures", "demo.json"), ("student", "student")):
        out.print(f"  {what}: {folder / name}", markup=False, soft_wrap=True)
    out.print(f"  took {figures['seconds']:.0f} s")


def _heading(text: str) -> None:
    out.print()
    out.rule(f"[bold]{text}[/]", align="left")
