"""Evaluation by generation: known answers give known accuracies, batched and left-padded or not."""

from __future__ import annotations

import math

import pytest
import torch

import bridges
from recipes.data.task import IGNORED
from recipes.evaluate import EvaluationError, evaluate, perplexity
from tests.recipes.toys import MODELS, Riddles


def riddles_that_the_model_solves(kind: str, model: torch.nn.Module, wrong: int = 0) -> Riddles:
    """Riddles whose answers are what the model generates one by one, but for the first few."""
    task = Riddles(images=kind == "qwen", items=12)
    task.test = [dict(item) for item in task.train]
    for number, item in enumerate(task.test):
        prompt = task.prompts([item])
        generated = model.generate(**prompt, max_new_tokens=task.max_new_tokens, do_sample=False)
        item["answer"] = generated[0, prompt["input_ids"].shape[1] :].tolist()
        item["category"] = "even" if number % 2 == 0 else "odd"
        item["form"] = "early" if number < 6 else "late"
        if number < wrong:
            item["answer"] = [*item["answer"][:-1], -1]
    return task


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_left_padded_batches_give_the_answers_that_single_prompts_give(kind: str, converted: bool) -> None:
    model = MODELS[kind]()
    if converted:
        bridges.replace_attention(model, "mmate", text_window=4, window=(1, 2, 2))
    task = riddles_that_the_model_solves(kind, model, wrong=3)
    told = []
    found = evaluate(model, task, batch_size=5, progress=lambda done, total: told.append((done, total)))
    assert found.accuracy == 9 / 12
    assert found.questions == 12
    assert told == [(5, 12), (10, 12), (12, 12)]
    assert {name: (g.accuracy, g.questions) for name, g in found.groups.items()} == {
        "even": (4 / 6, 6),
        "odd": (5 / 6, 6),
    }
    assert [row["questions"] for row in found.rows()] == [6, 6]
    assert {name: (g.accuracy, g.questions) for name, g in found.forms.items()} == {
        ("even", "early"): (1 / 3, 3),
        ("odd", "early"): (2 / 3, 3),
        ("even", "late"): (1, 3),
        ("odd", "late"): (1, 3),
    }


def test_a_limit_is_spread_over_the_split() -> None:
    model = MODELS["llama"]()
    task = riddles_that_the_model_solves("llama", model, wrong=6)
    found = evaluate(model, task, limit=4)
    assert found.questions == 4
    assert found.accuracy == 0.5
    assert evaluate(model, task, limit=99).questions == 12


class Sized(list):
    sizes = (3, 3, 3, 9, 9, 30, 2, 2, 2, 2, 2, 2)
    """How many tokens each of twelve items has."""


def test_tokens_bound_a_batch_where_the_sizes_of_items_are_known() -> None:
    model = MODELS["llama"]()
    task = riddles_that_the_model_solves("llama", model, wrong=3)
    told: list[int] = []
    arguments = {"batch_size": 4, "batch_tokens": 18, "progress": lambda done, _: told.append(done)}
    assert evaluate(model, task, **arguments).questions == 12
    assert told == [4, 8, 12]
    told.clear()
    task.test = Sized(task.test)
    assert evaluate(model, task, **arguments).accuracy == 9 / 12
    assert told == [3, 5, 6, 10, 12]


@pytest.mark.parametrize("kind", MODELS)
def test_prompts_that_other_processes_make_are_answered_in_their_order(kind: str) -> None:
    model = MODELS[kind]()
    task = riddles_that_the_model_solves(kind, model, wrong=3)
    told: list[int] = []
    found = evaluate(model, task, batch_size=5, workers=2, progress=lambda done, _: told.append(done))
    assert found.groups == evaluate(model, task, batch_size=5).groups
    assert found.accuracy == 9 / 12
    assert told == [5, 10, 12]


