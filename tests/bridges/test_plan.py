from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import bridges
import mixers
from tests.bridges import models

SPECS: list[Any] = [
    "attention",
    "mmate",
    {"*": "mmate", "0": "attention"},
    {"1": {"mixer": "sliding_window", "window": 4}},
]


class Snapshot:
    """Everything of a model that a refusal must leave: classes, config, weights bit for bit."""

    def __init__(self, model: nn.Module) -> None:
        self.classes = {name: type(module) for name, module in model.named_modules()}
        self.modules = {name: id(module) for name, module in model.named_modules()}
        self.config = copy.deepcopy(model.config)
        self.config_class = type(model.config)
        self.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.parameters = {name: id(p) for name, p in model.named_parameters()}
        self.hooks = {name: len(m._forward_pre_hooks) for name, m in model.named_modules()}
        self.implementation = model.config._attn_implementation

    def assert_same(self, model: nn.Module) -> None:
        assert self.classes == {name: type(module) for name, module in model.named_modules()}
        assert self.modules == {name: id(module) for name, module in model.named_modules()}
        assert type(model.config) is self.config_class
        assert model.config.to_dict() == self.config.to_dict()
        assert self.parameters == {name: id(p) for name, p in model.named_parameters()}
        assert self.hooks == {name: len(m._forward_pre_hooks) for name, m in model.named_modules()}
        assert self.implementation == model.config._attn_implementation
        state = model.state_dict()
        assert state.keys() == self.weights.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in self.weights.items())


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_plan_touches_nothing_and_says_what_replace_does(family: str, spec: Any) -> None:
    teacher = models.teacher(family)
    before = Snapshot(teacher)
    planned = bridges.plan(teacher, spec)
    before.assert_same(teacher)
    assert bridges.replace_attention(teacher, spec) == planned


