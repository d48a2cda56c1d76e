"""One stage of a distillation on transformers' Trainer."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from recipes.batching import LikeSizes
from recipes.checkpoint import load_parameters, read_tensors, seal, write_tensors
from recipes.data.task import Batch
from recipes.errors import CheckpointError, LaunchError, NonFiniteLossError
from recipes.fused_norms import fused_norms
from recipes.minutes import FOREVER, Minutes
from recipes.objective import MICRO_BATCHES, Counts, Objective, token_masks
from recipes.plan import Stage
from recipes.selection import plain_name

WEIGHTS = "model.safetensors"
STAGING = ".saving"
GPU_LOAD = ("gpu_busy", "peak_gib")
"""What :func:`gpu_load` tells."""


def training_arguments(
    stage: Stage, folder: Path, *, seed: int, workers: int = 0, bf16: bool = False, quiet: bool = False
) -> TrainingArguments:
    """Translate a stage into the arguments of transformers' Trainer.

    Args:
        stage: The stage.
        folder: Where its checkpoints go.
        seed: Of data order and dropout.
        workers: Processes that make batches.
        bf16: Whether to compute in bf16 (autocast; weights that train stay fp32).
        quiet: Whether to leave out the Trainer's progress bar.
    """
    optimizer = stage.optimizer
    warmup = optimizer.warmup if optimizer.warmup >= 1 else optimizer.warmup * stage.steps
    arguments = TrainingArguments(
        output_dir=str(folder),
        run_name=stage.name,
        max_steps=stage.steps if stage.minutes is None else FOREVER,
        per_device_train_batch_size=stage.batch_size,
        gradient_accumulation_steps=stage.gradient_accumulation,
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        max_grad_norm=optimizer.max_grad_norm,
        warmup_steps=math.ceil(warmup),
        lr_scheduler_type="constant_with_warmup" if optimizer.schedule == "constant" else optimizer.schedule,
        bf16=bf16,
        use_cpu=not torch.accelerator.is_available(),
        seed=seed,
        data_seed=seed,
        dataloader_num_workers=workers,
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=True,
        save_strategy="no" if stage.save_every is None else "steps",
        save_steps=stage.save_every or 500,
        logging_steps=stage.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        dataloader_pin_memory=torch.accelerator.is_available(),
        include_num_input_tokens_seen="non_padding",
        disable_tqdm=quiet,
        report_to="none",
    )
    if arguments.n_gpu > 1:  # several GPUs in one process would be DataParallel, which copies hooks
        arguments._n_gpu = 1
    return arguments


def processes() -> PartialState:
    """Return the processes and the device as transformers' Trainer sees them, launched or alone."""
    arguments = TrainingArguments(report_to="none", use_cpu=not torch.accelerator.is_available())
    _ = arguments.device  # sets them up
    return PartialState()


