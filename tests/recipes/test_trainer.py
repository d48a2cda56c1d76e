from __future__ import annotations

import copy
import errno
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import safe_globals

import bridges
import recipes.trainer
from recipes.checkpoint import read_tensors, verify
from recipes.data.rows import Collator, Rows
from recipes.distill import adapt
from recipes.errors import CheckpointError, LaunchError, NonFiniteLossError
from recipes.plan import Stage
from recipes.selection import activate, select
from recipes.trainer import (
    GPU_LOAD,
    DistillTrainer,
    checkpoints,
    gpu_load,
    training_arguments,
)
from tests.recipes.toys import MODELS, QUIET, Riddles, stage


def trainer(folder, kind="llama", callbacks=QUIET, **fields):
    plan = Stage(**stage(**fields))
    teacher = MODELS[kind]().requires_grad_(False)
    student = copy.deepcopy(teacher)
    torch.manual_seed(0)
    # An even gate, so that no gradient is too small to be compared.
    bridges.replace_attention(student, "mmate", text_window=4, window=(1, 2, 2), chunk_size=8, gate_bias=0.0)
    activate(student, plan.active)
    model = adapt(student, plan.lora, select(plan, student))
    task = Riddles(images=kind == "qwen")
    return DistillTrainer(
        model,
        stage=plan,
        teacher=teacher,
        arguments=training_arguments(plan, Path(folder), seed=0, quiet=True),
        data=Rows(task.train, None, own=True),
        collate=Collator(task, 0),
        callbacks=callbacks,
    )


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize(
    "fields",
    [
        {
            "losses": {"hidden_states": 1.0},
            "active": ["flex_ma"],
            "trainable": [r"branches\.flex_ma", "[qkvo]_proj"],
        },
        {"losses": {"hidden_states": {"form": "chained"}, "token_kd": 1.0}},
        {"trainable": [r"layers\.1.*norm"], "lora": {"targets": ["up_proj"]}, "losses": {"task": 1.0}},
    ],
)
def test_training_changes_what_the_stage_trains_and_nothing_else(tmp_path, kind, fields):
    run = trainer(tmp_path, kind, steps=3, optimizer={"learning_rate": 1e-2, "warmup": 0}, **fields)
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    before = snapshot(run.model)
    run.train()
    changed = {name for name, p in run.model.named_parameters() if not torch.equal(before[name], p)}
    assert changed <= trained
    # What no token of the data needs stays: the backward scan without vision.
    idle = {name for name in trained - changed if "backward_decay" not in name}
    assert not idle


def test_accumulated_batches_are_one_large_batch(tmp_path):
    """Mean over all tokens of the step, not a mean of means: rows have different numbers of tokens."""
    losses = {"token_kd": {"tokens": "valid", "weight": 1.0}}
    after = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        run = trainer(
            tmp_path / str(size), steps=2, batch_size=size, gradient_accumulation=accumulation, losses=losses
        )
        run.train()
        after.append((snapshot(run.model), run.history))
    (whole, logged), *others = after
    for weights, history in others:
        for name in whole:
            torch.testing.assert_close(weights[name], whole[name], rtol=1e-3, atol=1e-4, msg=name)
        for a, b in zip(history, logged):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert a["tokens"] == b["tokens"]


def test_history_has_every_loss_by_name(tmp_path):
    run = trainer(tmp_path, steps=5, log_every=2, losses={"hidden_states": {"form": "chained"}, "task": 0.5})
    run.train()
    assert [entry["step"] for entry in run.history] == [1, 2, 4, 5]
    for entry in run.history:
        assert set(entry) - set(GPU_LOAD) == {
            "stage", "step", "loss", "hidden_states", "task", "learning_rate", "tokens", "seconds",
        }  # fmt: skip
        assert entry["loss"] == pytest.approx(entry["hidden_states"] + 0.5 * entry["task"], rel=1e-5)
    assert all(a["tokens"] < b["tokens"] for a, b in zip(run.history, run.history[1:]))