@pytest.mark.parametrize(
    ("spec", "settings", "error", "words"),
    [
        ("mmat", {}, mixers.UnknownMixerError, "'mmate'"),
        ({"*": "mmate", "1": "atention"}, {}, mixers.UnknownMixerError, "'attention'"),
        ("mmate", {"text_windw": 3}, mixers.ConfigError, "'text_window'"),
        ({"*": "mmate", "0": "attention"}, {"windw": 3}, mixers.ConfigError, "'window'"),
        (
            {"*": "mmate", "0": {"mixer": "attention", "text_window": 3}},
            {},
            mixers.ConfigError,
            "text_window",
        ),
        ("mmate", {"window": (0, 1, 1)}, mixers.ConfigError, "window"),
        ("mmate", {"active": ("flex",)}, mixers.ConfigError, "'flex_ma'"),
        ("mmate", {"layers": "0-9"}, bridges.LayerPatternError, "layers 0 to 1"),
        ("mmate", {"layers": "first"}, bridges.LayerPatternError, "first"),
        ({"0-1": "mmate", "1": "attention"}, {}, bridges.LayerPatternError, "layer 1"),
        ("mmate", {"init": "teacher"}, bridges.BridgeError, "'attention' or 'random'"),
        ("mmate", {"num_heads": 3}, mixers.ConfigError, "num_heads"),
        ("mmate", {"num_heads": 8, "head_dim": 8}, mixers.ConfigError, "read from the model"),
        ("mmate", {"num_kv_heads": 4}, mixers.ConfigError, "read from the model"),
        ("mmate", {"num_kv_heads": 4, "init": "random"}, mixers.ConfigError, "read from the model"),
        ("mmate", {"dim": 32}, mixers.ConfigError, "read from the model"),
        ("mmate", {"qkv_bias": False}, mixers.ConfigError, "read from the model"),
        ("mmate", {"qk_norm": "head"}, mixers.ConfigError, "read from the model"),
        (
            "gated",
            {"branches": {"attention": {}, "far": {"mixer": "flex_ma", "num_kv_heads": 1}}},
            mixers.ConfigError,
            "num_kv_heads",
        ),
        ("gated", {"branches": {"attention": {}}}, mixers.ConfigError, "two branches"),
    ],
)
@pytest.mark.parametrize("call", [bridges.plan, bridges.replace_attention])
def test_a_refused_call_leaves_the_model_as_it_was(
    call: Any, spec: Any, settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    teacher = models.teacher("qwen2_5_vl")
    before = Snapshot(teacher)
    with pytest.raises(error, match=words):
        call(teacher, spec, **settings)
    before.assert_same(teacher)


def test_attention_not_of_the_familys_pattern_is_refused() -> None:
    model = models.teacher("llama")
    attention = model.model.layers[1].self_attn
    attention.qkv_proj = attention.q_proj
    del attention.q_proj
    before = Snapshot(model)
    with pytest.raises(bridges.UnknownFamilyError, match="q_proj"):
        bridges.replace_attention(model)
    before.assert_same(model)


@pytest.mark.parametrize("first", ["mmate", {"0": "attention"}], ids=str)
def test_a_converted_model_is_refused(first: Any) -> None:
    model = models.converted("llama", first)
    before = Snapshot(model)
    with pytest.raises(bridges.AlreadyConvertedError, match="layers 0"):
        bridges.replace_attention(model, {"1": "attention"})
    before.assert_same(model)


def test_a_model_wrapped_by_peft_is_refused_until_it_is_merged() -> None:
    adapters = peft.LoraConfig(target_modules=["q_proj", "up_proj"])
    wrapped = peft.get_peft_model(models.teacher("llama"), adapters)
    for model in (wrapped, wrapped.get_base_model()):
        with pytest.raises(bridges.AlreadyConvertedError, match="merge_and_unload"):
            bridges.replace_attention(model)
    merged = wrapped.merge_and_unload()
    assert len(bridges.replace_attention(merged).layers) == 2

    injected = models.teacher("llama")
    injected.add_adapter(adapters)
    with pytest.raises(bridges.AlreadyConvertedError, match="peft"):
        bridges.replace_attention(injected)


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(bridges.BridgeError, match="Linear"):
        bridges.replace_attention(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_a_quantised_model_is_refused() -> None:
    teacher = models.teacher("llama")
    weight = teacher.model.layers[1].self_attn.v_proj.weight
    teacher.model.layers[1].self_attn.v_proj.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    before = Snapshot(teacher)
    with pytest.raises(bridges.UnsupportedAttentionError, match=r"v_proj.weight of layer 1 is torch.int8"):
        bridges.replace_attention(teacher)
    before.assert_same(teacher)


def test_a_model_without_data_may_be_planned_and_converted() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**models.text_fields(attention_bias=True)))
    planned = bridges.plan(models.teacher("llama"))
    assert bridges.plan(model) == planned
    assert bridges.replace_attention(model) == planned
    assert {p.device.type for p in model.parameters()} == {"meta"}


def sliding_teacher(**changes: Any) -> Any:
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True}
    return models.qwen2(**kinds, sliding_window=6, **changes)


@pytest.mark.parametrize("spec", ["attention", {"0": {"mixer": "attention", "window": 5}}], ids=str)
def test_the_twin_of_a_sliding_window_layer_has_its_window(spec: Any) -> None:
    teacher = sliding_teacher()
    if spec == "attention":
        configs = [row.config.to_dict() for row in bridges.plan(teacher, spec).layers]
        assert [config["window"] for config in configs] == [6, None]
        return
    before = Snapshot(teacher)
    with pytest.raises(bridges.UnsupportedAttentionError, match="sliding window of 6"):
        bridges.replace_attention(teacher, spec)
    before.assert_same(teacher)


