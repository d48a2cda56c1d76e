"""Every family under everything that a converted model must do; ``--families FILE`` writes the table.

pytest tests/bridges/test_families.py --families docs/results/families.json
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bridges
from recipes.results import Results
from tests.bridges import models, vlms
from tests.bridges.models import generated
from tests.bridges.test_masks import largest
from tests.helpers import relative_rms

SPEC = {"mixer": "mmate", "text_window": 6, "window": (2, 2, 2), "chunk_size": 8}
LONG = 4096
FAMILIES = list(dict.fromkeys([*models.FAMILIES, *vlms.VLMS]))
REFUSALS = {("paligemma", "identity_max_rel")}
"""What is refused, with its reason in the table."""


def source(family: str) -> Any:
    return vlms if family in vlms.VLMS else models


def student(family: str) -> Any:
    return models.converted(source(family).teacher(family), {"*": SPEC})


def alike(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(one[0], other[0]) and relative_rms(one[1], other[1]) <= 1e-5


def identity(family: str, folder: Path) -> float:
    """The mixer ``attention`` in all layers: logits of the batch, and of 8 tokens generated from it."""
    teacher, inputs = source(family).teacher(family), source(family).batch(family)
    twin = models.converted(teacher, "attention", stirred=False)
    whole = [models.at_tokens(models.logits(model, inputs), inputs) for model in (teacher, twin)]
    steps = [generated(model, inputs, 8)[1] for model in (teacher, twin)]
    return max(relative_rms(*whole), relative_rms(*steps))


def generate(family: str, folder: Path) -> bool:
    """With a cache as without, over 64 greedy tokens."""
    model, inputs = student(family), source(family).batch(family)
    return alike(generated(model, inputs, 64, use_cache=False), generated(model, inputs, 64))


def left_padding(family: str, folder: Path) -> bool:
    """A row in a padded batch as alone."""
    model = student(family)
    tokens, logits = generated(model, source(family).batch(family), 8)
    rows = [generated(model, source(family).row_of(family, row), 8) for row in range(len(tokens))]
    return all(alike((row[0][0], row[1][:, 0]), (tokens[i], logits[:, i])) for i, row in enumerate(rows))


def beams(family: str, folder: Path) -> bool:
    """Three beams with a cache as without."""
    model, inputs = student(family), source(family).batch(family)
    settings = {"num_beams": 3, "num_return_sequences": 2}
    plain = models.generate(model, inputs, use_cache=False, **settings)
    return torch.equal(plain, models.generate(model, inputs, **settings))


def chunked_prefill(family: str, folder: Path) -> bool:
    """A prompt of text in parts of 5 tokens as whole."""
    model, inputs = student(family), models.text_batch()
    return alike(generated(model, inputs, 8), generated(model, inputs, 8, prefill_chunk_size=5))


def save_load(family: str, folder: Path) -> bool:
    """What is loaded has the weights that were saved, bit for bit, and gives their logits."""
    model, inputs = student(family), source(family).batch(family)
    model.save_pretrained(folder / family)
    again = bridges.load_pretrained(folder / family)
    weights = again.state_dict()
    same = all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    return same and relative_rms(models.logits(model, inputs), models.logits(again, inputs)) <= 1e-6


def gradients(family: str, folder: Path) -> bool:
    """A loss reaches every weight of the mixers, but the backward scan's where there is text alone."""
    model, inputs = student(family).train(), source(family).batch(family)
    model(**inputs, labels=models.labels(inputs)).loss.backward()
    parameters = {n: p for n, p in model.named_parameters() if ".mixer." in n}
    if family not in vlms.VLMS:
        parameters = {n: p for n, p in parameters.items() if "backward_decay" not in n}
    found = [p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in parameters.values()]
    return bool(found) and all(found)


def no_pairs(family: str, folder: Path) -> bool:
    """Generation from 4,096 padded tokens makes no tensor of N × N bytes."""
    makers = {**models.FAMILIES, **vlms.VLMS}
    teacher = makers[family](**({"n_positions": 2 * LONG} if family == "gpt2" else {}))
    model = models.converted(teacher, {"*": SPEC})
    with largest() as seen:
        models.generate(model, models.text_batch(rows=1, length=LONG, pads=(100,)), 2)
    return seen.bytes < LONG**2


CAPABILITIES: dict[str, Callable[[str, Path], bool | float]] = {
    "identity_max_rel": identity,
    "generate": generate,
    "left_padding": left_padding,
    "beams": beams,
    "chunked_prefill": chunked_prefill,
    "save_load": save_load,
    "gradients": gradients,
    "no_pairs": no_pairs,
}


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[dict[str, dict[str, Any]]]:
    rows: dict[str, dict[str, Any]] = {family: {"family": family} for family in FAMILIES}
    yield rows
    whole = [row for row in rows.values() if len(row) == 1 + len(CAPABILITIES)]
    if (path := request.config.getoption("--families")) and whole:
        identities = [row["identity_max_rel"] for row in whole if isinstance(row["identity_max_rel"], float)]
        figures = {"families": len(whole), "identity_max_rel": max(identities)}
        Results(f"pytest tests/bridges/test_families.py --families {path}", figures, whole).write(path)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str, capability: str, tmp_path: Path, table: dict[str, dict[str, Any]]) -> None:
    try:
        found: bool | float | str = CAPABILITIES[capability](family, tmp_path)
    except bridges.BridgeError as refusal:
        found = str(refusal).split(". ")[0]
    table[family][capability] = found
    if isinstance(found, str):
        assert (family, capability) in REFUSALS or "needs transformers" in found, found
    elif capability == "identity_max_rel":
        assert found <= 1e-5
    else:
        assert found is True