def test_the_load_of_a_gpu_is_in_the_history_and_what_is_not_told_is_left_out(tmp_path, monkeypatch):
    def absent(device):
        raise ModuleNotFoundError("nvidia-ml-py")

    gpu, told = torch.device("cuda", 0), []
    assert gpu_load(torch.device("cpu")) == {}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    monkeypatch.setattr(torch.cuda, "utilization", absent)
    assert gpu_load(gpu) == {"peak_gib": 1.5}
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: told.append(device) or 87)
    assert gpu_load(gpu) == {"gpu_busy": 0.87, "peak_gib": 1.5}
    assert told == [gpu]
    monkeypatch.setattr(recipes.trainer, "gpu_load", lambda device: gpu_load(gpu))
    run = trainer(tmp_path)
    run.train()
    assert all((entry["gpu_busy"], entry["peak_gib"]) == (0.87, 1.5) for entry in run.history)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_before_the_step(tmp_path, value):
    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                with torch.no_grad():
                    model.model.norm.weight.fill_(value)

    run = trainer(tmp_path, steps=4, name="local-swin", callbacks=[Poison()])
    stepped, hooks = [], len(run.model._forward_hooks)
    run.add_callback(
        type("Count", (TrainerCallback,), {"on_optimizer_step": lambda *a, **k: stepped.append(1)})
    )
    with pytest.raises(NonFiniteLossError, match="stage 'local-swin', step 3"):
        run.train()
    assert len(stepped) == 2
    assert len(run.model._forward_hooks) == hooks - 1


def test_a_checkpoint_holds_what_trains_and_is_sealed(tmp_path):
    run = trainer(tmp_path, steps=3, save_every=1, lora={"targets": ["up_proj"]}, trainable=[r"mixer\.gate"])
    run.train()
    (kept,) = checkpoints(tmp_path)
    assert kept.name == "checkpoint-2"
    verify(kept)
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert set(read_tensors(kept / recipes.trainer.WEIGHTS)) == trained
    for file in kept.glob("*.pt*"):
        with safe_globals():
            torch.load(file, weights_only=True)
    assert not list(kept.glob("*.bin"))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed")]
)
def test_a_full_disk_leaves_the_older_checkpoint_whole(tmp_path, monkeypatch, error):
    run = trainer(tmp_path, steps=4, save_every=1)
    save, calls = torch.save, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) > 4:  # optimizer, scheduler and random state of the first; one file of the second
            raise error
        return save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="checkpoint-1 is whole"):
        run.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1"]
    verify(tmp_path / "checkpoint-1")


def test_a_kill_while_saving_leaves_the_older_checkpoint_whole(tmp_path, monkeypatch):
    run = trainer(tmp_path, steps=4, save_every=1)
    seal = recipes.trainer.seal

    def killed(folder):
        if folder.name == "checkpoint-2":
            raise KeyboardInterrupt
        seal(folder)

    monkeypatch.setattr(recipes.trainer, "seal", killed)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]
    verify(tmp_path / "checkpoint-1")
    monkeypatch.setattr(recipes.trainer, "seal", seal)
    again = trainer(tmp_path, steps=4, save_every=1)
    again.train(resume_from_checkpoint=tmp_path / "checkpoint-1")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3"]


def test_weight_decay_spares_vectors(tmp_path):
    names = trainer(tmp_path).get_decay_parameter_names(MODELS["llama"]())
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert not [name for name in names if "norm" in name]


@pytest.mark.parametrize("factors", [{}, {"branches": 3.0, "A_log": 0.5, "mlp": 2.0}])
def test_factors_change_the_rates_of_what_they_name_and_nothing_else(tmp_path, factors):
    optimizer = {"learning_rate": 1e-2, "warmup": 0, "weight_decay": 0.1, "factors": factors}
    groups = Groups()
    lora = {"targets": [r"mlp\."], "rank": 2}
    run = trainer(tmp_path, optimizer=optimizer, lora=lora, callbacks=[groups, *QUIET])
    names = {id(p): name for name, p in run.student.named_parameters() if p.requires_grad}
    run.train()
    found = {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups.first for p in group["params"]
    }
    assert sum(len(group["params"]) for group in groups.first) == len(names) == len(found)
    for name, (rate, decay) in found.items():
        fitting = [factor for part, factor in factors.items() if part in name]
        assert rate == pytest.approx(1e-2 * ([1.0, *fitting][-1])), name
        assert decay == (0.1 if run.student.get_parameter(name).ndim > 1 else 0.0), name
    assert run.history[0]["learning_rate"] == pytest.approx(1e-2)