class DistillTrainer(Trainer):
    """Trains a student for one stage: named losses, each logged, and checkpoints of what trains.

    A checkpoint folder appears whole or not at all. It holds the weights that this stage trains
    (safetensors), and the Trainer's optimizer, scheduler and random states, which transformers reads
    with ``weights_only=True``.

    Args:
        model: The student, wrapped by peft or not, with ``requires_grad`` set for this stage.
        stage: The stage.
        teacher: The frozen teacher.
        arguments: From :func:`training_arguments`.
        data: Map-style dataset.
        collate: Makes a batch.
        callbacks: Of transformers.

    Raises:
        LaunchError: The processes were launched for FSDP or DeepSpeed.
    """

    # Losses are means over all tokens of the optimiser step, so the Trainer must not divide them again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        stage: Stage,
        teacher: PreTrainedModel,
        arguments: TrainingArguments,
        data: Any,
        collate: Any,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        ends = [] if stage.minutes is None else [Minutes(stage.minutes, stage.optimizer)]
        super().__init__(
            model,
            args=arguments,
            train_dataset=data,
            data_collator=collate,
            callbacks=[_LastStep(), *ends, *callbacks],
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise LaunchError(
                "a student cannot be trained in shards (FSDP, DeepSpeed) yet: its losses use the output head outside "
                "of its own turn. Launch with plain data parallelism: torchrun --nproc_per_node N."
            )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True
        self.stage, self.student, self.teacher = stage, model, teacher
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.objective: Objective = Objective(stage.losses, base, teacher, self.accelerator.autocast)
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._steps: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._started = time.monotonic()
        self._staging: Path | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """What was logged: stage, step, loss, each loss by name, learning rate, tokens and seconds so far.

        On a GPU also what :func:`gpu_load` says.
        """
        keys = ("step", "loss", *self.stage.losses.weights, "learning_rate", "tokens", "seconds", *GPU_LOAD)
        entries = (entry for entry in self.state.log_history if "loss" in entry)
        return [{"stage": self.stage.name, **{key: e[key] for key in keys if key in e}} for e in entries]

    def train(self, resume_from_checkpoint: str | Path | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Train; see ``transformers.Trainer.train``. The hooks are gone afterwards, whatever happened.

        Raises:
            NonFiniteLossError: The loss became NaN or infinite; the step was not taken.
            CheckpointError: A checkpoint could not be read or written.
        """
        resume = None if resume_from_checkpoint is None else str(resume_from_checkpoint)
        if self.args.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.args.device)
        try:
            with fused_norms(self.student, self.teacher):
                return super().train(resume_from_checkpoint=resume, **kwargs)
        finally:
            self.objective.close()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Collect the batches of an optimiser step, and count the tokens of each loss in all of them."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = self._count(batches, device)
        for name in self.stage.losses.weights:
            self._steps[name] += (torch.as_tensor(counts.get(name, 1)) > 0).to(device)
        return batches, counts

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Counts | None = None,
    ) -> Any:
        """Return the weighted sum of the stage's losses on a batch."""
        counts = self._count([inputs], self.args.device) if num_items_in_batch is None else num_items_in_batch
        with self.objective.measure(inputs, counts, scale=self.accelerator.num_processes) as kwargs:
            outputs = model(**kwargs)
        loss = outputs["loss"]
        if not torch.isfinite(loss):
            values = ", ".join(f"{name} {value.item():g}" for name, value in self.objective.values.items())
            raise NonFiniteLossError(
                f"stage {self.stage.name!r}, step {self.state.global_step + 1}: the loss is not finite ({values}). "
                "The step was not taken; lower the learning rate, or resume from the last checkpoint."
            )
        for name, value in self.objective.values.items():
            self._sums[name] += value
        return (loss, outputs) if return_outputs else loss

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the batches; where the dataset knows the sizes of its rows, like are with like."""
        sizes = getattr(self.train_dataset, "sizes", None)
        if sizes is None or (len(set(sizes)) == 1 and self.stage.batch_tokens is None):
            return super().get_train_dataloader()
        args = self.args
        rows, tokens = args.train_batch_size, self.stage.batch_tokens
        batches = LikeSizes(sizes, rows, tokens, processes=args.world_size, seed=args.seed)
        self.accelerator.even_batches = False  # they are already, without one size in common
        loader = DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer; what has a factor on its learning rate is in groups of its own, behind the rest."""
        made = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*(() if model is None else (model,)))
        if not made and self.stage.optimizer.factors:
            optimizer.param_groups[:] = chain.from_iterable(map(self._by_factor, optimizer.param_groups))
        return optimizer

    def _by_factor(self, group: dict[str, Any]) -> Iterator[dict[str, Any]]:
        names = {id(p): plain_name(name) for name, p in self.student.named_parameters()}
        parts: dict[float, list[nn.Parameter]] = {1.0: []}  # first, for its rate is the one that is logged
        given = self.stage.optimizer.factors.items()
        for parameter in group["params"]:
            fitting = [factor for pattern, factor in given if re.search(pattern, names[id(parameter)])]
            parts.setdefault(fitting[-1] if fitting else 1.0, []).append(parameter)
        for factor, parameters in parts.items():
            yield {**group, "params": parameters, "lr": factor * group["lr"]}

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weight decay is for matrices: norms, biases and the decays of a scan are spared."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with each loss by name, tokens, seconds and the load of the GPU."""
        if "loss" in logs:
            # Over the steps that had tokens for a loss: not each has rows of both kinds.
            steps = {name: max(int(self._steps[name]), 1) for name in self.stage.losses.weights}
            named = {name: self._mean(self._sums[name]) / count for name, count in steps.items()}
            self._sums.clear()
            self._steps.clear()
            # In the order of history; grad_norm last.
            logs = {"loss": logs["loss"], **named, **logs}
            logs |= {"tokens": self.state.num_input_tokens_seen, "seconds": round(self._seconds(), 3)}
            logs |= gpu_load(self.args.device)
        super().log(logs)

    def _seconds(self) -> float:
        if not hasattr(self, "_seconds_before"):
            earlier = [entry["seconds"] for entry in self.state.log_history if "seconds" in entry]
            self._seconds_before = earlier[-1] if earlier else 0.0
        return self._seconds_before + time.monotonic() - self._started

    def _mean(self, value: Tensor) -> float:
        return float(self.accelerator.reduce(value, reduction="mean"))

    def _count(self, batches: Iterable[Batch], device: torch.device) -> Counts:
        counts: dict[str, Tensor | int] = defaultdict(int)
        for batch in batches:
            counts[MICRO_BATCHES] += 1
            for name, mask in token_masks(self.stage.losses, batch).items():
                counts[name] += mask.sum().to(device)
        for name, count in counts.items():
            if name != MICRO_BATCHES:
                counts[name] = self.accelerator.reduce(count, reduction="sum")
        return counts

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir or ".")
        name = f"checkpoint-{self.state.global_step}"
        staging = folder / STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal(staging / name)
                older = checkpoints(folder)
                os.replace(staging / name, folder / name)
                for path in older:
                    shutil.rmtree(path)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(staging, ignore_errors=True)
            kept = [path.name for path in checkpoints(folder)]
            raise CheckpointError(
                f"stage {self.stage.name!r}: could not save {name} in {folder}: {error}. "
                f"{f'{kept[-1]} is whole; ' if kept else ''}free some space and start again to resume."
            ) from error
        finally:
            self._staging = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / WEIGHTS, self._trained())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / WEIGHTS
        tensors = read_tensors(path)
        missing = self._trained().keys() - tensors.keys()
        if missing:
            raise CheckpointError(f"{path} does not hold {min(missing)}, which this stage trains.")
        load_parameters(self.student, tensors, path)

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.student.named_parameters() if p.requires_grad}


def gpu_load(device: torch.device) -> dict[str, float]:
    """Tell how much of a GPU is in use.

    Returns:
        ``gpu_busy``: the share of the last moments, at most a second, in which a kernel ran, of whichever process;
        left out where the package nvidia-ml-py is not installed or the driver does not tell. ``peak_gib``: the most
        memory that tensors of this process took, since its peak was reset. Nothing for another device.
    """
    if device.type != "cuda":
        return {}
    load = {}
    with contextlib.suppress(Exception):  # a missing package, and each refusal of a driver, has its own type
        load["gpu_busy"] = torch.cuda.utilization(device) / 100
    return {**load, "peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 3)}


class _LastStep(TrainerCallback):
    """Logs the last step, and saves no checkpoint there: the stage's result follows at once."""

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_log, control.should_save = True, False


def checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a stage's folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))
