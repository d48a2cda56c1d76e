"""Run a recipe: convert the teacher, train stage after stage, save the student. A killed run resumes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, set_seed

import bridges
from recipes.batching import check_sizes
from recipes.checkpoint import load_parameters, read_tensors, write_json, write_tensors
from recipes.data import load_task
from recipes.data.rows import Collator, Rows, teacher_answers
from recipes.data.task import Task
from recipes.plan import LoRA, Recipe, Stage
from recipes.recompute import recompute_layers
from recipes.run import Run, StageFolder
from recipes.selection import Selection, activate, converted_attention, select
from recipes.teachers import Teacher, load_teacher
from recipes.trainer import DistillTrainer, processes, training_arguments


@dataclass(frozen=True)
class Distilled:
    """A finished distillation.

    Attributes:
        student: In eval mode; saved in ``out/student``.
        teacher: What it was distilled from.
        task: The dataset.
        history: Log entries: ``stage``, ``step``, ``loss``, each loss by name, ``learning_rate``,
            ``tokens`` and ``seconds`` since the stage began, and of a GPU ``gpu_busy`` and ``peak_gib``.
        out: The run's folder.
    """

    student: PreTrainedModel
    teacher: Teacher
    task: Task
    history: list[dict[str, Any]]
    out: Path


def distill(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    teacher: Teacher | None = None,
    task: Task | None = None,
    resume: bool = True,
    restart: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> Distilled:
    """Distil a teacher into a student of linear cost, as a recipe says.

    All checks come before anything is written. A run that was killed goes on from its last checkpoint
    when it is called again with the same folder, and ends with the weights of a run that was not killed.
    Under ``torchrun`` or ``accelerate launch`` each process calls it with the same arguments.

    Args:
        recipe: A recipe, its name in the library, or a YAML file.
        out: Folder of the run.
        teacher: Default: the recipe's. Its weights are frozen and moved to the device.
        task: Default: the recipe's dataset. One that is given is trained on in all stages, whatever options they have.
        resume: Whether to go on with a run that is in the folder; if not, such a folder is refused.
        restart: Whether such a run is removed, after all checks, and begun anew.
        callbacks: Of transformers' Trainer, for each stage; ``args.run_name`` is the stage's name. With
            any, the Trainer's own progress bar stays away.

    Returns:
        Student, teacher, dataset and history.

    Raises:
        RecipeError: The recipe, the folder or a checkpoint is wrong, or the loss became NaN; each its
            own type.
        bridges.BridgeError: The teacher cannot be converted as the recipe says.
        recipes.data.task.TaskError: The data is missing or does not suit the teacher.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    teacher = load_teacher(recipe.teacher) if teacher is None else teacher
    spec = recipe.student
    bridges.plan(teacher.model, spec.mixer, layers=spec.layers, init=spec.init, **spec.config)
    recipe.explain(teacher.model)
    own: dict[str, Task] = {}
    if task is None:
        task = _task(recipe, teacher, {})
        own = {stage.name: _task(recipe, teacher, stage.data) for stage in recipe.stages if stage.data}
    for stage in recipe.stages:
        check_sizes(stage, own.get(stage.name, task))
    run = Run(Path(out), recipe) if restart else Run.check(Path(out), recipe, teacher.model, resume)

    ours = processes()
    teacher.model.requires_grad_(False).eval().to(ours.device)
    if ours.is_main_process:
        if restart:
            run.remove()
        run.start(teacher.model)
    ours.wait_for_everyone()
    for number, stage, folder in run.pending():
        _run_stage(run, number, stage, folder, teacher, own.get(stage.name, task), callbacks)

    student = _convert(run, teacher)
    activate(student, recipe.stages[-1].active)
    student.to(teacher.model.dtype)  # type: ignore[arg-type]
    student.requires_grad_(True).eval()
    history = run.history()
    if ours.is_main_process:
        write_json(run.path / "history.json", history)
        student.save_pretrained(run.student)
        teacher.tokenizer.save_pretrained(run.student)
    ours.wait_for_everyone()
    return Distilled(student, teacher, task, history, run.path)


def _task(recipe: Recipe, teacher: Teacher, options: dict[str, Any]) -> Task:
    spec = recipe.data.model_copy(update={"options": recipe.data.options | options})
    return load_task(spec, teacher.model.config, teacher.tokenizer)