@pytest.mark.parametrize("pattern", [r"up_proj$", r"^model\.layers\.\d\.mlp\.up_proj$"])
def test_a_factor_names_an_adapted_layer_by_its_whole_name(tmp_path, pattern):
    optimizer = {"learning_rate": 1e-2, "warmup": 0, "factors": {pattern: 0.1}}
    groups = Groups()
    lora = {"targets": [r"mlp\."], "rank": 2}
    run = trainer(tmp_path, optimizer=optimizer, lora=lora, callbacks=[groups, *QUIET])
    names = {id(p): name for name, p in run.student.named_parameters()}
    run.train()
    slow = [names[id(p)] for group in groups.first for p in group["params"] if group["lr"] < 5e-3]
    assert slow
    assert slow == [name for name in names.values() if "up_proj.lora_" in name]


class Groups(TrainerCallback):
    """Keeps the optimizer's groups as they were at the first step."""

    def __init__(self):
        self.first = []

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        if state.global_step == 0:
            self.first = [dict(group) for group in optimizer.param_groups]


def test_a_launch_in_shards_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(DistillTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(LaunchError, match="torchrun"):
        trainer(tmp_path)


def sharded(self):
    Trainer.create_accelerator_and_postprocess(self)
    self.is_fsdp_enabled = True


def test_a_loss_is_averaged_over_the_steps_that_have_tokens_for_it(tmp_path):
    """A row a step, of one kind or the other: averaged over all steps each loss would seem half as large."""
    losses = {"task": 1.0, "sequence_kd": 1.0}
    run = trainer(tmp_path, steps=5, batch_size=1, log_every=5, losses=losses, optimizer=1e-6)
    item = run.train_dataset.items[0]
    run.train_dataset = [(item, None), (item, torch.tensor(item["answer"]))]
    run.train()
    first, last = run.history
    (alone,) = [first[name] for name in losses if first[name] > 0]
    assert last["task"] == pytest.approx(alone, rel=1e-2)
    assert last["sequence_kd"] == pytest.approx(alone, rel=1e-2)


class Sized(list):
    """Riddles that know their sizes."""

    sizes = property(lambda self: [len(item["prompt"]) + 3 for item in self])


def test_the_trainer_batches_by_the_sizes_that_a_dataset_gives(tmp_path):
    run = trainer(tmp_path, batch_size=5)
    run.train_dataset.items = Sized(run.train_dataset.items)
    lengths = [batch["input_ids"].shape[1] for batch in run.get_train_dataloader()]
    seen = [int(n) for batch in run.get_train_dataloader() for n in batch["attention_mask"].sum(1)]
    rows = run.train_dataset.items.sizes
    assert sorted(seen) == sorted(rows)
    assert 5 * sum(lengths) - sum(seen) <= 4 * (max(rows) - min(rows))
    run.objective.close()


def test_a_batch_has_no_more_tokens_than_it_may(tmp_path):
    run = trainer(tmp_path, steps=4, batch_size=6, batch_tokens=40, log_every=1)
    run.train_dataset.items = Sized(run.train_dataset.items)
    shapes = [tuple(batch["input_ids"].shape) for batch in run.get_train_dataloader()]
    assert max(rows * length for rows, length in shapes) <= 40
    assert len({rows for rows, _ in shapes}) > 1
    run.train()
    assert [entry["step"] for entry in run.history] == [1, 2, 3, 4]
    assert all(later["tokens"] > earlier["tokens"] for earlier, later in pairwise(run.history))
