"""Prefill and decode: the rows say what was run, lengths that would take too long are left out."""

from __future__ import annotations

import copy
import math

import pytest

import bridges
from recipes.bench.decode import decode
from recipes.bench.inputs import random_text
from recipes.bench.prefill import expected_seconds, prefill, side_by_side
from recipes.tiny_vlm.build import build_model, build_tokenizer
from tests.recipes.toys import llama


@pytest.fixture(scope="module")
def pair() -> dict:
    teacher = llama(max_position_embeddings=4096)
    student = copy.deepcopy(teacher)
    bridges.replace_attention(student, "mmate", text_window=8)
    return {"teacher": teacher, "student": student}


def test_prefill_measures_every_model_at_every_length(pair: dict) -> None:
    told: list[tuple[str, int]] = []
    rows = prefill(pair, random_text(64), [32, 64], repeats=1, progress=lambda *now: told.append(now))
    assert [(row["model"], row["tokens"]) for row in rows] == told
    assert told == [("teacher", 32), ("student", 32), ("teacher", 64), ("student", 64)]
    assert all(row["seconds"] > 0 and row["peak_mib"] > 0 and row["floor_seconds"] > 0 for row in rows)
    assert set(side_by_side(rows, "seconds")) == {32, 64}


def test_the_floor_is_that_of_the_linear_layers(pair: dict) -> None:
    teacher = pair["teacher"]
    rows = prefill({"teacher": teacher}, random_text(64), [32, 64], repeats=1)
    per_token = sum(p.numel() for n, p in teacher.named_parameters() if "proj" in n) * 2
    last_logits = 2 * teacher.lm_head.weight.numel() / 32
    first, second = (row["floor_seconds"] for row in rows)
    assert math.isclose(second, 2 * first)
    # Both floors are at one rate, so the rate drops out of a comparison with a known count.
    wider = copy.deepcopy(teacher)
    wider.lm_head.weight.data = wider.lm_head.weight.data.repeat(2, 1)
    both = prefill({"a": teacher, "b": wider}, random_text(64), [32], repeats=1)
    ratio = both[1]["floor_seconds"] / both[0]["floor_seconds"]
    assert math.isclose(ratio, (per_token + 2 * last_logits) / (per_token + last_logits), rel_tol=1e-6)


def test_lengths_that_would_take_too_long_are_left_out(pair: dict) -> None:
    rows = prefill({"teacher": pair["teacher"]}, random_text(64), [16, 32, 64], repeats=1, max_seconds=0.0)
    assert [row["seconds"] is None for row in rows] == [False, True, True]
    assert [row["tokens"] for row in rows] == [16, 32, 64]
    assert rows[2]["peak_mib"] is None


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ([], 0.0),
        ([(10, 2.0)], 8.0),
        ([(10, 1.0), (20, 4.0)], 16.0),
        ([(10, 1.0), (20, 2.0)], 4.0),
        ([(10, 1.0), (20, 1.0)], 2.0),
        ([(10, 1.0), (20, 100.0)], 400.0),
    ],
)
def test_time_is_extrapolated_between_linear_and_quadratic(seen: list, expected: float) -> None:
    assert expected_seconds(seen, 40) == pytest.approx(expected)


def test_the_state_grows_with_the_teacher_and_not_with_the_student(pair: dict) -> None:
    rows = decode(pair, random_text(64), [32, 256], new_tokens=3)
    state = side_by_side(rows, "state_mib")
    assert state[32]["student"] == state[256]["student"] > 0
    assert state[256]["teacher"] > 4 * state[32]["teacher"]
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values of 2 layers, 2 KV heads of width 8, fp32
    assert state[256]["teacher"] * 2**20 == pytest.approx((256 + 2) * per_token)
    assert all(row["ms_per_token"] > 0 for row in rows)


def test_a_model_that_sees_gets_slideshows_and_another_gets_text() -> None:
    pytest.importorskip("easy_vqa")
    from recipes.bench.inputs import inputs_for

    tokenizer = build_tokenizer()
    assert "pixel_values_videos" in inputs_for(build_model(tokenizer), tokenizer)(128)
    text = inputs_for(llama(), tokenizer)
    assert text(100)["input_ids"].shape == (1, 100)
    assert (text(100)["input_ids"] == text(100)["input_ids"]).all()
