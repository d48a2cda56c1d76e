from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import PeftModel

import bridges
from recipes.checkpoint import read_tensors
from recipes.data.task import TaskError
from recipes.distill import adapt, distill, share_frozen
from recipes.errors import CheckpointError, PatternError, RunError
from recipes.plan import LoRA, Stage
from recipes.report import report
from recipes.run import Run
from recipes.selection import select
from recipes.trainer import GPU_LOAD, checkpoints
from tests.recipes.toys import MODELS, QUIET, Kill, Riddles, batch, recipe, stage, teacher, three_stages


def run(folder, kind="llama", stages=None, callbacks=QUIET, **kwargs):
    plan = recipe(*(three_stages() if stages is None else stages))
    task = Riddles(images=kind == "qwen")
    return distill(plan, folder, teacher=teacher(kind), task=task, callbacks=callbacks, **kwargs)


def weights(model):
    return dict(model.named_parameters())


def without_costs(history):
    return [{k: v for k, v in entry.items() if k not in ("seconds", *GPU_LOAD)} for entry in history]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return {kind: run(tmp_path_factory.mktemp(kind) / "run", kind) for kind in MODELS}


KILLS = {
    "before any checkpoint": Kill("flex-ma", 1),
    "after a checkpoint": Kill("flex-ma", 2, after_save=True),
    "between checkpoints, accumulating": Kill("local-swin", 3),
    "at a stage's last step": Kill("local-swin", 4),
    "in the LoRA stage, with dropout": Kill("lora", 4),
}


@pytest.mark.parametrize(
    ("kind", "kill"),
    [*(("llama", kill) for kill in KILLS), ("qwen", "between checkpoints, accumulating")],
)
def test_a_killed_run_resumed_is_the_run_that_was_not_killed(tmp_path, whole, kind, kill):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, kind, callbacks=[KILLS[kill]])
    resumed = run(tmp_path, kind)
    expected = weights(whole[kind].student)
    assert weights(resumed.student).keys() == expected.keys()
    for name, parameter in weights(resumed.student).items():
        assert torch.equal(parameter, expected[name]), name
    assert without_costs(resumed.history) == without_costs(whole[kind].history)


@pytest.mark.parametrize("kind", list(MODELS))
def test_a_finished_run_has_a_student_to_load_and_a_history(whole, kind):
    done = whole[kind]
    loaded = bridges.load_pretrained(done.out / "student")
    for name, parameter in weights(loaded).items():
        assert torch.equal(parameter, weights(done.student)[name]), name
    assert json.loads((done.out / "history.json").read_text()) == done.history
    assert list(dict.fromkeys(entry["stage"] for entry in done.history)) == ["flex-ma", "local-swin", "lora"]
    assert not [
        path for folder in Run(done.out, recipe(*three_stages())).stages for path in checkpoints(folder.path)
    ]
    assert not [path for path in done.out.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


@pytest.mark.parametrize("kind", list(MODELS))
def test_a_finished_run_called_again_trains_nothing(whole, kind):
    again = run(whole[kind].out, kind, callbacks=[Kill("flex-ma", 1)])
    for name, parameter in weights(again.student).items():
        assert torch.equal(parameter, weights(whole[kind].student)[name]), name


def test_stages_train_what_they_say_and_leave_the_teacher_alone(whole):
    done = whole["llama"]
    first, second, third = (
        read_tensors(folder.result) for folder in Run(done.out, recipe(*three_stages())).stages
    )
    fresh = copy.deepcopy(MODELS["llama"]())
    original = weights(MODELS["llama"]())
    for name, parameter in done.teacher.model.named_parameters():
        assert torch.equal(parameter, original[name])
        assert not parameter.requires_grad
    assert first.keys() == second.keys()
    assert {name for name in third if ".mlp." in name} == third.keys() - second.keys()
    untouched = [n for n, p in weights(fresh).items() if "self_attn" not in n and ".mlp." not in n]
    for name in untouched:
        assert torch.equal(weights(done.student)[name], original[name]), name


@pytest.mark.parametrize("kind", list(MODELS))
def test_merged_lora_equals_unmerged(kind):
    model = MODELS[kind]()
    bridges.replace_attention(model, "mmate", text_window=4, window=(1, 2, 2), chunk_size=8)
    plan = Stage(**stage(lora={"targets": [r"layers\.\d+\.mlp\."], "rank": 2}))
    adapted = adapt(model, plan.lora, select(plan, model)).eval()
    assert isinstance(adapted, PeftModel)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    inputs = {k: v for k, v in batch(kind).items() if k != "labels"}
    with torch.no_grad(), adapted.disable_adapter():
        plain = adapted(**inputs).logits
    with torch.no_grad():
        unmerged = adapted(**inputs).logits
        merged = adapted.merge_and_unload()(**inputs).logits
    torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged, plain, rtol=1e-2, atol=1e-2)


