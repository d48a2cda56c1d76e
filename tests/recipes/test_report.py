"""A report: what a twin keeps is everything, errors of layers are what they say, figures are those of the rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import bridges
from recipes import yardstick as yardsticks
from recipes.evaluate import EvaluationError
from recipes.report import Report, layer_errors, report
from recipes.teachers import Teacher
from tests.recipes.toys import MODELS, Riddles, Tokenizer, recipe, stage

MEASURES = ["accuracy", "perplexity", "agreement"]


def teacher_of(kind: str) -> Teacher:
    model = MODELS[kind]()
    if kind == "qwen":  # a random one would say tokens of images that are not there
        model.lm_head.weight.data[[model.config.image_token_id, model.config.video_token_id]] = 0
    return Teacher(model, Tokenizer())


def student_of(teacher: Teacher, mixer: str = "mmate", **config: Any) -> Any:
    torch.manual_seed(0)
    student = copy.deepcopy(teacher.model)
    bridges.replace_attention(student, mixer, **config)
    return student


def riddles(kind: str, teacher: Teacher) -> Riddles:
    """Two groups; in one of them the right answers are the teacher's, so that there is something to keep."""
    task = Riddles(images=kind == "qwen", items=6)
    task.test = []
    for place, item in enumerate(task.train):
        prompt = task.prompts([item])
        said = teacher.model.generate(**prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        answer = said[0, prompt["input_ids"].shape[1] :].tolist() if place % 2 else [3, 3, 2]
        task.test.append({**item, "answer": answer, "category": "known" if place % 2 else "unknown"})
    return task


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def teacher(kind: str) -> Teacher:
    return teacher_of(kind)


@pytest.fixture
def task(kind: str, teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> Riddles:
    made = riddles(kind, teacher)
    monkeypatch.setattr(yardsticks, "load_task", lambda *_: made)
    return made


def hooks_of(*models: torch.nn.Module) -> int:
    parts = [part for model in models for part in model.modules()]
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in parts)


def test_what_trivial_answers_reach_stands_beside_the_teacher(teacher: Teacher, task: Riddles) -> None:
    task.trivial = {"known": 0.25, "unknown": 0.125}
    plan = recipe(stage(), judged_by=[{"task": "riddles", "measures": ["accuracy", "perplexity"]}])
    found = report(plan, student_of(teacher), teacher)
    columns = ("measure", "group", "trivial", "above_trivial")
    assert [tuple(row[key] for key in columns) for row in found.rows if "trivial" in row] == [
        ("accuracy", "unknown", 0.125, -0.125),
        ("accuracy", "known", 0.25, 0.75),
    ]
    assert found.figures["above_trivial_min"] == -0.125


def test_groups_of_long_videos_are_those_that_the_task_names(teacher: Teacher, task: Riddles) -> None:
    task.long_videos = {"known"}
    plan = recipe(stage(), judged_by=[{"task": "riddles", "measures": ["accuracy", "perplexity"]}])
    rows = report(plan, student_of(teacher, "attention"), teacher).rows
    marked = {row["group"]: row["long_video"] for row in rows if "long_video" in row}
    assert marked == {"all": False, "known": True, "unknown": False}
    assert not [row for row in rows if row["measure"] == "perplexity" and "long_video" in row]


def test_forms_of_question_are_rows_of_their_own(teacher: Teacher, task: Riddles) -> None:
    task.long_videos = {"known"}
    for place, item in enumerate(task.test):
        item["form"] = "early" if place < 3 else "late"
    plan = recipe(stage(), judged_by=[{"task": "riddles", "measures": ["accuracy", "perplexity"]}])
    found = report(plan, student_of(teacher, "attention"), teacher)
    told = {(row["group"], row["form"]): row for row in found.forms}
    assert set(told) == {(group, form) for group in ("known", "unknown") for form in ("early", "late")}
    assert all(row["measure"] == "accuracy" for row in found.forms)
    assert all(row["teacher"] == row["student"] == float(row["group"] == "known") for row in found.forms)
    assert sum(row["count"] for row in found.forms) == len(task.test)
    assert not [row for row in found.rows if "form" in row]
    assert found.figures == Report(found.rows, []).figures


def test_a_twin_keeps_everything(teacher: Teacher, task: Riddles) -> None:
    twin = student_of(teacher, "attention")
    plan = recipe(stage(), judged_by=[{"task": "riddles", "measures": MEASURES, "batch_size": 4}])
    said: list[str] = []
    found = report(plan, twin, teacher, say=said.append)
    assert {(row["measure"], row["group"]) for row in found.rows} == {
        (measure, group) for measure in MEASURES for group in ("all", "known", "unknown")
    }
    for row in found.rows:
        assert row["student"] == pytest.approx(row["teacher"], rel=1e-5)
        assert row["recovery"] == (None if row["teacher"] == 0 else pytest.approx(1, rel=1e-5))
        assert row["count"] > 0
    assert any(row["recovery"] is None for row in found.rows)
    assert found.figures == {
        "riddles_ppl_ratio": pytest.approx(1, rel=1e-5),
        "riddles_agreement": 1.0,
        "riddles_recovery_mean": 1.0,
        "riddles_recovery_min": 1.0,
    }
    assert [row["layer"] for row in found.layers] == [0, 1]
    assert all(0 <= row[name] <= 1e-10 for row in found.layers for name in ("injected", "chained"))
    assert all(abs(row["attention"]) <= 1e-6 for row in found.layers)
    assert said == [*(f"riddles: {measure}" for measure in MEASURES), "errors of layers"]


def test_errors_of_layers_are_squared_distances_over_squared_sizes(teacher: Teacher, task: Riddles) -> None:
    student = student_of(teacher, text_window=2, window=(1, 2, 2), chunk_size=8)
    torch.manual_seed(1)
    for parameter in student.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    hooks = hooks_of(student, teacher.model)
    student.train()
    found = {row["layer"]: row for row in layer_errors(student, teacher.model, task)}
    assert student.training
    assert hooks_of(student, teacher.model) == hooks
    student.eval()

    index, injected, chained = 1, [], []
    for item in task.test:
        batch = task.collate([item])
        del batch["labels"]
        theirs, ours = seen(teacher.model, index, batch), seen(student, index, batch)
        chained.append(error(ours["layer"], theirs["layer"]))
        swapped = seen(student, index, batch, theirs["input"])
        injected.append(error(swapped["attention"], theirs["attention"]))
    assert found[index]["chained"] == pytest.approx(sum(chained) / len(chained), rel=1e-4)
    assert found[index]["injected"] == pytest.approx(sum(injected) / len(injected), rel=1e-4)
    assert found[index]["chained"] > 1e-4
    assert abs(found[index]["chained"] - found[index]["injected"]) > 1e-4


def test_a_layer_that_looks_elsewhere_stands_out(teacher: Teacher, task: Riddles) -> None:
    """One layer keeps its attention, the other sees little; the draw of queries disturbs nobody else's."""
    student = student_of(teacher, {"0": "attention", "1": "mmate"}, text_window=2, chunk_size=8)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again = (layer_errors(student, teacher.model, task) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again
    kept, changed = (row["attention"] for row in first)
    assert abs(kept) < 1e-6
    assert changed > 1e-3


def test_mixers_without_weights_are_reported_without_them() -> None:
    teacher = teacher_of("llama")
    rows = layer_errors(student_of(teacher, "mamba2"), teacher.model, riddles("llama", teacher))
    assert all(row.keys() == {"layer", "injected", "chained"} for row in rows)


def seen(
    model: Any, index: int, batch: dict[str, torch.Tensor], instead: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """What a layer's attention read and wrote, and the layer; ``instead`` is what attention shall read."""
    attention, found = bridges.attention_layers(model)[index], {}

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        read = kwargs if instead is None else {**kwargs, "hidden_states": instead}
        found["input"] = read["hidden_states"]
        return args, read

    def after(name: str) -> Any:
        return lambda module, args, output: found.update(
            {name: output[0] if isinstance(output, tuple) else output}
        )

    handles = [
        attention.register_forward_pre_hook(before, with_kwargs=True),
        attention.register_forward_hook(after("attention")),
        model.get_decoder().layers[index].register_forward_hook(after("layer")),
    ]
    with torch.no_grad():
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).double().square().sum() / theirs.double().square().sum())


def test_hooks_are_gone_after_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = teacher_of("llama")
    task, student = riddles("llama", teacher), student_of(teacher, "attention")
    hooks = hooks_of(student, teacher.model)
    monkeypatch.setattr(task, "collate", lambda items: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        layer_errors(student, teacher.model, task)
    assert hooks_of(student, teacher.model) == hooks
    with pytest.raises(EvaluationError, match="no question"):
        layer_errors(student, teacher.model, task, limit=0)
    assert hooks_of(student, teacher.model) == hooks


def test_without_judges_it_is_accuracy_on_the_training_task(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = teacher_of("llama")
    task, asked = riddles("llama", teacher), []
    monkeypatch.setattr(yardsticks, "load_task", lambda spec, *_: (asked.append(spec), task)[1])
    found = report(recipe(stage()), student_of(teacher, "attention"), teacher)
    assert [(spec.task, spec.measures) for spec in asked] == [("riddles", ["accuracy"])]
    assert {row["measure"] for row in found.rows} == {"accuracy"}


def test_a_limit_holds_for_every_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = teacher_of("llama")
    monkeypatch.setattr(yardsticks, "load_task", lambda *_: riddles("llama", teacher))
    judges = [{"task": "one", "limit": 5}, {"task": "two"}]
    plan, student = recipe(stage(), judged_by=judges), student_of(teacher, "attention")
    counts = {
        row["task"]: row["count"] for row in report(plan, student, teacher).rows if row["group"] == "all"
    }
    assert counts == {"one": 5, "two": 6}
    limited = report(plan, student, teacher, limit=2)
    assert [row["count"] for row in limited.rows if row["group"] == "all"] == [2, 2]
    with pytest.raises(EvaluationError, match="limit is 0"):
        report(plan, student, teacher, limit=0)


def row(task: str, measure: str, group: str, teacher: float, student: float, **more: Any) -> dict[str, Any]:
    better, worse = (teacher, student) if measure == "perplexity" else (student, teacher)
    recovery = better / worse if worse else None
    return {
        "task": task,
        "measure": measure,
        "group": group,
        "teacher": teacher,
        "student": student,
        "recovery": recovery,
        **more,
        "count": 10,
    }


def test_figures_are_those_of_the_rows() -> None:
    rows = [
        row("text", "perplexity", "all", 20.0, 22.0),
        row("text", "perplexity", "fortunes", 20.0, 40.0),
        row("text", "agreement", "all", 1.0, 0.8),
        row("recall", "accuracy", "all", 0.5, 0.1),
        row("recall", "accuracy", "copy 128", 0.8, 0.4),
        row("recall", "accuracy", "count 128", 0.5, 0.5),
        row("recall", "accuracy", "lookup 128", 0.0, 0.5),
        row("vqa", "accuracy", "all", 0.8, 0.6),
        row("hard", "accuracy", "all", 0.0, 0.0),
    ]
    found = Report(rows, [])
    expected = {
        "text_ppl_ratio": 1.1,
        "text_agreement": 0.8,
        "recall_recovery_mean": 0.75,
        "recall_recovery_min": 0.5,
        "vqa_recovery_mean": 0.75,
        "vqa_recovery_min": 0.75,
    }
    assert found.figures == pytest.approx(expected)


def test_tasks_of_pictures_are_summed_up_together_and_long_videos_by_themselves() -> None:
    def seen(task: str, group: str, teacher: float, student: float, long: bool) -> dict[str, Any]:
        return row(task, "accuracy", group, teacher, student, long_video=long, above_trivial=teacher - 0.5)

    rows = [
        seen("pictures", "all", 0.9, 0.1, False),
        seen("pictures", "names", 0.8, 0.8, False),
        seen("pictures", "needle 1024", 0.8, 0.4, True),
        seen("pictures at 16k", "all", 0.9, 0.1, False),
        seen("pictures at 16k", "slideshow 16384", 0.8, 0.2, True),
        row("recall", "accuracy", "all", 0.5, 0.1),
    ]
    expected = {
        "recall_recovery_mean": 0.2,
        "recall_recovery_min": 0.2,
        "recovery_mean": 1.75 / 3,
        "recovery_min": 0.25,
        "recovery_long_video": 0.375,
        "above_trivial_min": 0.3,
    }
    assert Report(rows, []).figures == pytest.approx(expected)
    short = [r for r in rows if not r.get("long_video")]
    assert "recovery_long_video" not in Report(short, []).figures
    alone = Report([seen("vqa", "all", 0.8, 0.6, False)], []).figures
    assert alone["recovery_mean"] == pytest.approx(0.75)