def test_the_answer_is_the_group_where_there_is_no_category() -> None:
    model = MODELS["llama"]()
    task = riddles_that_the_model_solves("llama", model)
    for item in task.test:
        del item["category"]
    assert set(evaluate(model, task).groups) == {str(item["answer"]) for item in task.test}


def test_the_mode_of_the_model_is_as_before() -> None:
    model = MODELS["llama"]()
    model.train()
    evaluate(model, Riddles(images=False))
    assert model.training
    perplexity(model, Riddles(images=False))
    assert model.training
    model.model.layers[0].eval()
    evaluate(model, Riddles(images=False))
    assert model.training
    assert not model.model.layers[0].mlp.training


@pytest.mark.parametrize("limit", [0, -1])
def test_no_questions_are_an_error(limit: int) -> None:
    with pytest.raises(EvaluationError, match="no question"):
        evaluate(MODELS["llama"](), Riddles(images=False), limit=limit)


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large() -> None:
    model = MODELS["llama"]()
    model.lm_head.weight.data.zero_()
    found = perplexity(model, Riddles(images=False))
    assert math.isclose(found.perplexity, model.config.vocab_size, rel_tol=1e-4)


def test_perplexity_is_over_all_tokens_alike_whatever_the_batches() -> None:
    model, task = MODELS["llama"](), Riddles(images=False)
    batch = task.collate(task.test)
    batch["labels"][0] = IGNORED
    task.collate = lambda items: {k: v[[task.test.index(i) for i in items]] for k, v in batch.items()}
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    at = labels != IGNORED
    expected = torch.nn.functional.cross_entropy(logits[at], labels[at]).exp()
    for size in (1, 3, 8):
        found = perplexity(model, task, batch_size=size)
        assert found.tokens == int(at.sum())
        assert math.isclose(found.perplexity, float(expected), rel_tol=1e-5)


def test_perplexity_is_given_for_each_category_too() -> None:
    model, task = MODELS["llama"](), Riddles(images=False)
    task.test = [{**item, "category": "even" if i % 2 == 0 else "odd"} for i, item in enumerate(task.train)]
    found = perplexity(model, task, batch_size=3)
    for name, group in found.groups.items():
        alone = Riddles(images=False)
        alone.test = [item for item in task.test if item["category"] == name]
        expected = perplexity(model, alone)
        assert group.tokens == expected.tokens
        assert math.isclose(group.perplexity, expected.perplexity, rel_tol=1e-5)
    assert [row["group"] for row in found.rows()] == ["even", "odd"]
    total = sum(math.log(group.perplexity) * group.tokens for group in found.groups.values())
    assert math.isclose(found.perplexity, math.exp(total / found.tokens), rel_tol=1e-6)
    assert perplexity(model, Riddles(images=False)).groups == {}


def test_a_loss_that_is_no_number_is_an_error() -> None:
    model = MODELS["llama"]()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="nan"):
        perplexity(model, Riddles(images=False))


def test_a_loss_too_large_for_a_perplexity_is_an_error() -> None:
    model = MODELS["llama"]()
    model.lm_head.weight.data.mul_(1e6)
    with pytest.raises(EvaluationError, match="diverged"):
        perplexity(model, Riddles(images=False))


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_perplexity_is_the_models_own_loss_and_logits_are_made_for_labels_alone(
    kind: str, converted: bool
) -> None:
    model, task = MODELS[kind](), Riddles(images=kind == "qwen")
    if converted:
        bridges.replace_attention(model, "mmate", text_window=4, window=(1, 2, 2))
    batch = task.collate(task.test)
    with torch.no_grad():
        own = float(model(**batch, use_cache=False).loss.exp())
    made: list[torch.Size] = []
    model.get_output_embeddings().register_forward_hook(lambda *args: made.append(args[-1].shape))
    assert perplexity(model, task).perplexity == pytest.approx(own, rel=1e-5)
    labelled = (batch["labels"] != IGNORED).any(0).sum()
    assert made == [(4, labelled, model.config.get_text_config().vocab_size)]
    assert labelled < batch["labels"].shape[1]
