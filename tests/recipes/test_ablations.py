"""The ablations of the library: each runs, and differs from its base in what it says and in nothing else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedModel

from recipes.distill import distill
from recipes.plan import Recipe
from recipes.teachers import Teacher
from recipes.variants import library
from tests.recipes.toys import QUIET, Riddles, Tokenizer, llama, qwen

ABLATIONS = {name: path for name, path in library().items() if name.startswith("ablate-")}
FAMILIES = {"ablate-text-": "linmu-smollm2-135m", "ablate-vlm-": "linmu-vlm-mini"}
"""How names begin → the recipe that is varied."""

every = pytest.mark.parametrize("name", ABLATIONS)


def said(name: str) -> dict[str, Any]:
    return yaml.safe_load(ABLATIONS[name].read_text())


def base_of(name: str) -> Recipe:
    return Recipe.load(said(name)["base"])


def test_library_lists_ablations_after_the_others() -> None:
    names = Recipe.names()
    assert set(names[-len(ABLATIONS) :]) == set(ABLATIONS)
    assert all(path.parent.name == "ablations" for path in ABLATIONS.values())


@every
def test_an_ablation_asks_a_question_of_its_familys_recipe(name: str) -> None:
    (prefix,) = (prefix for prefix in FAMILIES if name.startswith(prefix))
    assert base_of(name).name == FAMILIES[prefix]
    assert "?" in Recipe.load(name).description


@every
def test_an_ablation_trains_on_as_much_and_is_judged_as_its_base(name: str) -> None:
    ablation, base = Recipe.load(name), base_of(name)
    assert budget(ablation) == budget(base)
    for key in ("seed", "teacher", "data", "judged_by"):
        assert getattr(ablation, key) == getattr(base, key)


def budget(recipe: Recipe) -> int:
    """The tokens that bound its batches, or their rows."""
    parts = [(stage.steps * stage.gradient_accumulation, stage) for stage in recipe.stages]
    return sum(passes * (stage.batch_tokens or stage.batch_size) for passes, stage in parts)


@every
def test_all_that_an_ablation_says_changes_its_base(name: str) -> None:
    """What it says as the base does already is no ablation: the base took it over."""
    changes = {key: value for key, value in said(name).items() if key not in ("name", "base", "description")}
    base = base_of(name).to_dict()
    assert changes
    for stage, change in changes.pop("stages", {}).items():
        assert_changed(change, next(s for s in base["stages"] if s["name"] == stage))
    assert_changed(changes, base)


def assert_changed(changes: Any, base: Any) -> None:
    if isinstance(changes, dict) and isinstance(base, dict):
        for key, value in changes.items():
            assert_changed(value, base.get(key))
    else:
        assert changes != base


def test_no_two_ablations_are_the_same() -> None:
    found = [{**Recipe.load(name).to_dict(), "name": "", "description": ""} for name in ABLATIONS]
    assert all(one not in found[:number] for number, one in enumerate(found))


@every
def test_every_ablation_fits_a_model_of_its_teachers_class(name: str) -> None:
    recipe = Recipe.load(name)
    assert all(stage.trained_parameters for stage in recipe.explain(small_model(recipe)).stages)


@pytest.mark.parametrize("name", [name for name in ABLATIONS if "stages" in said(name)])
def test_an_ablation_of_stages_trains_them(name: str, tmp_path: Path) -> None:
    fields = Recipe.load(name).to_dict()
    for stage in fields["stages"]:
        stage.update(steps=1, batch_size=2, batch_tokens=None)
    recipe = Recipe.from_dict({**fields, "data": {**fields["data"], "workers": 0}})
    teacher = Teacher(small_model(recipe), Tokenizer())
    task = Riddles(images=recipe.data.task != "text")
    done = distill(recipe, tmp_path, teacher=teacher, task=task, callbacks=QUIET)
    assert [entry["stage"] for entry in done.history] == [stage.name for stage in recipe.stages]
    assert all(math.isfinite(entry["loss"]) for entry in done.history)


def small_model(recipe: Recipe) -> PreTrainedModel:
    depth = {"num_hidden_layers": 30} if isinstance(recipe.student.mixer, dict) else {}
    model = llama(**depth) if recipe.data.task == "text" else qwen(**depth)
    return model.to(getattr(torch, recipe.teacher.dtype))