def test_what_trains_is_fp32_and_the_rest_keeps_the_teachers_type():
    model = MODELS["llama"]().to(torch.bfloat16)
    bridges.replace_attention(model, "mmate")
    plan = Stage(**stage(lora=LoRA(targets=["up_proj"]).model_dump()))
    adapted = adapt(model, plan.lora, select(plan, model))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name
    assert adapted.get_base_model().model.embed_tokens.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", list(MODELS))
def test_frozen_weights_that_are_the_teachers_are_shared_and_those_that_train_are_not(kind):
    source = MODELS[kind]().requires_grad_(False)
    student = copy.deepcopy(source)
    bridges.replace_attention(student, "mmate", text_window=4, window=(1, 2, 2), chunk_size=8)
    changed, *others = (name for name in weights(student) if name.endswith("up_proj.weight"))
    student.get_parameter(changed).data += 1
    original, before = copy.deepcopy(weights(source)), copy.deepcopy(weights(student))
    plan = Stage(**stage(trainable=["mixers", r"layers\.0.*layernorm"], lora={"targets": ["down_proj"]}))
    selection = select(plan, student)
    share_frozen(student, source, selection)
    theirs = {p.data_ptr() for p in source.parameters()}
    shared = {name for name, p in student.named_parameters() if p.data_ptr() in theirs}
    assert any(name.endswith("embed_tokens.weight") for name in shared)
    assert all(any(n.endswith(f"layers.{i}.mlp.down_proj.weight") for n in shared) for i in (0, 1))
    assert changed not in shared
    assert shared >= set(others)
    assert not shared & selection.trained.keys()
    assert weights(student).keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in weights(student).items())
    assert all(torch.equal(p, original[name]) for name, p in weights(source).items())


def test_a_bf16_teacher_gives_a_bf16_student(tmp_path):
    source = teacher()
    source.model.to(torch.bfloat16)
    stages = three_stages()[1:]
    done = distill(recipe(*stages), tmp_path, teacher=source, task=Riddles(images=False), callbacks=QUIET)
    types = {name.rpartition(".")[2]: p.dtype for name, p in done.student.named_parameters()}
    assert types["A_log"] == torch.float32
    assert {dtype for name, dtype in types.items() if name not in ("A_log", "dt_bias")} == {torch.bfloat16}
    assert all(entry["loss"] > 0 for entry in done.history)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "student",
    [
        {"mixer": "mmate", "config": {"text_window": 4, "window": [1, 2, 2], "chunk_size": 8}},
        {"mixer": "sliding_window", "config": {"window": 4}},
    ],
    ids=lambda student: student["mixer"],
)
def test_all_of_a_student_is_where_its_teacher_is(tmp_path, monkeypatch, student):
    source, task = teacher(), Riddles(images=False)
    source.model.to(torch.bfloat16)
    monkeypatch.setattr("recipes.yardstick.load_task", lambda *_: task)
    stages = [stage(), stage(name="two", lora={"targets": ["up_proj"], "rank": 2})]
    judges = [{"task": "riddles", "measures": ["accuracy", "perplexity", "agreement"]}]
    plan = recipe(*stages, student=student, judged_by=judges)
    done = distill(plan, tmp_path, teacher=source, task=task, callbacks=QUIET)
    assert source.model.device.type == "cuda"
    for name, tensor in (*done.student.named_parameters(), *done.student.named_buffers()):
        assert tensor.device == source.model.device, name
    for name, parameter in weights(done.student).items():
        decay = name.endswith(("A_log", "dt_bias"))
        assert parameter.dtype == (torch.float32 if decay else torch.bfloat16), name
    found = report(plan, done.student, source)
    assert {row["measure"] for row in found.rows} == {"accuracy", "perplexity", "agreement"}
    assert [row["layer"] for row in found.layers] == [0, 1]


def test_a_refused_recipe_writes_nothing(tmp_path):
    for stages in (
        [stage(), stage(name="two", trainable=["nothing"])],
        [stage(lora={"targets": ["nothing"]})],
    ):
        with pytest.raises(PatternError):
            run(tmp_path / "run", stages=stages)
    assert not (tmp_path / "run").exists()


def test_a_converted_teacher_is_refused_and_nothing_is_written(tmp_path):
    source = teacher()
    bridges.replace_attention(source.model, "mmate")
    with pytest.raises(bridges.AlreadyConvertedError):
        distill(
            recipe(stage()), tmp_path / "run", teacher=source, task=Riddles(images=False), callbacks=QUIET
        )
    assert not (tmp_path / "run").exists()


