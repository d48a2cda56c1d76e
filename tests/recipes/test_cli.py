"""The command: it teaches, its exit codes are clear, and bad input changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

import bridges
from recipes.bench import commands
from recipes.bench.ops import CASES
from recipes.cli import app
from recipes.results import Results
from recipes.terminal import exit_code
from recipes.tiny_vlm import load
from tests.recipes.toys import stage

COMMANDS = [
    ["demo"],
    ["convert"],
    ["distill"],
    ["evaluate"],
    ["explain"],
    ["doctor"],
    ["data"],
    ["data", "fetch"],
    ["bench"],
    ["bench", "prefill"],
    ["bench", "decode"],
    ["bench", "ops"],
    ["bench", "recovery"],
]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that are no folder are looked for on the hub; not in a test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def linmu(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def stderr(result: Result) -> str:
    return " ".join(result.stderr.split())


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
def test_every_command_explains_itself_and_its_exit_codes(command: list[str]) -> None:
    result = linmu(*command, "--help")
    assert result.exit_code == 0
    assert "Usage: linmu" in result.output
    assert "Exit codes" in result.output


def test_help_and_version_do_without_torch() -> None:
    code = (
        "import sys, recipes.cli; sys.exit(bool({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    result = linmu("--version")
    assert result.exit_code == 0
    assert result.output.startswith("linmu ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convrt"], "No such command"),
        (["convert", "tiny-vlm"], "Missing argument"),
        (["evaluate", "tiny-vlm", "--limit", 0], "--limit"),
        (["explain", "linmu-tiny-vml"], "Did you mean 'linmu-tiny-vlm'"),
        (["distill", "linmu-tiny-vml", "--out", "OUT"], "Did you mean 'linmu-tiny-vlm'"),
        (["evaluate", "tiny-vlm", "--task", "easy-vaq"], "Did you mean 'easy-vqa'"),
        (["evaluate", "tiny-vml"], "Did you mean 'tiny-vlm'"),
        (["evaluate", "runs/none", "--report", "OUT"], "holds no run"),
        (["evaluate", "tiny-vlm", "--report", "OUT", "--task", "recall"], "--task cannot go with --report"),
        (["evaluate", "tiny-vlm", "--report", "OUT", "--limit", 0], "--limit"),
        (["convert", "tiny-vlm", "OUT", "--mixer", "mmat"], "Did you mean 'mmate'"),
        (["convert", "tiny-vlm", "OUT", "--set", "text_windw=3"], "Did you mean 'text_window'"),
        (["convert", "tiny-vlm", "OUT", "--set", "text_window"], "KEY=VALUE"),
        (["convert", "tiny-vlm", "OUT", "--set", "text_window=["], "not YAML"),
        (["convert", "tiny-vlm", "OUT", "--layers", "7"], "7"),
        (["convert", "tiny-vlm", "OUT", "--dtype", "int8"], "int8"),
        (["bench", "ops", "sdd"], "Did you mean 'ssd'"),
        (["bench", "ops", "--dtype", "float12"], "float12"),
        (["bench", "prefill", "--lengths", "2k,1k"], "rise"),
        (["bench", "decode", "--lengths", "long"], "long"),
    ],
    ids=str,
)
def test_bad_input_exits_with_2_in_one_line_and_writes_nothing(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = linmu(*arguments)
    assert result.exit_code == 2
    assert said in stderr(result)
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_debug_gives_the_error_itself() -> None:
    result = linmu("--debug", "explain", "nothing")
    assert type(result.exception).__name__ == "UnknownRecipeError"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (bridges.LayerPatternError("x"), 2),
        (bridges.CacheError("x"), 1),
        (FileNotFoundError("x"), 2),
        (OSError(28, "No space left on device"), 1),
        (ZeroDivisionError("x"), 1),
    ],
    ids=repr,
)
def test_what_the_input_is_to_blame_for_exits_with_2(error: Exception, code: int) -> None:
    assert exit_code(error) == code


def test_an_unexpected_error_exits_with_1_and_says_how_to_see_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridges, "plan", lambda *_, **__: 1 / 0)
    result = linmu("convert", "tiny-vlm", "x", "--dry-run")
    assert result.exit_code == 1
    assert "ZeroDivisionError" in stderr(result)
    assert "--debug" in stderr(result)


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    result = linmu("convert", "tiny-vlm", tmp_path / "out", "--layers", "0,2", "--dry-run")
    assert result.exit_code == 0
    assert "mmate" in result.output
    assert "2 layers converted" in result.output
    assert list(tmp_path.iterdir()) == []


def test_convert_saves_what_replace_attention_makes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = linmu("convert", "tiny-vlm", out, "--mixer", "attention", "--layers", "1")
    assert result.exit_code == 0
    teacher, tokenizer = load()
    student = bridges.load_pretrained(out)
    assert isinstance(bridges.attention_layers(student)[1], bridges.MixerAttention)
    ids = tokenizer("what is the shape?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.allclose(teacher(ids).logits, student(ids).logits, rtol=1e-5, atol=1e-5)

    before = {path.name: path.read_bytes() for path in out.iterdir()}
    refused = linmu("convert", "tiny-vlm", out)
    assert refused.exit_code == 2
    assert "--force" in stderr(refused)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "notes.txt").write_text("mine")
    assert linmu("convert", "tiny-vlm", out, "--force", "--dtype", "bfloat16").exit_code == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert bridges.load_pretrained(out).dtype == torch.bfloat16

    again = linmu("convert", out, tmp_path / "twice")
    assert again.exit_code == 2
    assert "converted already" in stderr(again)


def test_evaluate_writes_the_results_and_the_picture(tmp_path: Path) -> None:
    results, picture = tmp_path / "r.json", tmp_path / "r.png"
    result = linmu(
        *("evaluate", "tiny-vlm", "--limit", 30, "--perplexity", "--json", results, "--plot", picture)
    )
    assert result.exit_code == 0
    written = Results.read(results)
    assert written.figures["questions"] == 30
    assert written.figures["accuracy"] >= 0.9
    assert 1 <= written.figures["perplexity"] < 1.5
    assert sum(row["questions"] for row in written.rows) == 30
    assert written.command.startswith("linmu evaluate tiny-vlm --limit 30")
    assert picture.exists()


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert linmu("convert", "tiny-vlm", out).exit_code == 0
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    result = linmu("evaluate", out, "--limit", 1)
    assert result.exit_code == 2
    assert "truncated" in stderr(result)


def test_explain_lists_the_library_and_counts_what_trains() -> None:
    listed = linmu("explain")
    assert listed.exit_code == 0
    assert "linmu-tiny-vlm" in listed.output
    explained = linmu("explain", "linmu-tiny-vlm")
    assert explained.exit_code == 0
    assert "flex-ma" in explained.output


@pytest.fixture
def small_recipe(tmp_path: Path) -> Path:
    """Two stages of two steps on the shipped model."""
    path = tmp_path / "small.yaml"
    stages = [
        stage(name="first", losses={"hidden_states": 1.0}, save_every=1),
        stage(name="second", losses={"task": 1.0}),
    ]
    fields = {
        "name": "small",
        "teacher": "tiny-vlm",
        "student": "mmate",
        "data": "easy-vqa",
        "stages": stages,
    }
    path.write_text(yaml.safe_dump(fields))
    return path


def test_distill_trains_resumes_and_restarts(tmp_path: Path, small_recipe: Path) -> None:
    run, results, picture = tmp_path / "run", tmp_path / "r.json", tmp_path / "r.png"
    command = ("distill", small_recipe, "--out", run)
    first = linmu(*command, "--json", results, "--plot", picture)
    assert first.exit_code == 0
    figures = Results.read(results).figures
    assert {"first_hidden_states_first", "first_hidden_states_last", "second_task_last"} <= set(figures)
    assert picture.exists()
    assert linmu("evaluate", run / "student", "--limit", 5).exit_code == 0

    made = (run / "stages" / "1-first" / "result.safetensors").stat().st_mtime_ns
    assert linmu(*command).exit_code == 0
    assert (run / "stages" / "1-first" / "result.safetensors").stat().st_mtime_ns == made
    (run / "notes.txt").write_text("mine")
    assert linmu(*command, "--restart").exit_code == 0
    assert (run / "stages" / "1-first" / "result.safetensors").stat().st_mtime_ns != made
    assert (run / "notes.txt").read_text() == "mine"


def test_a_finished_run_is_reported_and_an_unfinished_one_is_not(tmp_path: Path, small_recipe: Path) -> None:
    judges = [{"task": "easy-vqa", "measures": ["accuracy", "perplexity"], "limit": 3, "batch_size": 3}]
    small_recipe.write_text(small_recipe.read_text() + yaml.safe_dump({"judged_by": judges}))
    run, report = tmp_path / "run", tmp_path / "report"
    assert linmu("distill", small_recipe, "--out", run).exit_code == 0
    result = linmu("evaluate", run, "--report", report, "--limit", 2, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert {path.name for path in report.iterdir()} == {"report.json", "report.md", "report.png"}
    written = Results.read(report / "report.json")
    assert {"easy-vqa_ppl_ratio", "minutes", "tokens"} <= written.figures.keys()
    whole = [row for row in written.rows if row.get("group") == "all"]
    assert [row["measure"] for row in whole] == ["accuracy", "perplexity"]
    assert whole[0]["count"] == 2
    assert {row["table"] for row in written.rows} == {"scores", "layers", "history"}
    assert written.command.startswith("linmu evaluate")

    (run / "stages" / "2-second" / "result.safetensors").unlink()
    refused = linmu("evaluate", run, "--report", tmp_path / "other")
    assert refused.exit_code == 2
    assert "second" in stderr(refused)
    assert not (tmp_path / "other").exists()


def test_a_restart_with_a_bad_recipe_keeps_the_run(tmp_path: Path, small_recipe: Path) -> None:
    run = tmp_path / "run"
    assert linmu("distill", small_recipe, "--out", run).exit_code == 0
    small_recipe.write_text(small_recipe.read_text().replace("- mixers", "- mixrs"))
    assert linmu("distill", small_recipe, "--out", run, "--restart").exit_code == 2
    assert (run / "student" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [({"batch_tokens": 100}, "does not know the sizes"), ({"data": {"nothing": 7}}, "no option 'nothing'")],
)
def test_what_a_stages_data_refuses_is_found_before_a_run_is_touched(
    tmp_path: Path, small_recipe: Path, change: dict[str, Any], words: str
) -> None:
    run = tmp_path / "run"
    assert linmu("distill", small_recipe, "--out", run).exit_code == 0
    fields = yaml.safe_load(small_recipe.read_text())
    fields["stages"][1] |= change
    small_recipe.write_text(yaml.safe_dump(fields))
    refused = linmu("distill", small_recipe, "--out", run, "--restart")
    assert refused.exit_code == 2
    assert words in " ".join(stderr(refused).split())
    assert (run / "student" / "model.safetensors").exists()


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_bench_puts_teacher_and_student_side_by_side(kind: str, tmp_path: Path) -> None:
    results, picture = tmp_path / "r.json", tmp_path / "r.png"
    result = linmu("bench", kind, "tiny-vlm", "--lengths", "64,128", "--json", results, "--plot", picture)
    assert result.exit_code == 0
    rows = Results.read(results).rows
    assert [row["model"] for row in rows] == ["teacher", "student"] * 2
    assert picture.exists()


def test_bench_ops_gives_no_speed_of_a_wrong_op(tmp_path: Path) -> None:
    results = tmp_path / "r.json"
    good = linmu("bench", "ops", "short_conv", "--lengths", "96,160", "--json", results)
    assert good.exit_code == 0
    assert set(Results.read(results).figures) == {"short_conv_growth"}
    results.unlink()
    op = CASES["short_conv"].op
    op.backend("broken")(lambda x, *args, **kwargs: x)
    try:
        bad = linmu("bench", "ops", "short_conv", "--lengths", "96,160", "--json", results)
    finally:
        del op.backends["broken"]
    assert bad.exit_code == 1
    assert "no speed is reported" in stderr(bad)
    assert json.dumps(bad.stdout).count("ms") == 0
    assert not results.exists()


def test_doctor_exits_with_1_where_something_required_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert linmu("doctor").exit_code == 0
    monkeypatch.setattr("recipes.doctor.REQUIRED", ("no_such_package",))
    broken = linmu("doctor")
    assert broken.exit_code == 1
    assert "no_such_package" in stderr(broken)


def test_lengths_are_read_in_units_of_1024() -> None:
    assert commands.parse_lengths("100,1k,16K") == [100, 1024, 16384]
