"""`linmu bench ops` and `linmu bench check`: what they write, add to, refuse and exit with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from recipes.bench.cases import CASES
from recipes.cli import app
from recipes.results import Results

OPS = ("bench", "ops", "short_conv", "--device", "cpu")
CHECK = ("bench", "check", "short_conv", "--device", "cpu", "--lengths", "80", "--dtype", "float32")


def linmu(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def tables(path: Path) -> list[str]:
    return [row["table"] for row in Results.read(path).rows]


def test_a_bench_writes_machine_speed_and_figures_and_draws_them(tmp_path: Path) -> None:
    file, picture = tmp_path / "o.json", tmp_path / "o.png"
    found = linmu(
        *OPS, "--lengths", "96,160", "--repeats", 1, "--backward", "--json", file, "--plot", picture
    )
    assert found.exit_code == 0, found.output
    rows = Results.read(file).rows
    assert rows[0]["table"] == "machine"
    assert rows[0]["matmul_tflops"] > 0
    assert [row["tokens"] for row in rows if row.get("by") == "reference"] == [96, 160]
    assert all(row["fwd_bwd_ms"] > 0 for row in rows if row.get("by") == "reference")
    assert "short_conv_growth" in Results.read(file).figures
    assert "torch conv1d" in found.output
    assert picture.exists()


def test_rows_are_added_and_figures_are_of_all(tmp_path: Path) -> None:
    file = tmp_path / "o.json"
    assert linmu(*OPS, "--lengths", "96", "--repeats", 1, "--peers-to", 0, "--json", file).exit_code == 0
    assert tables(file) == ["machine", "speed"]
    assert linmu(*CHECK, "--json", file, "--add").exit_code == 0
    assert set(tables(file)) == {"machine", "speed", "check"}
    results = Results.read(file)
    assert results.figures["max_rel_rms_fp32"] < 1e-5
    assert results.command.count(" && ") == 1
    longer = linmu(*OPS, "--lengths", "160", "--repeats", 1, "--peers-to", 0, "--json", file, "--add")
    assert longer.exit_code == 0
    assert [row["tokens"] for row in Results.read(file).rows if row["table"] == "speed"] == [96, 160]
    assert "short_conv_growth" in Results.read(file).figures


def test_a_failed_check_is_in_the_table_and_in_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, file = CASES["short_conv"].op, tmp_path / "c.json"
    reference = op.backends["reference"]

    def off(*args: Any, **kwargs: Any) -> Any:
        return 1.01 * reference.run(*args, **kwargs)

    monkeypatch.setitem(op.backends, "off", dataclasses.replace(reference, name="off", run=off))
    found = linmu(*CHECK, "--backend", "off", "--json", file)
    assert found.exit_code == 1
    assert "checks failed" in found.stderr
    assert not any(row["right"] for row in Results.read(file).rows)
    assert Results.read(file).figures["max_rel_rms_fp32"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*OPS, "--shapes", "8b"), "--shapes must be one of small, 7b"),
        ((*OPS, "--dtype", "float12"), "float12"),
        (("bench", "check", "windos"), "Did you mean 'windows'"),
        ((*CHECK[:-1], "float32,int8"), "int8"),
        ((*OPS, "--lengths", "20"), "does not fit a row of 20"),
    ],
)
def test_bad_usage_is_said_before_anything_runs(arguments: tuple, said: str, tmp_path: Path) -> None:
    file = tmp_path / "o.json"
    found = linmu(*arguments, "--json", file)
    assert found.exit_code == 2
    assert said in " ".join(found.stderr.split())
    assert not file.exists()
