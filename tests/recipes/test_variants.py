"""A recipe file that names a base: what it takes over, what it replaces, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.errors import InvalidRecipeError, RecipeError, UnknownKeyError, UnknownRecipeError
from recipes.plan import Recipe
from tests.recipes.toys import recipe, three_stages


@pytest.fixture
def base(tmp_path: Path) -> Recipe:
    """Three stages, in the file base.yaml."""
    made = recipe(*three_stages(), description="What others vary.", judged_by=["riddles"])
    (tmp_path / "base.yaml").write_text(made.to_yaml())
    return made


def variant(folder: Path, **fields: Any) -> Recipe:
    path = folder / "variant.yaml"
    path.write_text(yaml.safe_dump({"name": "variant", "base": "base.yaml", **fields}))
    return Recipe.load(path)


def expected(base: Recipe, **fields: Any) -> Recipe:
    return Recipe.from_dict({**base.to_dict(), "name": "variant", "description": "", **fields})


def test_what_a_variant_does_not_say_is_the_bases(tmp_path: Path, base: Recipe) -> None:
    assert variant(tmp_path) == expected(base)
    assert "base" not in variant(tmp_path).to_dict()


def test_mappings_merge_and_lists_and_scalars_replace(tmp_path: Path, base: Recipe) -> None:
    found = variant(tmp_path, student={"config": {"window": [2, 2, 2]}}, seed=3, judged_by=["text", "recall"])
    config = {**base.student.config, "window": [2, 2, 2]}
    student = {**base.student.model_dump(), "config": config}
    assert found == expected(base, student=student, seed=3, judged_by=["text", "recall"])


def test_a_bare_value_replaces_the_whole_mapping(tmp_path: Path, base: Recipe) -> None:
    assert variant(tmp_path, student="flex_ma") == expected(base, student="flex_ma")


def test_null_removes_a_key(tmp_path: Path, base: Recipe) -> None:
    found = variant(tmp_path, student={"config": {"window": None}}, judged_by=None)
    assert found.student.config == {k: v for k, v in base.student.config.items() if k != "window"}
    assert found.judged_by == []


def test_stages_change_by_name_and_drop_by_null(tmp_path: Path, base: Recipe) -> None:
    found = variant(
        tmp_path, stages={"lora": {"losses": {"task": None}, "steps": 9}, "flex-ma": None, "local-swin": {}}
    )
    second, third = base.to_dict()["stages"][1:]
    changed = {**third, "losses": {**third["losses"], "task": None}, "steps": 9}
    assert found == expected(base, stages=[second, changed])


def test_a_list_of_stages_replaces_all(tmp_path: Path, base: Recipe) -> None:
    stages = base.to_dict()["stages"][2:]
    assert variant(tmp_path, stages=stages) == expected(base, stages=stages)


def test_a_base_may_have_a_base_and_be_one_of_the_library(tmp_path: Path) -> None:
    linmu = Recipe.load("linmu-tiny-vlm")
    (tmp_path / "base.yaml").write_text("name: b\nbase: linmu-tiny-vlm\nseed: 7\n")
    found = variant(tmp_path, stages={"lora": {"steps": 1}})
    assert found.seed == 7
    assert [stage.steps for stage in found.stages] == [*(s.steps for s in linmu.stages[:2]), 1]


@pytest.mark.parametrize(
    ("fields", "kind", "said"),
    [
        ({"stages": {"lorra": {"steps": 1}}}, UnknownKeyError, "stage 'lorra'.* Did you mean 'lora'"),
        ({"stages": {"lora": {"stepz": 1}}}, UnknownKeyError, "Did you mean 'steps'"),
        ({"stages": {"lora": {"stepz": None}}}, UnknownKeyError, "stage 'lora' removes 'stepz'.*'steps'"),
        ({"stages": {"lora": 3}}, InvalidRecipeError, "stage 'lora' by a mapping.* found 3"),
        ({"stages": dict.fromkeys(("flex-ma", "local-swin", "lora"))}, InvalidRecipeError, "stages"),
        (
            {"student": {"config": {"windw": None}}},
            UnknownKeyError,
            "removes 'windw'.* Did you mean 'window'",
        ),
        ({"sead": 1}, UnknownKeyError, "Did you mean 'seed'"),
        ({"teacher": None}, InvalidRecipeError, "teacher: Field required"),
        ({"name": None}, UnknownKeyError, "removes 'name'"),
        ({"base": "linmu-tiny-vml"}, UnknownRecipeError, "Did you mean 'linmu-tiny-vlm'"),
        ({"base": ["base.yaml"]}, InvalidRecipeError, r"base must be the name of a recipe, found \['base"),
        ({"base": "variant.yaml"}, InvalidRecipeError, "circle: variant → variant"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_base_is_refused_and_named(
    fields: dict[str, Any], kind: type[RecipeError], said: str, tmp_path: Path, base: Recipe
) -> None:
    with pytest.raises(kind, match=said):
        variant(tmp_path, **fields)


def test_plain_data_may_name_a_base_too() -> None:
    fields = {"name": "variant", "base": "linmu-tiny-vlm", "seed": 5}
    assert Recipe.from_dict(fields) == Recipe.load("linmu-tiny-vlm").model_copy(
        update={"name": "variant", "description": "", "seed": 5}
    )
    assert fields["base"] == "linmu-tiny-vlm"


def test_a_variant_has_a_name_of_its_own(tmp_path: Path, base: Recipe) -> None:
    (tmp_path / "nameless.yaml").write_text("base: base.yaml\n")
    with pytest.raises(InvalidRecipeError, match="name: Field required"):
        Recipe.load(tmp_path / "nameless.yaml")


def test_bases_in_a_circle_are_refused_with_the_way_round(tmp_path: Path, base: Recipe) -> None:
    (tmp_path / "base.yaml").write_text("name: b\nbase: variant.yaml\n")
    with pytest.raises(InvalidRecipeError, match="variant → base → variant"):
        variant(tmp_path)
