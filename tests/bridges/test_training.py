"""A converted model under the tools that train models: peft, Trainer, plain autograd."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import bridges
from tests.bridges import models
from tests.helpers import assert_close


class Rows(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"row": torch.tensor(index)}


def collate(rows: list[dict[str, Tensor]]) -> models.Inputs:
    inputs = models.vision_batch(models.MIXED_ROW, models.TWO_IMAGES_ROW)
    return {**inputs, "labels": models.labels(inputs)}


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    return all(a == b and torch.equal(p, q) for (a, p), (b, q) in pairs)


@pytest.mark.parametrize("spec", ["mmate", {"1": {"mixer": "mmate", "share_projections": False}}], ids=str)
def test_every_new_weight_gets_a_gradient(spec: Any) -> None:
    model = models.converted("qwen2_5_vl", spec, window=(2, 2, 2)).train()
    inputs = models.batch("qwen2_5_vl")
    model(**inputs, labels=models.labels(inputs)).loss.backward()
    for name, parameter in model.named_parameters():
        if ".mixer." in name and not name.endswith("k_proj.bias"):
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_trains_saves_and_resumes(tmp_path: Path, checkpointing: bool, bf16: bool) -> None:
    model = models.converted("qwen2_5_vl")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=bf16,
        gradient_checkpointing=checkpointing,
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if ".mixer." in name and not name.endswith("k_proj.bias")} <= moved
    last = bridges.load_pretrained(tmp_path / "checkpoint-2")
    assert same_weights(last, model)
    assert {"optimizer.pt", "trainer_state.json"} <= {f.name for f in (tmp_path / "checkpoint-2").iterdir()}

    resumed = Trainer(
        model=models.converted("qwen2_5_vl"), args=arguments, train_dataset=Rows(), data_collator=collate
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same_weights(resumed.model, model)


TARGETS = {
    "mlp and attention": r".*layers\.\d+\.(self_attn\.mixer\.(q|v)_proj|mlp\.up_proj)",
    "by name": ["q_proj", "down_proj"],
}


@pytest.mark.parametrize("targets", TARGETS)
def test_adapters_train_beside_new_weights_and_merge(targets: str, tmp_path: Path) -> None:
    base = models.converted("qwen2_5_vl")
    inputs = models.batch("qwen2_5_vl")
    wanted = models.logits(base, inputs)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=TARGETS[targets], r=4))
    assert torch.equal(models.logits(model.eval(), inputs), wanted)
    assert list(bridges.attention_layers(model)) == [0, 1]
    for name, parameter in model.named_parameters():
        if re.search(r"\.mixer\.(branches|gate)\.", name):
            parameter.requires_grad_()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model.train()(**inputs, labels=models.labels(inputs)).loss
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    trained, tokens = models.logits(model.eval(), inputs), models.generate(model, inputs)
    assert not torch.equal(trained, wanted)
    merged = model.merge_and_unload()
    assert_close("merged", trained, models.logits(merged, inputs), 1e-5)
    assert torch.equal(models.generate(merged, inputs), tokens)
    merged.save_pretrained(tmp_path / "m")
    loaded = bridges.load_pretrained(tmp_path / "m")
    assert_close("loaded", trained, models.logits(loaded, inputs), 1e-5)


def test_a_frozen_copy_is_a_teacher_beside_its_student() -> None:
    """Both run in one step, and neither's layout or cache shows in the other."""
    teacher = models.teacher("qwen2_5_vl").requires_grad_(False)
    student = models.converted(copy.deepcopy(teacher), "attention").train()
    inputs = models.batch("qwen2_5_vl")
    hidden = [model(**inputs, output_hidden_states=True).hidden_states for model in (teacher, student)]
    for wanted, found in zip(*hidden):
        assert_close("hidden", models.at_tokens(wanted, inputs), models.at_tokens(found, inputs), 1e-5)
