from __future__ import annotations

import math

import pytest
import torch

import bridges
from recipes.distill import distill
from recipes.plan import Recipe
from recipes.teachers import Teacher
from recipes.variants import LIBRARY
from tests.recipes.toys import QUIET, Riddles, Tokenizer, llama, qwen


def narrow_smollm2():
    """As deep as SmolLM2-135M, since a recipe may name its layers, and with tied embeddings."""
    return llama(num_hidden_layers=30, tie_word_embeddings=True)


SMALL = {
    "tiny-vlm": qwen,
    "vlm-mini": qwen,
    "Qwen/Qwen2.5-VL-7B-Instruct": qwen,
    "smollm2-135m": narrow_smollm2,
}
"""Teacher of a recipe → a small random model of its class."""

LINMU = {
    "linmu-paper": {"hidden_states", "token_kd", "sequence_kd", "task"},
    "linmu-vlm-mini": {"hidden_states", "token_kd", "task"},
    "linmu-tiny-vlm": {"hidden_states", "token_kd", "sequence_kd", "task"},
    "linmu-smollm2-135m-quick": {"hidden_states", "token_kd", "sequence_kd", "task"},
    "linmu-smollm2-135m": {"hidden_states", "token_kd"},
}
"""Recipe → losses of its third stage."""

WHOLE_LAYERS = ("linmu-smollm2-135m", "linmu-vlm-mini")
"""Those whose first stage aligns both branches together."""

NAMES = sorted(path.stem for path in LIBRARY.glob("*.yaml"))
"""The recipes that are no ablations."""

PEERS = [name for name in NAMES if name.startswith("peer-")]


def small_teacher(recipe):
    return SMALL[recipe.teacher.model]()


def shortened(recipe):
    """The recipe with two steps of two rows a stage."""
    fields = recipe.to_dict()
    for stage in fields["stages"]:
        stage.update(
            steps=2, batch_size=2, batch_tokens=None, gradient_accumulation=1, save_every=None, log_every=1
        )
    return Recipe.from_dict({**fields, "data": {**fields["data"], "workers": 0}})


def test_every_recipe_has_its_files_name_and_says_what_it_is_for():
    for name in Recipe.names():
        recipe = Recipe.load(name)
        assert recipe.name == name
        assert len(recipe.description) > 20


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_fits_models_of_its_teachers_class(name):
    """Patterns, branches, LoRA targets and losses, on a small model of the same class."""
    recipe = Recipe.load(name)
    told = recipe.explain(small_teacher(recipe))
    assert all(stage.trained_parameters > 0 for stage in told.stages)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_trains_each_stage_on_each_of_its_losses(name, tmp_path):
    recipe = shortened(Recipe.load(name))
    model = small_teacher(recipe).to(getattr(torch, recipe.teacher.dtype))
    task = Riddles(images=recipe.data.task != "text")
    done = distill(recipe, tmp_path, teacher=Teacher(model, Tokenizer()), task=task, callbacks=QUIET)
    assert [(entry["stage"], entry["step"]) for entry in done.history] == [
        (stage.name, step) for stage in recipe.stages for step in (1, 2)
    ]
    losses = {stage.name: stage.losses.weights for stage in recipe.stages}
    for entry in done.history:
        values = {name: entry[name] for name in losses[entry["stage"]]}
        assert all(math.isfinite(value) for value in values.values()), entry


@pytest.mark.parametrize("name", list(LINMU))
def test_the_stages_are_those_of_linmu(name):
    """Each layer alone, by all that is new or by Flex-MA; then all of the mixers, then LoRA on the rest."""
    recipe = Recipe.load(name)
    first, second, third = recipe.explain(small_teacher(recipe)).stages
    assert first.active == (None if name in WHOLE_LAYERS else ("flex_ma",))
    assert recipe.stages[0].losses.hidden_states.form == "injected"
    assert second.active is None
    assert first.trained_parameters <= second.trained_parameters < third.trained_parameters
    assert not first.adapted
    assert not second.adapted
    assert third.adapted
    assert set(third.losses) == LINMU[name]


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_has_the_teacher_the_rows_and_the_tokens_of_linmu(name):
    """Otherwise a table of them says nothing; answers that the teacher generates would be other rows."""
    linmu, peer = Recipe.load("linmu-smollm2-135m"), Recipe.load(name)
    assert (peer.seed, peer.teacher, peer.data) == (linmu.seed, linmu.teacher, linmu.data)
    assert rows(peer) == rows(linmu)
    for stage in (*linmu.stages, *peer.stages):
        assert stage.losses.sequence_kd is None
        assert stage.max_length is None


def test_the_windows_of_peers_are_as_wide_as_linmus():
    width = Recipe.load("linmu-smollm2-135m").student.config["text_window"]
    assert Recipe.load("peer-sliding-window-smollm2-135m").student.config["window"] == width
    branches = Recipe.load("peer-lolcats-smollm2-135m").student.config["branches"]
    assert branches["window"]["window"] == width


def rows(recipe):
    return sum(stage.steps * stage.batch_size * stage.gradient_accumulation for stage in recipe.stages)


@pytest.mark.parametrize("name", [*LINMU, *PEERS])
def test_only_the_hybrid_keeps_attention(name):
    """Every fourth layer of it; what the others leave behind has a state of constant size."""
    recipe = Recipe.load(name)
    spec = recipe.student
    report = bridges.plan(
        small_teacher(recipe), spec.mixer, layers=spec.layers, init=spec.init, **spec.config
    )
    assert report.kept_layers == (tuple(range(3, 30, 4)) if name.startswith("peer-hybrid") else ())
    assert report.state_bytes is not None
