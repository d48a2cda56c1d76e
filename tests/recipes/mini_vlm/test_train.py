"""Training the teacher: it learns, changes what it may, and what it leaves is a teacher for recipes."""

from __future__ import annotations

import copy
import itertools
import json
import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from recipes.data.easyvqa import EasyVQA
from recipes.distill import distill
from recipes.errors import CheckpointError, LossError, TeacherNotInstalledError
from recipes.mini_vlm.build import build_model
from recipes.mini_vlm.train import main, restore, train, training_stage
from recipes.plan import Losses, Recipe, TokenKD
from recipes.teachers import Teacher, load_teacher
from tests.recipes.mini_vlm.tiny import TINY_TOKENS, build_tiny
from tests.recipes.toys import QUIET, llama


@pytest.fixture(scope="module")
def trained(built, tmp_path_factory):
    start, tokenizer = built
    model = copy.deepcopy(start)
    task = EasyVQA(model.config, tokenizer)
    folder = tmp_path_factory.mktemp("vlm-mini")
    stage = training_stage(steps=60, batch_size=16, learning_rate=2e-3)
    history = train(model, tokenizer, task, stage, folder, callbacks=QUIET)
    return model, tokenizer, task, folder, history


def test_the_loss_falls(trained):
    losses = [entry["loss"] for entry in trained[-1]]
    assert losses[0] > 3
    assert statistics.mean(losses[-3:]) < 0.4 * losses[0]


def test_the_projector_and_the_decoders_layers_change_and_nothing_else(built, trained):
    before = dict(built[0].named_parameters())
    for name, parameter in trained[0].named_parameters():
        assert torch.equal(parameter, before[name]) != trains(name), name
        assert parameter.dtype == before[name].dtype


def trains(name):
    return "projector" in name or "language_model.layers" in name


def test_the_folder_is_a_teacher(trained, monkeypatch, tmp_path):
    model, tokenizer, task, folder, _ = trained
    monkeypatch.setenv("LINMU_CACHE", str(tmp_path))
    (tmp_path / "vlm-mini").symlink_to(folder)
    teacher = load_teacher("vlm-mini")
    assert teacher.tokenizer.get_vocab() == tokenizer.get_vocab()
    inputs = task.collate(task.train[:3])
    with torch.no_grad():
        assert torch.equal(teacher.model(**inputs).logits, model(**inputs).logits)


def restored(start, folder, elsewhere):
    """The model that the two files of a training make of an untrained one with another projector."""
    for name in ("trained.safetensors", "training.json"):
        (elsewhere / name).write_bytes((folder / name).read_bytes())
    again = copy.deepcopy(start)
    torch.nn.init.normal_(again.model.visual.projector[1].weight)
    restore(again, elsewhere)
    return again


def test_what_training_made_makes_the_teacher_again(built, trained, tmp_path):
    again = restored(built[0], trained[3], tmp_path)
    assert not again.training
    for (name, parameter), theirs in zip(trained[0].named_parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, theirs), name


@pytest.mark.parametrize("rank", [None, 4])
def test_in_bf16_and_with_adapters_too(model, tokenizer, trained, tmp_path, rank):
    """The master weights are fp32; what is left of them is what the model's type can hold."""
    start = copy.deepcopy(model.bfloat16())
    (tmp_path / "elsewhere").mkdir()
    stage = training_stage(steps=3, batch_size=2, rank=rank)
    history = train(model, tokenizer, trained[2], stage, tmp_path, callbacks=QUIET)
    assert all(math.isfinite(entry["loss"]) for entry in history)
    again = restored(start, tmp_path, tmp_path / "elsewhere")
    for (name, parameter), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, theirs), name


