from __future__ import annotations

import copy

import pytest
import torch

import bridges
from recipes.distill import adapt
from recipes.errors import BranchError, LossError, PatternError
from recipes.explain import meta_copy
from recipes.selection import activate, select
from tests.recipes.toys import MODELS, recipe, stage, three_stages


@pytest.mark.parametrize("kind", list(MODELS))
def test_counts_are_what_actually_trains(kind):
    plan, model = recipe(*three_stages()), MODELS[kind]()
    explanation = plan.explain(model)
    for entry, told in zip(plan.stages, explanation.stages):
        student = copy.deepcopy(model)
        bridges.replace_attention(student, plan.student.mixer, **plan.student.config)
        total = sum(p.numel() for p in student.parameters())
        trained = [
            p for p in adapt(student, entry.lora, select(entry, student)).parameters() if p.requires_grad
        ]
        assert told.trained_tensors == len(trained)
        assert told.trained_parameters == sum(p.numel() for p in trained)
        adapters = sum(group.parameters for group in told.adapted)
        assert told.frozen_parameters == total - (told.trained_parameters - adapters)


def test_explaining_changes_nothing():
    model = MODELS["qwen"]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kind = type(model)
    recipe(*three_stages()).explain(model)
    assert type(model) is kind
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_converted_model_is_explained_as_it_is():
    model = MODELS["llama"]()
    plan = recipe(stage())
    from_teacher = plan.explain(model)
    bridges.replace_attention(model, plan.student.mixer, **plan.student.config)
    assert plan.explain(model) == from_teacher


def test_the_print_names_what_trains_and_what_it_costs():
    stages = [*three_stages(), stage(name="last", trainable=["mixer.[qk]_proj"])]
    text = str(recipe(*stages).explain(MODELS["llama"]()))
    for expected in (
        "mixer.[qk]_proj",
        "flex-ma",
        "branches: flex_ma",
        "mixers",
        "LoRA on",
        "frozen",
        "1 × hidden_states",
        "4 steps",
    ):
        assert expected in text


def test_the_print_says_what_bounds_a_step():
    bounded = stage(batch_size=192, batch_tokens=24000, gradient_accumulation=2)
    explained = recipe(bounded).explain(MODELS["llama"]())
    assert explained.stages[0].tokens_per_step == 48000
    assert "2 steps of at most 384 rows and 48,000 tokens" in " ".join(str(explained).split())


def test_overlapping_patterns_count_once():
    explained = recipe(stage(trainable=["mixers", r"mixer\.gate", "q_proj"])).explain(MODELS["llama"]())
    alone = recipe(stage()).explain(MODELS["llama"]())
    assert explained.stages[0].trained_parameters == alone.stages[0].trained_parameters


def test_a_tied_head_is_found_by_its_own_name():
    tied = MODELS["llama"](tie_word_embeddings=True)
    explained = recipe(stage(trainable=["lm_head"])).explain(tied)
    assert explained.stages[0].trained_parameters == tied.get_output_embeddings().weight.numel()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"trainable": ["mixerz"]}, PatternError, "matches no parameter.* Did you mean 'mixer'"),
        ({"trainable": ["mixers", "vision_tower"]}, PatternError, "'vision_tower' matches no parameter"),
        ({"lora": {"targets": ["up_prj"]}}, PatternError, "matches no linear layer.* 'up_proj'"),
        ({"lora": {"targets": ["q_proj"]}}, PatternError, "leave it out of one"),
        (
            {"optimizer": {"learning_rate": 1e-3, "factors": {"brances": 3}}},
            PatternError,
            "reaches nothing.* Did you mean 'branches'",
        ),
        ({"active": ["flexma"]}, BranchError, "Did you mean 'flex_ma'"),
        (
            {"losses": {"hidden_states": 1}, "trainable": ["mixers", "mlp"]},
            LossError,
            "reaches the mixers alone",
        ),
    ],
)
def test_what_does_not_fit_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        recipe(stage(**fields)).explain(MODELS["llama"]())


def test_active_branches_need_a_gated_mixer():
    with pytest.raises(BranchError, match="no mixer of the student has branches"):
        recipe(stage(active=["flex_ma"]), student="attention").explain(MODELS["llama"]())


def test_activate_chooses_the_branches_of_every_layer():
    model = MODELS["llama"]()
    bridges.replace_attention(model, {"*": "mmate", "0": "attention"})
    activate(model, ["local_swin"])
    assert bridges.attention_layers(model)[1].mixer.config.active == ("local_swin",)
    activate(model, None)
    assert bridges.attention_layers(model)[1].mixer.config.active is None


def test_a_meta_copy_has_the_shapes_and_ties_and_no_data():
    model = MODELS["llama"](tie_word_embeddings=True)
    empty = meta_copy(model)
    assert all(p.is_meta for p in empty.parameters())
    assert {n: p.shape for n, p in empty.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    assert not any(p.is_meta for p in model.parameters())
