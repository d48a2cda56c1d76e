from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bridges
from mixers import TokenLayout
from tests.bridges import models
from tests.helpers import assert_close

HEADS = [(28, 4), (16, 2), (32, 8), (9, 3)]
WIDTH = 8

READERS: dict[str, Any] = {
    "attention": "attention",
    "sliding_window": {"mixer": "sliding_window", "window": 1000},
    "swin3d": {"mixer": "swin3d", "text_window": 1000},
    "flex_ma": {"mixer": "flex_ma", "conv_size": 4},
    "mmate": "mmate",
    "mmate, a set of projections each": {"mixer": "mmate", "share_projections": False},
    "mmate, a decay each head": {"mixer": "mmate", "decay": "head", "gate": "head"},
}
"""Mixers whose output is a weighted mean of values, so that equal values come through unchanged."""

TWINS: dict[str, Any] = {
    "attention": "attention",
    "sliding_window": READERS["sliding_window"],
    "swin3d": READERS["swin3d"],
    "mmate": {"mixer": "mmate", "text_window": 1000, "active": ("local_swin",)},
    "mmate, a set of projections each": {
        "mixer": "mmate",
        "text_window": 1000,
        "share_projections": False,
        "active": ("local_swin",),
    },
}
"""Mixers that are softmax attention over a text shorter than their window."""


def teacher_of(heads: int, kv_heads: int, family: str = "llama") -> Any:
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": heads * WIDTH}
    return models.FAMILIES[family](num_hidden_layers=1, **shape)


def self_attention(model: Any) -> Any:
    return bridges.attention_layers(model)[0]


