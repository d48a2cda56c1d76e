from __future__ import annotations

import json

import pytest
import yaml

from recipes.errors import InvalidRecipeError, UnknownKeyError, UnknownRecipeError
from recipes.plan import Recipe, TeacherSpec
from tests.recipes.toys import recipe, stage, three_stages


def test_recipe_survives_json_and_yaml():
    original = recipe(*three_stages())
    assert Recipe.from_dict(json.loads(json.dumps(original.to_dict()))) == original
    assert Recipe.from_dict(yaml.safe_load(original.to_yaml())) == original


@pytest.mark.parametrize("name", Recipe.names())
def test_library_recipes_load_by_name_and_by_path(name, tmp_path):
    loaded = Recipe.load(name)
    path = tmp_path / "copy.yaml"
    path.write_text(loaded.to_yaml())
    assert loaded.name == name
    assert Recipe.load(path) == loaded


def test_bare_values_stand_for_their_main_key():
    short = recipe(stage(losses={"task": 2.0}, optimizer=0.5), teacher="tiny-vlm", student="flex_ma")
    assert short.teacher == TeacherSpec(model="tiny-vlm")
    assert short.student.mixer == "flex_ma"
    assert short.stages[0].losses.weights == {"task": 2.0}
    assert short.stages[0].optimizer.learning_rate == 0.5


@pytest.mark.parametrize(
    ("fields", "near"),
    [
        ({"techer": "x"}, "'teacher'"),
        ({"stages": [stage(trainabel=["x"])]}, "'trainable'"),
        ({"stages": [stage(losses={"token_kt": 1})]}, "'token_kd'"),
        ({"stages": [stage(losses={"token_kd": {"temprature": 1}})]}, "'temperature'"),
        ({"student": {"mixr": "mmate"}}, "'mixer'"),
        ({"stages": [stage(lora={"target": ["mlp"]})]}, "'targets'"),
        ({"judged_by": [{"task": "text", "measure": ["accuracy"]}]}, "'measures'"),
    ],
)
def test_unknown_key_is_refused_with_near_names(fields, near):
    with pytest.raises(UnknownKeyError, match=f"Did you mean {near}"):
        recipe(stage(), **fields) if "stages" not in fields else recipe(**fields)


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        (stage(steps=0), "steps"),
        (stage(losses={"token_kd": -1}), "weight"),
        (stage(losses={}), "needs a loss"),
        (stage(losses={"hidden_states": {"form": "injected", "at": "layer"}}), "chained"),
        (stage(trainable=["mixer("]), "not a regular expression"),
        (stage(trainable=[]), "trains nothing"),
        (stage(name="../up"), "name"),
        (stage(active=[]), "active"),
        (stage(optimizer={"learning_rate": float("nan")}), "learning_rate"),
        ({k: v for k, v in stage().items() if k != "optimizer"}, "optimizer"),
    ],
)
def test_bad_value_is_refused_and_named(fields, where):
    with pytest.raises(InvalidRecipeError, match=where):
        recipe(fields)


def test_one_measure_of_one_task_is_asked_twice_only_under_two_names():
    twice = [{"task": "text", "options": {"length": length}} for length in (64, 128)]
    with pytest.raises(InvalidRecipeError, match="different names"):
        recipe(stage(), judged_by=twice)
    plan = recipe(stage(), judged_by=[twice[0], {**twice[1], "name": "text at 128"}])
    assert [judge.label for judge in plan.judged_by] == ["text", "text at 128"]


def test_what_judges_are_is_read_and_defaults_to_accuracy_of_everything():
    assert recipe(stage()).judged_by == []
    plan = recipe(stage(), judged_by=["recall", {"task": "text", "measures": ["perplexity"], "limit": 5}])
    first, second = plan.judged_by
    assert (first.task, first.measures, first.limit) == ("recall", ["accuracy"], None)
    assert (second.task, second.measures, second.limit) == ("text", ["perplexity"], 5)
    assert Recipe.from_dict(yaml.safe_load(plan.to_yaml())) == plan


@pytest.mark.parametrize(
    "judge",
    [{"task": "text", "measures": []}, {"task": "text", "measures": ["speed"]}, {"task": "text", "limit": 0}],
)
def test_a_bad_judge_is_refused_and_named(judge):
    with pytest.raises(InvalidRecipeError, match=r"judged_by\.0\.(measures|limit)"):
        recipe(stage(), judged_by=[judge])


def test_stages_of_the_same_name_are_refused():
    with pytest.raises(InvalidRecipeError, match="different names"):
        recipe(stage(), stage())


def test_unknown_recipe_lists_near_names():
    with pytest.raises(UnknownRecipeError, match="linmu-tiny-vlm"):
        Recipe.load("linmu-tiny-vml")


@pytest.mark.parametrize("text", ["a: [", "- just\n- a list", "", "!!python/object/apply:os.getcwd []"])
def test_what_is_no_recipe_is_refused(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InvalidRecipeError):
        Recipe.load(path)
