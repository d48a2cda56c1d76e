"""Text decoders of every listed family over a long answer, and those that no family lists."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import bridges
from bridges.errors import warn_once
from tests.bridges import models
from tests.bridges.test_plan import Snapshot
from tests.helpers import assert_close

TEXT = [family for family in models.FAMILIES if family != "qwen2_5_vl"]


@pytest.fixture(autouse=True)
def _warned_anew() -> None:
    """A warning that is given once is given to each test."""
    warn_once.cache_clear()


@pytest.mark.parametrize("family", TEXT)
def test_a_long_answer_is_the_teachers(family: str) -> None:
    teacher, student = models.teacher(family), models.converted(family, "attention")
    inputs = models.batch(family)
    outputs = [
        models.generate(m, inputs, 64, use_cache=use_cache)
        for m, use_cache in ((teacher, True), (student, True), (student, False))
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("family", TEXT)
def test_a_long_answer_of_mixers_is_the_same_without_a_cache(family: str) -> None:
    student, inputs = models.converted(family, "mmate", text_window=6), models.batch(family)
    assert torch.equal(*(models.generate(student, inputs, 64, use_cache=use) for use in (True, False)))


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "phi3"])
def test_the_sliding_window_of_the_tiny_teacher_matters(family: str) -> None:
    """Without it another function would pass for the twin."""
    student = models.converted(family, "attention")
    wide, inputs = copy.deepcopy(student), models.batch(family)
    bridges.attention_layers(wide)[0].mixer.config.window = None
    assert not torch.allclose(models.logits(student, inputs), models.logits(wide, inputs), atol=1e-3)


def test_the_soft_cap_of_the_tiny_teacher_matters() -> None:
    student, inputs = models.converted("gemma2", "attention"), models.batch("gemma2")
    free = copy.deepcopy(student)
    bridges.attention_layers(free)[1].mixer.config.softcap = None
    assert not torch.allclose(models.logits(student, inputs), models.logits(free, inputs), atol=1e-3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_fused_projections_of_other_shapes(bias: bool, kv_heads: int) -> None:
    fields = models.text_fields(num_key_value_heads=kv_heads)
    neox = {name: value for name, value in fields.items() if name != "num_key_value_heads"}
    for teacher in (
        models.ready(Phi3ForCausalLM(Phi3Config(**fields))),
        models.ready(GPTNeoXForCausalLM(GPTNeoXConfig(**neox, attention_bias=bias))),
    ):
        student, inputs = models.converted(teacher, "attention"), models.text_batch(pads=(0, 0))
        assert_close("logits", models.logits(teacher, inputs), models.logits(student, inputs), 1e-5)


def test_dropout_inside_of_attention_is_dropped() -> None:
    rows = bridges.plan(models.gpt2(attn_pdrop=0.1, resid_pdrop=0.2)).layers
    dropped = [t.name for t in rows[0].transfers if t.action == "dropped"]
    assert dropped == ["attention dropout of 0.1", "residual dropout of 0.2"]


def unlisted(model_type: str, auto: Any = AutoModelForCausalLM, **changes: Any) -> Any:
    """Build a tiny random model of a type that no family lists."""
    known = AutoConfig.for_model(model_type)
    fields = {name: value for name, value in models.text_fields().items() if hasattr(known, name)}
    assert model_type not in bridges.families()
    return models.ready(auto.from_config(AutoConfig.for_model(model_type, **{**fields, **changes})))


WORKING: dict[str, dict[str, Any]] = {
    "olmo": {},
    "olmo3": {"sliding_window": 6, "num_hidden_layers": 4},
    "vaultgemma": {"head_dim": 16, "sliding_window": 6, "attn_logit_softcapping": 2.0},
    "phi": {},
    "opt": {"ffn_dim": 96, "max_position_embeddings": 128},
}


@pytest.mark.filterwarnings("ignore::bridges.AssumedFamilyWarning")
@pytest.mark.parametrize("model_type", WORKING)
def test_a_family_that_nobody_listed(model_type: str, tmp_path: Path) -> None:
    teacher, inputs = unlisted(model_type, **WORKING[model_type]), models.text_batch()
    student = models.converted(teacher, "attention")
    theirs, ours = (models.at_tokens(models.logits(m, inputs), inputs) for m in (teacher, student))
    assert_close("logits", theirs, ours, 1e-5)
    assert torch.equal(models.generate(teacher, inputs, 20), models.generate(student, inputs, 20))
    linear = models.converted(teacher, "mmate", text_window=6)
    assert torch.equal(*(models.generate(linear, inputs, 20, use_cache=use) for use in (True, False)))
    linear.save_pretrained(tmp_path)
    again = bridges.load_pretrained(tmp_path)
    assert torch.equal(models.logits(linear, inputs), models.logits(again, inputs))
    assert all(isinstance(a, bridges.MixerAttention) for a in bridges.attention_layers(again).values())


def test_what_is_assumed_is_said_once() -> None:
    teacher = unlisted("olmo").train()
    before, modes = Snapshot(teacher), [module.training for module in teacher.modules()]
    with pytest.warns(bridges.AssumedFamilyWarning, match=r"OlmoForCausalLM .*rotate-half"):
        report = bridges.plan(teacher)
    before.assert_same(teacher)
    assert modes == [module.training for module in teacher.modules()]
    assert "assumed: attention is OlmoAttention at self_attn" in " ".join(str(report).split())
    assert not bridges.plan(models.teacher("llama")).assumed
    with warnings.catch_warnings():
        warnings.simplefilter("error", bridges.AssumedFamilyWarning)
        assert bridges.replace_attention(teacher) == report


def test_a_model_without_data_is_described_but_not_checked() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo", **models.text_fields()))
    with pytest.warns(bridges.AssumedFamilyWarning):
        assert len(bridges.replace_attention(model).layers) == 2


def test_sinks_are_dropped_and_the_twin_refused() -> None:
    teacher = unlisted("gpt_oss", head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=8)
    with pytest.warns(bridges.AssumedFamilyWarning):
        rows = bridges.plan(teacher, "mmate").layers
    dropped = [{t.name for t in row.transfers if t.action == "dropped"} for row in rows]
    assert dropped == [{"sinks", "sliding window of 8"}, {"sinks"}]
    with pytest.raises(bridges.UnsupportedAttentionError, match="no sinks"):
        bridges.replace_attention(teacher, "attention")


LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}

UNDESCRIBED: dict[str, tuple[Callable[[], Any], str]] = {
    "interleaved rotary": (lambda: unlisted("cohere"), "layer 0 differs from the layer's own output"),
    "arguments kept back": (lambda: unlisted("stablelm"), "keep further arguments from attention"),
    "weights beside": (lambda: unlisted("diffllama"), "lambda_k1.* beside its projections"),
    "fused otherwise": (lambda: unlisted("gpt_bigcode", max_position_embeddings=64), "split_with_sizes"),
    "no projections": (lambda: unlisted("mpt", d_model=64, n_heads=4, n_layers=2), "no list of layers"),
}

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "latent attention": (
        lambda: unlisted("minicpm3", **LATENT),
        r"multi-head latent attention \(kv_a_proj_with_mqa",
    ),
    "hybrid": (
        lambda: unlisted("qwen3_next", layer_types=["linear_attention", "full_attention"]),
        "layers of linear_attention already",
    ),
    "chunks": (lambda: unlisted("llama4_text", num_local_experts=2), "layers of chunked_attention already"),
    "encoder and decoder": (
        lambda: unlisted("t5", AutoModelForSeq2SeqLM, d_model=64, num_layers=1),
        "an encoder and a decoder",
    ),
    "cross-attention": (
        lambda: unlisted("bart", d_model=64, decoder_layers=1, decoder_ffn_dim=64),
        "cross-attention",
    ),
    "growing factor": (
        lambda: unlisted("ministral3", head_dim=16),
        "query factor that grows with the position",
    ),
}


@pytest.mark.filterwarnings("ignore::bridges.AssumedFamilyWarning")
@pytest.mark.parametrize("case", [*UNDESCRIBED, *REFUSED])
def test_what_cannot_be_carried_is_refused_by_name(case: str) -> None:
    make, words = {**UNDESCRIBED, **REFUSED}[case]
    model = make()
    before = Snapshot(model)
    error = bridges.UnknownFamilyError if case in UNDESCRIBED else bridges.UnsupportedAttentionError
    with pytest.raises(error, match=words) as raised:
        bridges.replace_attention(model, "attention")
    before.assert_same(model)
    assert "\n" not in str(raised.value)
    if case in UNDESCRIBED:
        for word in ("@bridges.register_family", "`projections`", "`attention_name`", "`clips`"):
            assert word in str(raised.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_kv_shared_layers": 1}, "share the keys and values"),
        ({"cross_attention_layers": [1]}, "cross-attention"),
    ],
)
def test_kinds_are_told_by_the_config(change: dict[str, Any], words: str) -> None:
    model = unlisted("olmo")
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(bridges.UnsupportedAttentionError, match=words):
        bridges.replace_attention(model)


def test_a_listed_decoder_that_looks_ahead_is_told() -> None:
    teacher = models.gemma3(use_bidirectional_attention=True)
    for row in bridges.plan(teacher, "mmate").layers:
        assert "attention to later tokens" in {t.name for t in row.transfers if t.action == "dropped"}
    with pytest.raises(bridges.UnsupportedAttentionError, match="attention to later tokens"):
        bridges.replace_attention(teacher, "attention")


def test_a_bidirectional_decoder_is_refused() -> None:
    model = unlisted("gemma")
    model.model.layers[0].self_attn.is_causal = False
    with pytest.raises(bridges.UnsupportedAttentionError, match="attend to later ones"):
        bridges.replace_attention(model)


def test_layers_without_attention_make_a_hybrid() -> None:
    model = unlisted("olmo")
    model.model.layers[1].self_attn = torch.nn.Linear(64, 64)
    with pytest.raises(
        bridges.UnsupportedAttentionError, match=r"layers 1 have no self-attention but .*hybrid"
    ):
        bridges.replace_attention(model)