@pytest.fixture(scope="module", params=HEADS, ids=lambda h: f"{h[0]}/{h[1]}")
def heads(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


@pytest.mark.parametrize("reader", READERS)
def test_every_query_head_reads_its_kv_head(heads: tuple[int, int], reader: str) -> None:
    """KV head g gives the value g + 1 alone, by its bias; o_proj shows head h in its own channels."""
    count, kv_count = heads
    teacher = teacher_of(*heads)
    attention = self_attention(teacher)
    with torch.no_grad():
        attention.v_proj.weight.zero_()
        attention.v_proj.bias.copy_(torch.arange(1.0, kv_count + 1).repeat_interleave(WIDTH))
        attention.o_proj.weight.copy_(torch.eye(count * WIDTH))
        attention.o_proj.bias.zero_()
    bridges.replace_attention(teacher, {"*": READERS[reader]})
    x = torch.randn(2, 9, count * WIDTH)
    angle = torch.randn(2, 9, WIDTH)
    with torch.no_grad():
        read = self_attention(teacher)(x, (angle.cos(), angle.sin()))[0].unflatten(-1, (count, WIDTH))
    wanted = torch.arange(count) // (count // kv_count) + 1.0
    assert_close("what each head read", wanted[:, None].expand_as(read), read, 1e-5)


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_output_is_the_teachers(heads: tuple[int, int], family: str, twin: str) -> None:
    teacher = teacher_of(*heads, family=family)
    student = copy.deepcopy(teacher)
    bridges.replace_attention(student, {"*": TWINS[twin]})
    inputs = models.text_batch(length=12, pads=(0, 0))
    assert_close("logits", models.logits(teacher, inputs), models.logits(student, inputs), 1e-6)


@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_every_bias_matters(projection: str) -> None:
    """The twin test above would pass without biases that do nothing; each of these does something."""
    teacher = teacher_of(4, 2)
    student = models.converted(teacher, "attention")
    inputs = models.text_batch()
    before = models.logits(student, inputs)
    with torch.no_grad():
        getattr(self_attention(student).mixer, projection).bias[1].add_(1.0)
    after = models.logits(student, inputs)
    assert (after - before).abs().max() > 1e-4 * before.abs().max()


@pytest.mark.parametrize("shared", [True, False])
def test_projections_are_the_teachers_own_or_copies(shared: bool) -> None:
    teacher = teacher_of(8, 2)
    theirs = dict(self_attention(teacher).named_children())
    weights = {name: p.clone() for name, p in self_attention(teacher).named_parameters()}
    bridges.replace_attention(teacher, "mmate", share_projections=shared)
    mixer = self_attention(teacher).mixer
    owners = [mixer] if shared else list(mixer.branches.values())
    for name, module in theirs.items():
        assert getattr(owners[0], name) is module
    for owner in owners:
        for name in weights:
            ours = (
                owner.get_parameter(name) if not (owner is not owners[0] and name == "o_proj.bias") else None
            )
            assert ours is None or torch.equal(ours, weights[name])
    if not shared:
        assert owners[1].o_proj.bias is None  # the outputs are summed, so one bias is enough
        storages = [{p.untyped_storage().data_ptr() for p in owner.parameters()} for owner in owners]
        assert not storages[0] & storages[1]


def test_shared_or_not_the_start_is_the_same() -> None:
    teacher, inputs = teacher_of(4, 2), models.text_batch()
    students = [
        models.converted(teacher, "mmate", stirred=False, share_projections=shared)
        for shared in (True, False)
    ]
    for student in students:  # their new weights are drawn in another order
        for name, parameter in student.named_parameters():
            if name.endswith("decay.proj.weight"):
                nn.init.zeros_(parameter)
    assert_close("logits", *(models.logits(student, inputs) for student in students), 1e-6)


def test_random_init_takes_nothing_from_the_teacher() -> None:
    teacher = teacher_of(4, 2)
    students = [models.converted(teacher, "mmate", init="random", stirred=False, seed=s) for s in (0, 0, 1)]
    theirs = dict(self_attention(teacher).named_parameters())
    first, again, other = (dict(self_attention(s).mixer.named_parameters()) for s in students)
    for name, weight in theirs.items():
        assert first[name].shape == weight.shape
        assert not torch.equal(first[name], weight)
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("init", ["attention", "random"])
@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize(
    "spec",
    [
        "attention",
        "mamba2",
        "swin3d",
        "mmate",
        {"*": {"mixer": "mmate", "share_projections": False, "output_gate": True}},
        {"*": {"mixer": "gated", "branches": {"sliding_window": {}, "far": {"mixer": "bimamba2"}}}},
    ],
    ids=str,
)
def test_the_report_accounts_for_every_weight(family: str, init: str, spec: Any) -> None:
    teacher = models.teacher(family)
    theirs = {i: dict(a.named_parameters()) for i, a in bridges.attention_layers(teacher).items()}
    report = bridges.replace_attention(teacher, spec, init=init)
    for row in report.layers:
        ours = dict(self_attention_at(teacher, row.index).named_parameters())
        named = [t for t in row.transfers if t.action != "dropped"]
        assert sorted(t.name for t in named) == sorted(ours)
        assert {t.name: t.shape for t in named} == {name: tuple(p.shape) for name, p in ours.items()}
        taken = {t.action: {u.name for u in named if u.action == t.action} for t in named}
        kept, split = taken.get("kept", set()), taken.get("split", set())
        dropped = {t.name for t in row.transfers if t.action == "dropped"}
        if init == "random":
            assert not kept | split
            assert set(theirs[row.index]) <= dropped
        else:
            assert not set(theirs[row.index]) & dropped
            whole = sum(p.numel() for p in theirs[row.index].values())
            assert sum(ours[name].numel() for name in kept | split) == whole
        same = {id(p) for p in theirs[row.index].values()}
        assert {name for name, p in ours.items() if id(p) in same} == kept


def self_attention_at(model: Any, index: int) -> Any:
    return bridges.attention_layers(model)[index].mixer


@pytest.mark.parametrize("family", ["phi3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("shared", [True, False])
def test_parts_of_a_fused_weight_get_memory_of_their_own(family: str, shared: bool) -> None:
    """Files hold no weights that share memory; their flag is that of the whole, even without gradients."""
    teacher = models.teacher(family)
    teacher.requires_grad_(False)
    with torch.no_grad():
        bridges.replace_attention(teacher, "mmate", share_projections=shared)
    weights = {n: p for n, p in self_attention(teacher).mixer.named_parameters() if "_proj." in n}
    assert len(weights) >= 4
    assert len({p.untyped_storage().data_ptr() for p in weights.values()}) == len(weights)
    for parameter in weights.values():
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
        assert not parameter.requires_grad


def test_planning_copies_no_fused_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = models.teacher("gpt2")
    monkeypatch.setattr(Tensor, "clone", None)
    monkeypatch.setattr(Tensor, "contiguous", None)
    bridges.plan(teacher)


def test_trained_weights_keep_their_flag_and_new_ones_train() -> None:
    teacher = teacher_of(4, 2).requires_grad_(False)
    bridges.replace_attention(teacher, "mmate")
    for name, parameter in self_attention(teacher).mixer.named_parameters():
        assert parameter.requires_grad == ("_proj." not in name)


def test_a_head_cannot_read_another_layout() -> None:
    """A converted layer checks the layout that it is given."""
    layer = self_attention(models.converted(teacher_of(4, 2)))
    x: Tensor = torch.randn(1, 5, 4 * WIDTH)
    with pytest.raises(ValueError, match=r"\[1, 6\]"):
        layer(x, None, linmu_layout=TokenLayout.text(1, 6))