@pytest.mark.parametrize("warmup", [0.05, 100])
def test_time_may_end_a_training(model, tokenizer, trained, tmp_path, monkeypatch, warmup):
    """The learning rate follows it, up and down again; what is kept says how many steps it was."""
    stage = training_stage(steps=1, batch_size=1, minutes=2 / 60)
    stage = stage.model_copy(update={"optimizer": stage.optimizer.model_copy(update={"warmup": warmup})})
    rates, clock = Rates(), itertools.count(step=0.1)
    monkeypatch.setattr("recipes.minutes.time", SimpleNamespace(monotonic=lambda: next(clock)))
    history = train(model, tokenizer, trained[2], stage, tmp_path, callbacks=[rates, *QUIET])
    steps = json.loads((tmp_path / "training.json").read_text())["stage"]["steps"]
    assert steps == history[-1]["step"] == len(rates.seen) > 1
    assert rates.seen[0] < max(rates.seen)
    assert max(rates.seen) > 0.5 * stage.optimizer.learning_rate
    assert rates.seen[-1] < 0.5 * stage.optimizer.learning_rate
    assert {entry["learning_rate"] for entry in history} <= set(rates.seen) | {rates.last}


class Rates(TrainerCallback):
    """Keeps the learning rate of each step."""

    def __init__(self):
        self.seen, self.last = [], 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen.append(kwargs["optimizer"].param_groups[0]["lr"])

    def on_step_end(self, args, state, control, **kwargs):
        self.last = kwargs["optimizer"].param_groups[0]["lr"]


def test_the_command_trains_goes_on_and_makes_it_again(tmp_path, monkeypatch, capsys):
    def pretrained(dtype):
        torch.manual_seed(0)
        return build_tiny()

    monkeypatch.setattr("recipes.mini_vlm.train.build_pretrained", pretrained)
    first, second, again = (tmp_path / name for name in ("first", "second", "again"))
    common = ["--task", "easy-vqa", "--steps", "3", "--batch-size", "2", "--questions", "4"]
    main([*common, "--out", str(first)])
    main([*common, "--out", str(second), "--start", str(first)])
    main([*common, "--out", str(again), "--restore", str(first), str(second)])
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["questions"] for entry in printed if "accuracy" in entry] == [4, 4, 4]
    models = [load_teacher(str(folder)).model for folder in (first, second, again)]
    for (name, a), b, c in zip(
        models[0].named_parameters(), *(m.parameters() for m in models[1:]), strict=True
    ):
        assert torch.equal(b, c), name
        assert torch.equal(a, b) != trains(name), name


def test_what_was_made_for_another_model_is_refused(trained, tmp_path):
    other = build_model(llama(vocab_size=40), trained[1], TINY_TOKENS)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match="does not fit"):
        restore(other, trained[3])
    assert other.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_loss_that_needs_a_teacher_is_refused(model, tokenizer, trained, tmp_path):
    stage = training_stage(steps=1, batch_size=1).model_copy(update={"losses": Losses(token_kd=TokenKD())})
    with pytest.raises(LossError, match="token_kd"):
        train(model, tokenizer, trained[2], stage, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_teacher_that_is_not_trained_yet_says_how_to_train_it(tmp_path, monkeypatch):
    monkeypatch.setenv("LINMU_CACHE", str(tmp_path))
    with pytest.raises(TeacherNotInstalledError, match=r"python -m recipes\.mini_vlm\.train"):
        load_teacher("vlm-mini")


def test_the_recipe_distils_it(trained, tmp_path):
    model, tokenizer, task, _, _ = trained
    fields = Recipe.load("linmu-vlm-mini").to_dict()
    for stage in fields["stages"]:
        stage.update(steps=2, batch_size=2, batch_tokens=None)
    recipe = Recipe.from_dict({**fields, "data": "easy-vqa"})
    done = distill(
        recipe, tmp_path, teacher=Teacher(copy.deepcopy(model), tokenizer), task=task, callbacks=QUIET
    )
    tower = dict(model.model.visual.named_parameters())
    for name, parameter in done.student.model.visual.named_parameters():
        assert torch.equal(parameter, tower[name]), name