def test_another_recipe_or_teacher_in_the_same_folder_is_refused(tmp_path):
    run(tmp_path, stages=[stage()])
    with pytest.raises(RunError, match=r"recipe\.stages\.0\.steps: 2 there, 3 here"):
        run(tmp_path, stages=[stage(steps=3)])
    other = teacher()
    with torch.no_grad():
        other.model.model.norm.weight[0] += 1
    with pytest.raises(RunError, match="another teacher"):
        distill(recipe(stage()), tmp_path, teacher=other, task=Riddles(images=False), callbacks=QUIET)
    with pytest.raises(RunError, match="holds a run already"):
        run(tmp_path, stages=[stage()], resume=False)


def test_a_run_begun_anew_may_have_another_recipe(tmp_path):
    run(tmp_path, stages=[stage(), stage(name="two", steps=1)])
    (tmp_path / "notes.txt").write_text("mine")
    again = run(tmp_path, stages=[stage(steps=1)], restart=True)
    assert {entry["stage"] for entry in again.history} == {"one"}
    assert [path.name for path in (tmp_path / "stages").iterdir()] == ["1-one"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_run_of_a_version_that_knew_fewer_settings_goes_on(tmp_path):
    done = run(tmp_path, stages=[stage(steps=1)])
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["recipe"]["stages"][0].pop("minutes") is None
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert run(tmp_path, stages=[stage(steps=1)]).history == done.history
    record["recipe"]["stages"][0]["of_tomorrow"] = 1
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=r"does not read.*of_tomorrow"):
        run(tmp_path, stages=[stage(steps=1)])


def test_a_run_goes_on_though_it_shall_be_judged_otherwise(tmp_path, whole):
    before, after = (
        recipe(*three_stages(), judged_by=judges) for judges in (["text"], [{"task": "recall", "limit": 5}])
    )
    task = Riddles(images=False)
    with pytest.raises(KeyboardInterrupt):
        distill(before, tmp_path, teacher=teacher(), task=task, callbacks=[Kill("local-swin", 3)])
    resumed = distill(after, tmp_path, teacher=teacher(), task=task, callbacks=QUIET)
    for name, parameter in weights(resumed.student).items():
        assert torch.equal(parameter, weights(whole["llama"].student)[name]), name
    assert json.loads((tmp_path / "run.json").read_text())["recipe"] == after.to_dict()


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_checkpoint_is_refused(tmp_path, file, damage):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stages=[stage(steps=4, save_every=2)], callbacks=[Kill("one", 3)])
    path = tmp_path / "stages" / "1-one" / "checkpoint-2" / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    ours, plan = teacher(), recipe(stage(steps=4, save_every=2))
    with pytest.raises(CheckpointError, match=file):
        distill(plan, tmp_path, teacher=ours, task=Riddles(images=False), callbacks=QUIET)
    assert path.parent.exists()
    assert not [module for module in ours.model.modules() if module._forward_hooks]


def test_a_damaged_or_missing_stage_result_is_refused(tmp_path):
    stages = [stage(), stage(name="two", steps=1)]
    run(tmp_path, stages=stages)
    result = Run(tmp_path, recipe(*stages)).stages[1].result
    result.write_bytes(result.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        run(tmp_path, stages=stages)
    Run(tmp_path, recipe(*stages)).stages[0].result.unlink()
    with pytest.raises(CheckpointError, match="is missing, though a later stage is done"):
        run(tmp_path, stages=stages)


def test_tokens_bound_no_batch_of_a_dataset_without_sizes(tmp_path):
    with pytest.raises(TaskError, match="does not know the sizes of its rows"):
        run(tmp_path / "run", stages=[stage(), stage(name="bounded", batch_tokens=100)])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [False, True])
def test_a_stage_trains_on_options_of_its_own(tmp_path, monkeypatch, given):
    def load(spec, config, tokenizer):
        return Riddles(images=False, **spec.options)

    monkeypatch.setattr("recipes.distill.load_task", load)
    one_row, usual = stage(steps=1, data={"items": 1}), stage(name="two", steps=1)
    plan = recipe(one_row, usual, data={"task": "riddles", "options": {"items": 20}})
    task = Riddles(images=False) if given else None
    done = distill(plan, tmp_path, teacher=teacher(), task=task, callbacks=QUIET)
    read = {entry["stage"]: entry["tokens"] for entry in done.history}
    alone = len(done.task.train[0]["prompt"]) + 3
    assert len(done.task.train) == 20
    assert (read["one"] == alone) != given
    assert read["two"] > alone
