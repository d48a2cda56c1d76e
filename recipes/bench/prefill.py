"""Prefill: time and peak memory of whole models at growing lengths, side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from recipes.bench.inputs import Inputs
from recipes.bench.measure import matmul_rate, median_seconds, peak_bytes

LINEAR_OPS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)


def prefill(
    models: Mapping[str, PreTrainedModel],
    inputs: Inputs,
    lengths: Sequence[int],
    *,
    repeats: int = 3,
    max_seconds: float = math.inf,
    progress: Callable[[str, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure one forward over a prompt that gives the logits of its last token, without a cache.

    Vision tower included, as a user waits for it too. The run that measures memory is the warm-up. All models
    run at one length before the next length, so that a drift of the machine meets them alike.

    Args:
        models: Name → model. Each is put into eval mode.
        inputs: Builds the prompt.
        lengths: Tokens wanted, rising.
        repeats: Timed runs, of which the median counts.
        max_seconds: A model leaves out a length, and all after it, where one run would take longer than this
            by the growth seen so far.
        progress: Told (model, tokens) before each measurement.

    Returns:
        A row a length and model: ``tokens`` (of the prompt), ``model``, ``seconds`` and ``peak_mib`` (above
        the weights and inputs), both None where left out, and ``floor_seconds``: the FLOPs of the model's
        linear layers and convolutions at the rate of a large matmul, measured here. No token mixer, however
        cheap, brings a prefill below it.
    """
    rows: list[dict[str, Any]] = []
    seen: dict[str, list[tuple[int, float]]] = {name: [] for name in models}
    flops_per_token: dict[str, float] = {}
    stopped: set[str] = set()
    devices = {model.device: model.dtype for model in models.values()}
    rates = {device: matmul_rate(dtype, device) for device, dtype in devices.items()}
    for length in lengths:
        for name, model in models.items():
            model.eval()
            batch = {key: tensor.to(model.device) for key, tensor in inputs(length).items()}
            tokens = batch["input_ids"].shape[1]

            def run(model: PreTrainedModel = model, batch: Mapping[str, Any] = batch) -> None:
                with torch.no_grad():
                    model(**batch, use_cache=False, logits_to_keep=1)

            if name not in flops_per_token:
                flops_per_token[name] = _linear_flops(run) / tokens
            if expected_seconds(seen[name], tokens) > max_seconds:
                stopped.add(name)
            seconds = peak = None
            if name not in stopped:
                if progress is not None:
                    progress(name, tokens)
                peak = peak_bytes(run, model.device)
                seconds = median_seconds(run, model.device, warmup=0, repeats=repeats)
                seen[name].append((tokens, seconds))
            rows.append(
                {
                    "tokens": tokens,
                    "model": name,
                    "seconds": seconds,
                    "peak_mib": None if peak is None else peak / 2**20,
                    "floor_seconds": flops_per_token[name] * tokens / rates[model.device],
                }
            )
    return rows


def expected_seconds(seen: Sequence[tuple[int, float]], tokens: int) -> float:
    """Extrapolate a power law through the last two (tokens, seconds), between linear and quadratic.

    Linear from one point; 0 from none.
    """
    if not seen:
        return 0.0
    last_tokens, last = seen[-1]
    exponent = 1.0
    if len(seen) > 1:
        before_tokens, before = seen[-2]
        exponent = math.log(last / before) / math.log(last_tokens / before_tokens)
    return last * (tokens / last_tokens) ** min(max(exponent, 1.0), 2.0)


def side_by_side(rows: Sequence[Mapping[str, Any]], value: str) -> dict[int, dict[str, Any]]:
    """Turn rows into tokens → model → one of their values."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row["tokens"], {})[row["model"]] = row[value]
    return found


def _linear_flops(run: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for op, count in counts.items() if op in LINEAR_OPS)