def _convert(run: Run, teacher: Teacher) -> PreTrainedModel:
    """Return the student as the last finished stage left it."""
    spec = run.recipe.student
    set_seed(run.recipe.seed)
    student = copy.deepcopy(teacher.model)
    bridges.replace_attention(student, spec.mixer, layers=spec.layers, init=spec.init, **spec.config)
    result = run.latest_result()
    if result is not None:
        load_parameters(student, read_tensors(result), result)
    return student


def _run_stage(
    run: Run,
    number: int,
    stage: Stage,
    folder: StageFolder,
    teacher: Teacher,
    task: Task,
    callbacks: Sequence[TrainerCallback],
) -> None:
    seed = run.recipe.seed + number
    checkpoint, before = folder.checkpoint(), run.latest_result()
    student = _convert(run, teacher)
    activate(student, stage.active)
    selection = select(stage, student)
    changed = _changed(student, selection) | set(() if before is None else read_tensors(before))
    share_frozen(student, teacher.model, selection)
    set_seed(seed)
    model = adapt(student, stage.lora, selection)
    if stage.gradient_checkpointing:
        recompute_layers(model)
    rows = _rows(stage, folder, teacher, task, seed)
    arguments = training_arguments(
        stage,
        folder.path,
        seed=seed,
        workers=run.recipe.data.workers,
        bf16=in_bf16(teacher.model),
        quiet=bool(callbacks),
    )
    trainer = DistillTrainer(
        model,
        stage=stage,
        teacher=teacher.model,
        arguments=arguments,
        data=rows,
        collate=Collator(task, teacher.tokenizer.pad_token_id, stage.max_length),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        for linear in selection.linears.values():
            linear.weight.data = (
                linear.weight.data.clone()
            )  # adapters are merged in place, and it may be shared
        done = model.merge_and_unload() if isinstance(model, PeftModel) else model
        write_json(folder.history, trainer.history)
        write_tensors(folder.result, {n: p for n, p in done.named_parameters() if n in changed})
        folder.tidy()
    trainer.accelerator.wait_for_everyone()


def share_frozen(student: nn.Module, teacher: nn.Module, selection: Selection) -> None:
    """Let the student's weights that a stage does not train, and that still are the teacher's, be the teacher's own.

    Args:
        student: On the teacher's device; not wrapped by peft yet.
        teacher: Frozen.
        selection: What the stage trains; adapters may stand on shared weights.
    """
    trained = {id(p) for p in selection.trained.values()}
    theirs = dict(teacher.named_parameters(remove_duplicate=False))
    for name, ours in student.named_parameters(remove_duplicate=False):
        other = theirs.get(name)
        if other is None or id(ours) in trained or (ours.dtype, ours.shape) != (other.dtype, other.shape):
            continue
        if ours.device == other.device and torch.equal(ours, other):
            ours.data = other.data


def _changed(student: nn.Module, selection: Selection) -> set[str]:
    """Return the names of the parameters that differ from the teacher's after a stage."""
    adapted = {id(linear.weight) for linear in selection.linears.values()}
    trained = {id(p) for p in selection.trained.values()}
    mixers = {id(p) for a in converted_attention(student).values() for p in a.mixer.parameters()}
    return {name for name, p in student.named_parameters() if id(p) in adapted | trained | mixers}


def adapt(student: PreTrainedModel, lora: LoRA | None, selection: Selection) -> PreTrainedModel | PeftModel:
    """Freeze all but what is selected, which becomes fp32, and add the adapters."""
    trained = list(selection.trained.values())
    student.requires_grad_(False)
    model: PreTrainedModel | PeftModel = student
    if lora is not None:
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(selection.linears),
        )
        model = get_peft_model(student, config)
    for parameter in trained:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return model


def _rows(stage: Stage, folder: StageFolder, teacher: Teacher, task: Task, seed: int) -> Rows:
    answers = None
    if stage.losses.sequence_kd is not None:
        with PartialState().main_process_first():
            answers = teacher_answers(
                teacher.model,
                task,
                stage.losses.sequence_kd.samples,
                folder.answers,
                seed=seed,
                batch_size=stage.batch_size,
            )
    return Rows(task.train, answers, own=stage.losses.task is not None)


def in_bf16(model: PreTrainedModel) -> bool:
    """Return whether a model is trained in bf16: on a GPU that can, or where its weights are."""
    on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return on_gpu or model.dtype == torch.bfloat16
