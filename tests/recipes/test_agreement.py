"""Agreement along the teacher's continuations: a model agrees with itself, padding and batches do not matter."""

from __future__ import annotations

import copy

import pytest
import torch

import bridges
from recipes.agreement import agreement, continuations
from recipes.evaluate import EvaluationError
from tests.recipes.toys import MODELS, Riddles


def model_of(kind: str) -> torch.nn.Module:
    model = MODELS[kind]()
    if kind == "qwen":  # a random one would say tokens of images that are not there
        model.lm_head.weight.data[[model.config.image_token_id, model.config.video_token_id]] = 0
    return model


def riddles(kind: str) -> Riddles:
    task = Riddles(images=kind == "qwen", items=10)
    task.test = [dict(item, category="even" if i % 2 == 0 else "odd") for i, item in enumerate(task.train)]
    return task


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_agrees_with_itself_and_with_its_exact_twin(kind: str) -> None:
    teacher, task = model_of(kind), riddles(kind)
    twin = copy.deepcopy(teacher)
    bridges.replace_attention(twin, "attention")
    for student in (teacher, twin):
        found = agreement(student, continuations(teacher, task, batch_size=4), batch_size=4)
        assert found.agreement == 1.0
        assert found.tokens >= 10
        assert {name: group.accuracy for name, group in found.groups.items()} == {"even": 1.0, "odd": 1.0}


@pytest.mark.parametrize("kind", MODELS)
def test_it_is_the_share_of_first_choices_one_prompt_at_a_time(kind: str) -> None:
    teacher, task = model_of(kind), riddles(kind)
    torch.manual_seed(3)
    student = copy.deepcopy(teacher)
    for parameter in student.parameters():
        parameter.data += 0.3 * parameter.data.std() * torch.randn_like(parameter)
    same = said = 0
    for item in task.test:
        prompt = task.prompts([item])
        length = prompt["input_ids"].shape[1]
        ids = teacher.generate(**prompt, max_new_tokens=task.max_new_tokens, do_sample=False)
        for place in range(length, ids.shape[1]):
            row = {**prompt, "input_ids": ids[:, :place], "attention_mask": torch.ones_like(ids[:, :place])}
            if "mm_token_type_ids" in row:
                row["mm_token_type_ids"] = torch.nn.functional.pad(
                    row["mm_token_type_ids"], (0, place - length)
                )
            with torch.no_grad():
                same += int(student(**row).logits[0, -1].argmax() == ids[0, place])
            said += 1
    told: list[tuple[int, int]] = []
    continued = continuations(teacher, task, batch_size=4)
    found = agreement(
        student, continued, batch_size=4, progress=lambda done, total: told.append((done, total))
    )
    assert (found.tokens, found.agreement) == (said, pytest.approx(same / said))
    assert 0 < found.agreement < 1
    assert told == [(4, 10), (8, 10), (10, 10)]
    for size in (1, 10):
        again = agreement(student, continuations(teacher, task, batch_size=size), batch_size=size)
        assert (again.agreement, again.groups) == (found.agreement, found.groups)


def test_nothing_to_compare_is_an_error() -> None:
    teacher, task = MODELS["llama"](), riddles("llama")
    with pytest.raises(EvaluationError, match="limit is 0"):
        continuations(teacher, task, limit=0)


def test_a_teacher_that_says_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, task = MODELS["llama"](), riddles("llama")
    monkeypatch.setattr(teacher, "generate", lambda **inputs: inputs["input_ids"])
    with pytest.raises(EvaluationError, match="continued none of 10 prompts"):
        continuations(teacher, task)
