"""Trains the mini VLM on any task: projector and decoder in full, or the decoder by low-rank adapters.

    python -m recipes.mini_vlm.train --task pictures --out DIR

Prints one JSON object a line: progress, then the accuracy by generation. The folder is a teacher for recipes;
without `--out` it is the one that they know as `vlm-mini`. Where the task has pictures of things with names, the
projector learns these first, from `--captions` many. `--start DIR` goes on from an earlier folder, with other data
say. `--minutes` gives the training a time in place of a number of steps. With `--rank` the decoder gets adapters,
merged at the end: `trained.safetensors` is small then.

`trained.safetensors` and `training.json` in a folder are all that one training made: `--restore DIR …` makes the
whole folder of them again elsewhere, of trainings that went on from each other in their order.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from recipes.batching import check_sizes
from recipes.checkpoint import load_parameters, read_json, read_tensors, write_json, write_tensors
from recipes.data import load_task
from recipes.data.rows import Collator, Rows
from recipes.data.task import Task
from recipes.data.visual import VisualTask
from recipes.distill import adapt, in_bf16
from recipes.errors import LossError
from recipes.evaluate import evaluate
from recipes.mini_vlm.build import build_pretrained
from recipes.mini_vlm.pretrain import pretrain_projector
from recipes.models import best_device
from recipes.plan import LoRA, Losses, Optimizer, Stage, TaskLoss, TaskSpec, TeacherSpec
from recipes.selection import select
from recipes.teachers import load_teacher, vlm_mini_folder
from recipes.trainer import DistillTrainer, processes, training_arguments

TRAINED, RECORD = "trained.safetensors", "training.json"
PROJECTOR = r"visual\.projector\."
LAYERS = r"language_model\.layers\."
DECODER = LAYERS + r"\d+\.(self_attn|mlp)\..+_proj$"
JUDGED = 48_000
"""Tokens of a batch of questions, where nothing else is asked for: videos are hundreds of times as long as images."""


def training_stage(
    *,
    steps: int,
    batch_size: int,
    learning_rate: float = 3e-4,
    gradient_accumulation: int = 1,
    batch_tokens: int | None = None,
    rank: int | None = None,
    minutes: float | None = None,
) -> Stage:
    """Return a stage that trains projector and decoder by the cross-entropy of the answers.

    Args:
        steps: Optimiser steps.
        batch_size: Rows of a step, or of a part of it.
        learning_rate: At its highest.
        gradient_accumulation: Parts of a step.
        batch_tokens: Most tokens of a part, about. None: as many as its rows have.
        rank: Of the decoder's adapters. None: its layers are trained in full.
        minutes: Train so long in place of ``steps``. None: ``steps`` is how long.
    """
    return Stage(
        name="teacher",
        trainable=[PROJECTOR] if rank else [PROJECTOR, LAYERS],
        lora=LoRA(targets=[DECODER], rank=rank, alpha=2 * rank) if rank else None,
        losses=Losses(task=TaskLoss()),
        optimizer=Optimizer(learning_rate=learning_rate),
        steps=steps,
        minutes=minutes,
        batch_size=batch_size,
        batch_tokens=batch_tokens,
        gradient_accumulation=gradient_accumulation,
    )


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    stage: Stage,
    out: str | Path,
    *,
    seed: int = 0,
    workers: int = 0,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, Any]]:
    """Train a model on the answers of a task, and save it whole, with its tokenizer and what training made.

    Args:
        model: Is trained in place; in eval mode and its old dtype afterwards.
        tokenizer: Its tokenizer.
        task: The dataset.
        stage: What to train and how; its loss is ``task``, because there is no teacher here.
        out: Folder for model and tokenizer.
        seed: Of adapters, data order and dropout.
        workers: Processes that make batches.
        callbacks: Of transformers' Trainer; with any, its own progress bar stays away.

    Returns:
        Log entries as those of :func:`recipes.distill.distill`.

    Raises:
        LossError: The stage has a loss that needs a teacher.
        TaskError: Tokens bound its batches, and the dataset does not know the sizes of its rows.
        RecipeError: A pattern matches nothing, or the loss became NaN; each its own type.
    """
    if set(stage.losses.weights) != {"task"}:
        raise LossError(
            f"stage {stage.name!r} has the losses {', '.join(stage.losses.weights)}, but where the teacher itself is "
            "trained there is only task."
        )
    out, dtype = Path(out), model.dtype
    check_sizes(stage, task)
    selection = select(stage, model)
    model.to(processes().device)  # type: ignore[arg-type]
    set_seed(seed)
    adapted = adapt(model, stage.lora, selection)
    trainer = DistillTrainer(
        adapted,
        stage=stage,
        teacher=model,
        arguments=training_arguments(
            stage, out, seed=seed, workers=workers, bf16=in_bf16(model), quiet=bool(callbacks)
        ),
        data=Rows(task.train, None, own=True),
        collate=Collator(task, tokenizer.pad_token_id, stage.max_length),
        callbacks=callbacks,
    )
    trainer.train()
    for parameter in _trained(adapted).values():  # what the file can hold, so that restoring is exact
        parameter.data = parameter.data.to(dtype).float()
    if trainer.is_world_process_zero():
        write_tensors(out / TRAINED, {name: p.to(dtype) for name, p in _trained(adapted).items()})
        done = stage.model_copy(update={"steps": trainer.state.global_step, "minutes": None})
        write_json(out / RECORD, {"task": task.name, "seed": seed, "stage": done.model_dump(mode="json")})
        write_json(out / "history.json", trainer.history)
    _merge(adapted, dtype)
    if trainer.is_world_process_zero():
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    trainer.accelerator.wait_for_everyone()
    return trainer.history


def restore(model: PreTrainedModel, folder: str | Path) -> None:
    """Do to a model that is not trained yet what a training did.

    Args:
        model: As :func:`train` was given it, but for the projector's weights; changed in place.
        folder: Holds ``trained.safetensors`` and ``training.json``.

    Raises:
        CheckpointError: A file is missing or damaged, or made for another model.
    """
    folder, dtype = Path(folder), model.dtype
    stage = Stage.model_validate(read_json(folder / RECORD)["stage"])
    tensors = {name: tensor.float() for name, tensor in read_tensors(folder / TRAINED).items()}
    adapted = adapt(model, stage.lora, select(stage, model))
    try:
        load_parameters(adapted, tensors, folder / TRAINED)
    finally:  # adapters that nothing was loaded into are zero, and leave the model as it was
        _merge(adapted, dtype)


def _trained(adapted: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in adapted.named_parameters() if p.requires_grad}


def _merge(adapted: PreTrainedModel | PeftModel, dtype: torch.dtype) -> None:
    model: Any = adapted.merge_and_unload() if isinstance(adapted, PeftModel) else adapted
    model.to(dtype).requires_grad_(True).eval()


class _Printed(TrainerCallback):
    """Prints each log entry as a line of JSON."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            print(json.dumps({"step": state.global_step, **(logs or {})}), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, saves and evaluates; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=vlm_mini_folder(), help="folder for the trained model")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--start", type=Path, help="folder of an earlier training to go on from")
    begin.add_argument(
        "--restore", type=Path, nargs="+", help="do again what trainings left in these folders"
    )
    parser.add_argument("--task", default="pictures", help="dataset")
    parser.add_argument("--options", type=json.loads, default={}, help="its options, as JSON")
    parser.add_argument("--captions", type=int, default=8192, help="pictures that the projector starts on")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, help="train so long, whatever the number of steps")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--batch-tokens", type=int, help="most tokens of a batch, which then has fewer long rows"
    )
    parser.add_argument("--gradient-accumulation", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--rank", type=int, help="of adapters of the decoder; without, all of it is trained")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches")
    parser.add_argument("--questions", type=int, default=1000, help="test questions to judge by")
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    dtype: Literal["float32", "bfloat16"] = "bfloat16" if torch.cuda.is_available() else "float32"
    if options.start:
        teacher = load_teacher(TeacherSpec(model=str(options.start), dtype=dtype))
        model, tokenizer = teacher.model, teacher.tokenizer
    else:
        model, tokenizer = build_pretrained(dtype)
    task = load_task(TaskSpec(task=options.task, options=options.options), model.config, tokenizer)
    if options.restore:
        for folder in options.restore:
            restore(model, folder)
        model.to(best_device())  # type: ignore[arg-type]
        model.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)
    else:
        stage = training_stage(
            steps=options.steps,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            gradient_accumulation=options.gradient_accumulation,
            batch_tokens=options.batch_tokens,
            rank=options.rank,
            minutes=options.minutes,
        )
        if not options.start and isinstance(task, VisualTask):
            captioned = task.captioned(options.captions)
            model.to(processes().device)  # type: ignore[arg-type]
            losses = pretrain_projector(model, task, captioned, workers=options.workers, seed=options.seed)
            print(json.dumps({"captions": len(captioned), "losses": losses[::50]}), flush=True)
        run = {"seed": options.seed, "workers": options.workers}
        train(model, tokenizer, task, stage, options.out, callbacks=[_Printed()], **run)
    judged = evaluate(
        model,
        task,
        limit=options.questions,
        batch_size=options.batch_size,
        batch_tokens=options.batch_tokens or JUDGED,
        workers=options.workers,
    )
    print(json.dumps({"accuracy": judged.accuracy, "questions": judged.questions, "groups": judged.rows()}))


if __name__ == "__main__":
    main()
