"""A progress bar for each stage of a distillation."""

from __future__ import annotations

from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recipes.plan import Recipe
from recipes.terminal import err


class ProgressBars(TrainerCallback):
    """Shows the stages of a recipe, their steps and last logged loss; a context manager.

    Args:
        recipe: What is run.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
            console=err,
        )
        self.tasks: dict[str, TaskID] = {}
        for number, stage in enumerate(recipe.stages, start=1):
            self.tasks[stage.name] = self.bars.add_task(
                f"stage {number}, {stage.name}",
                total=stage.steps if stage.minutes is None else None,
                start=False,
                loss="",
            )

    def __enter__(self) -> ProgressBars:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the stage's clock, at the step it resumes from."""
        self.bars.start_task(self.tasks[str(args.run_name)])
        self.bars.update(self.tasks[str(args.run_name)], completed=state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Move the stage's bar."""
        self.bars.update(self.tasks[str(args.run_name)], completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Show the loss."""
        if logs and "loss" in logs:
            self.bars.update(self.tasks[str(args.run_name)], loss=f"loss {logs['loss']:.3g}")
