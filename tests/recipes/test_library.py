from __future__ import annotations

import pytest

from recipes.plan import LIBRARY, Recipe
from tests.recipes.toys import MODELS

TEACHERS = {"linmu-tiny-vlm": "qwen", "linmu-paper": "qwen", "linmu-smollm2-135m-quick": "llama"}


def test_every_recipe_has_its_files_name_and_says_what_it_is_for():
    for path in LIBRARY.glob("*.yaml"):
        recipe = Recipe.load(path)
        assert recipe.name == path.stem
        assert len(recipe.description) > 20


@pytest.mark.parametrize("name", Recipe.names())
def test_every_recipe_fits_models_of_its_teachers_class(name):
    """Patterns, branches, LoRA targets and losses, on a small model of the same class."""
    told = Recipe.load(name).explain(MODELS[TEACHERS[name]]())
    assert all(stage.trained_parameters > 0 for stage in told.stages)


@pytest.mark.parametrize("name", Recipe.names())
def test_the_stages_are_those_of_linmu(name):
    """Flex-MA alone, then both branches, then LoRA on the rest with all four losses."""
    first, second, third = Recipe.load(name).explain(MODELS[TEACHERS[name]]()).stages
    assert first.active == ("flex_ma",)
    assert second.active is None
    assert first.trained_parameters < second.trained_parameters < third.trained_parameters
    assert not first.adapted
    assert not second.adapted
    assert third.adapted
    assert set(third.losses) == {"hidden_states", "token_kd", "sequence_kd", "task"}
