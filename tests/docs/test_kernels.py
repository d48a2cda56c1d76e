"""The pages on kernels show what was measured, every bar, and what is missing."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from recipes.bench.bars import BARS, TOKENS, figures
from recipes.results import Results
from tests.docs.test_site import hooks as hooks

SPEED: dict[str, Any] = {"table": "speed", "op": "ssd", "dtype": "bfloat16", "tokens": TOKENS}
ROWS = [
    {"table": "machine", "dtype": "bfloat16", "copy_tb_per_second": 2.9, "matmul_tflops": 770.0},
    SPEED
    | {"by": "triton", "kind": "ours", "fwd_ms": 3.3, "bytes_ms": 0.8, "products_ms": 0.6, "error": 2e-3},
    SPEED | {"by": "mamba_ssm", "kind": "peer", "fwd_ms": 16.5},
    SPEED | {"by": "fla", "kind": "peer", "tokens": None, "note": "wrong by 0.3 relative RMS"},
    {
        "table": "check",
        "op": "ssd",
        "by": "triton",
        "dtype": "float32",
        "row": "one clip",
        "decay": "usual",
        "tokens": 300,
        "error": 1e-6,
        "gradient_error": 2e-6,
        "worst": "c",
        "right": True,
        "note": None,
    },
]


def test_what_is_not_measured_is_said_to_be_so(hooks: ModuleType, tmp_path: Path) -> None:
    assert "Not measured yet" in hooks.kernels_page(tmp_path)
    assert hooks.kernels_evidence(tmp_path).count("Not measured yet") == 2


def test_every_bar_is_shown_with_its_figure_and_verdict(hooks: ModuleType, tmp_path: Path) -> None:
    Results("linmu bench ops", figures(ROWS), ROWS, device="a chip").write(tmp_path / "ops_h100.json")
    page = hooks.kernels_page(tmp_path)
    assert all(f"`{bar.figure}`" in page for bar in BARS)
    line = next(line for line in page.splitlines() if "`ssd_fwd_ms`" in line)
    assert "≤ 3 | 2 | 3.3 | missed by 10%" in line
    assert "met" in next(line for line in page.splitlines() if "`ssd_fwd_speedup`" in line)
    assert "not measured" in next(line for line in page.splitlines() if "`mmate_fwd_ms`" in line)
    assert "wrong by 0.3 relative RMS" in page
    assert "`linmu bench ops` on a chip" in page
    assert "| ssd | triton | float32 | 1 | 0 | 1e-06 | 2e-06 | one clip" in hooks.kernels_evidence(tmp_path)


def test_what_was_tried_is_a_table_and_says_why_a_bar_is_missed(hooks: ModuleType, tmp_path: Path) -> None:
    Results("linmu bench ops", figures(ROWS), ROWS, device="a chip").write(tmp_path / "ops_h100.json")
    tried = [{"what": "larger chunks", "predicted": "10% less", "measured": "4% more", "kept": False}]
    Results("by hand", {"ssd_fwd_ms": "the states are written twice"}, tried).write(
        tmp_path / "ops_tried.json"
    )
    assert "| larger chunks | 10% less | 4% more | False |" in hooks.kernels_evidence(tmp_path)
    line = next(line for line in hooks.kernels_page(tmp_path).splitlines() if "`ssd_fwd_ms`" in line)
    assert line.endswith("missed by 10% | the states are written twice |")


def test_the_page_of_all_results_leaves_them_to_their_own(hooks: ModuleType, tmp_path: Path) -> None:
    Results("linmu bench ops", {}, ROWS).write(tmp_path / "ops_h100.json")
    Results("linmu bench ops", {}, [{"op": "ssd"}]).write(tmp_path / "ops_cpu.json")
    page = hooks.results_page(tmp_path)
    assert "ops_cpu" in page
    assert "ops_h100" not in page
