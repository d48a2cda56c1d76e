"""Checkpoints of what is new alone: small, exact, and refused where they do not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import bridges
from tests.bridges import models
from tests.bridges.test_plan import Snapshot
from tests.bridges.test_pretrained import edit, same

SPECS: dict[str, Any] = {
    "mmate": "mmate",
    "own projections": {"*": {"mixer": "mmate", "share_projections": False}},
    "mixed": {"1": "mmate", "0": "attention"},
    "partial": {"1": "mamba2"},
}


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
@pytest.mark.parametrize("spec", SPECS)
def test_round_trip(family: str, spec: str, tmp_path: Path) -> None:
    teacher = models.teacher(family)
    student = models.converted(teacher, SPECS[spec])
    bridges.save_new_weights(student, tmp_path / "new", teacher=teacher)
    saved = load_file(tmp_path / "new" / "new_weights.safetensors")
    assert not [name for name in saved if "embed" in name or "mlp" in name]
    loaded = bridges.load_new_weights(teacher, tmp_path / "new")
    assert loaded is teacher
    assert same(loaded, student)
    inputs = models.batch(family)
    assert torch.equal(models.generate(loaded, inputs), models.generate(student, inputs))


def test_what_else_was_trained_is_in_it(tmp_path: Path) -> None:
    teacher = models.teacher("llama")
    student = models.converted(teacher)
    with torch.no_grad():
        student.model.layers[1].mlp.up_proj.weight.add_(1)
        student.model.layers[0].self_attn.mixer.v_proj.bias.add_(1)
    bridges.save_new_weights(student, tmp_path / "new", teacher=teacher)
    assert same(bridges.load_new_weights(teacher, tmp_path / "new"), student)


def test_adapters_are_in_it(tmp_path: Path) -> None:
    teacher = models.teacher("llama")
    student = models.converted(teacher)
    wrapped = peft.get_peft_model(student, peft.LoraConfig(target_modules=["up_proj", "q_proj"], r=2))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter))
    wrapped.eval()
    bridges.save_new_weights(wrapped, tmp_path / "new", teacher=teacher)
    loaded = bridges.load_new_weights(copy.deepcopy(teacher), tmp_path / "new").eval()
    assert same(loaded, wrapped)
    inputs = models.batch("llama")
    assert torch.equal(models.logits(loaded, inputs), models.logits(wrapped, inputs))


@pytest.mark.parametrize("kind", [peft.IA3Config, peft.LoHaConfig])
def test_adapters_of_other_kinds_are_in_it(kind: Any, tmp_path: Path) -> None:
    teacher = models.teacher("llama")
    settings = {"feedforward_modules": ["down_proj"]} if kind is peft.IA3Config else {"r": 2}
    wrapped = peft.get_peft_model(models.converted(teacher), kind(target_modules=["down_proj"], **settings))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    bridges.save_new_weights(wrapped, tmp_path / "new", teacher=teacher)
    assert same(bridges.load_new_weights(copy.deepcopy(teacher), tmp_path / "new"), wrapped)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("left", [0, 40, None])
def test_a_damaged_adapter_leaves_the_teacher_as_it_was(file: str, left: int | None, tmp_path: Path) -> None:
    teacher = models.teacher("llama")
    config = peft.LoraConfig(target_modules=["up_proj"], r=2)
    wrapped = peft.get_peft_model(models.converted(teacher), config)
    bridges.save_new_weights(wrapped, tmp_path / "new", teacher=teacher)
    path = tmp_path / "new" / file
    if left is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:left])
    before = Snapshot(teacher)
    with pytest.raises(bridges.CheckpointError, match=file):
        bridges.load_new_weights(teacher, tmp_path / "new")
    before.assert_same(teacher)


def without(folder: Path, part: str) -> None:
    file = folder / "new_weights.safetensors"
    save_file({name: t for name, t in load_file(file).items() if part not in name}, file)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no description": (lambda d: (d / "new_weights.json").unlink(), "new_weights.json is missing"),
    "no weights": (lambda d: (d / "new_weights.safetensors").unlink(), "incomplete"),
    "half the weights": (
        lambda d: (d / "new_weights.safetensors").write_bytes(
            (d / "new_weights.safetensors").read_bytes()[:99]
        ),
        "damaged or truncated",
    ),
    "a weight less": (lambda d: without(d, "gate"), "gate"),
    "a newer format": (
        lambda d: edit(d / "new_weights.json", lambda f: f["linmu"].update(version=9)),
        "update linmu",
    ),
    "another family": (
        lambda d: edit(d / "new_weights.json", lambda f: f.update(base_model_type="qwen2")),
        "'qwen2'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_leaves_the_teacher_as_it_was(damage: str, tmp_path: Path) -> None:
    teacher = models.teacher("llama")
    bridges.save_new_weights(models.converted(teacher), tmp_path / "new", teacher=teacher)
    break_it, words = DAMAGE[damage]
    break_it(tmp_path / "new")
    before = Snapshot(teacher)
    with pytest.raises(bridges.CheckpointError, match=words):
        bridges.load_new_weights(teacher, tmp_path / "new")
    before.assert_same(teacher)


def test_another_teacher_is_refused(tmp_path: Path) -> None:
    teacher, other = models.teacher("llama"), models.FAMILIES["llama"](intermediate_size=80)
    student = models.converted(teacher)
    with torch.no_grad():
        student.model.layers[1].mlp.up_proj.weight.add_(1)
    with pytest.raises(bridges.CheckpointError, match="another model's teacher"):
        bridges.save_new_weights(student, tmp_path / "new", teacher=other)
    with pytest.raises(bridges.CheckpointError, match="converted too"):
        bridges.save_new_weights(student, tmp_path / "new", teacher=student)
    with pytest.raises(bridges.CheckpointError, match="no new weights"):
        bridges.save_new_weights(teacher, tmp_path / "new", teacher=teacher)
    assert not (tmp_path / "new").exists()
    bridges.save_new_weights(student, tmp_path / "new", teacher=teacher)
    before = Snapshot(other)
    with pytest.raises(bridges.CheckpointError, match="does not fit"):
        bridges.load_new_weights(other, tmp_path / "new")
    before.assert_same(other)


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    teacher = models.teacher("llama")
    student = models.converted(teacher)
    student.save_pretrained(tmp_path / "whole")
    with pytest.raises(bridges.CheckpointError, match="something else"):
        bridges.save_new_weights(student, tmp_path / "whole", teacher=teacher)
    bridges.save_new_weights(student, tmp_path / "new", teacher=teacher)
    (tmp_path / "new" / "tokenizer.json").write_text("mine")
    (tmp_path / "new" / "adapter_config.json").write_text("of an older save")
    bridges.save_new_weights(student, tmp_path / "new", teacher=teacher)
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "mine"
    assert not (tmp_path / "new" / "adapter_config.json").exists()
    with pytest.raises(bridges.CheckpointError, match="load_new_weights"):
        bridges.load_pretrained(tmp_path / "new")