def test_a_soft_cap_is_dropped_where_there_is_no_softmax() -> None:
    def dropped(spec: Any, **settings: Any) -> set[str]:
        rows = bridges.plan(models.teacher("gemma2"), spec, layers="1", **settings).layers
        return {t.name for row in rows for t in row.transfers if t.action == "dropped"}

    assert dropped("attention") == dropped("sliding_window") == dropped("swin3d") == set()
    assert dropped("mamba2") == {"soft-cap of 2"}
    assert dropped("mmate") == {"soft-cap of 2 in flex_ma"}
    branches = {"near": {"mixer": "sliding_window"}, "both": {"mixer": "mmate"}, "far": {"mixer": "mamba2"}}
    assert dropped("gated", branches=branches) == {"soft-cap of 2 in both.flex_ma, far"}
    assert dropped("swin3d", softcap=None) == {"soft-cap of 2"}
    with pytest.raises(bridges.UnsupportedAttentionError, match="soft-cap of 2"):
        dropped("attention", softcap=3.0)


def test_what_is_dropped_is_said() -> None:
    rows = bridges.plan(sliding_teacher(attention_dropout=0.1), "mmate").layers
    dropped = [[t.name for t in row.transfers if t.action == "dropped"] for row in rows]
    assert dropped == [["sliding window of 6", "attention dropout of 0.1"], ["attention dropout of 0.1"]]


def test_a_window_that_the_mixer_keeps_is_not_dropped() -> None:
    spec = {"0": {"mixer": "sliding_window", "window": 6}, "1": "attention"}
    rows = bridges.plan(sliding_teacher(), spec).layers
    assert not [t for row in rows for t in row.transfers if t.action == "dropped"]


def test_a_weight_that_no_mixer_takes_is_said_to_be_dropped() -> None:
    teacher = models.teacher("llama")
    teacher.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(4))
    dropped = [
        [t.name for t in row.transfers if t.action == "dropped"] for row in bridges.plan(teacher).layers
    ]
    assert dropped == [["sinks"], []]
    with pytest.raises(bridges.UnsupportedAttentionError, match=r"layer 0 .* no sinks"):
        bridges.replace_attention(teacher, "attention")


@pytest.mark.parametrize(
    ("spec", "settings", "grows"),
    [
        ("attention", {}, True),
        ({"*": "mmate", "0": "attention"}, {}, True),
        ("gated", {"branches": {"attention": {}, "sliding_window": {}}}, True),
        ("mmate", {}, False),
        ("mmate", {"text_window": 1}, False),
        ("mmate", {"text_window": 0}, False),
        ("sliding_window", {"window": 1}, False),
        ("mamba2", {}, False),
    ],
    ids=str,
)
def test_state_bytes_are_what_a_cache_then_holds(spec: Any, settings: dict[str, Any], grows: bool) -> None:
    model = models.teacher("llama")
    report = bridges.replace_attention(model, spec, **settings)
    assert (report.state_bytes is None) == grows
    sizes = []
    for length in (3, 40):
        with torch.no_grad():
            cache = model(
                **models.text_batch(rows=1, length=length, pads=(0,)), use_cache=True
            ).past_key_values
        sizes.append(bridges.state_bytes(cache))
    if grows:
        assert sizes[0] < sizes[1]
    else:
        assert sizes == [report.state_bytes] * 2


def test_state_bytes_follow_the_models_dtype() -> None:
    model = models.teacher("qwen2").to(torch.bfloat16)
    report = bridges.replace_attention(model, "mmate")
    assert report.state_bytes < bridges.plan(models.teacher("qwen2"), "mmate").state_bytes
    with torch.no_grad():
        cache = model(**models.text_batch(rows=1, pads=(0,))).past_key_values
    assert bridges.state_bytes(cache) == report.state_bytes


def test_a_report_prints(capsys: pytest.CaptureFixture[str]) -> None:
    text = str(bridges.plan(models.teacher("qwen2"), {"1": "mmate"}))
    assert capsys.readouterr().out == ""
    assert "\x1b" not in text
    for part in (
        "Qwen2ForCausalLM",
        "mmate",
        "kept",
        "initialised",
        "q_proj.bias",
        "teacher's attention",
        "bytes",
    ):
        assert part in text


def test_a_report_does_not_follow_the_model() -> None:
    model = models.teacher("llama")
    report = bridges.replace_attention(model, "mmate")
    model.model.layers[0].self_attn.mixer.set_active(("flex_ma",))
    assert report.layers[0].config.active is None  # type: ignore[attr-defined]
