"""Decode: time per new token and size of the state at growing context, side by side."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.generation import BaseStreamer

from recipes.bench.inputs import Inputs


def decode(
    models: Mapping[str, PreTrainedModel],
    inputs: Inputs,
    lengths: Sequence[int],
    *,
    new_tokens: int = 16,
    progress: Callable[[str, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure greedy ``generate()`` after prompts of growing length.

    Args:
        models: Name → model. Each is put into eval mode.
        inputs: Builds the prompt.
        lengths: Tokens wanted of it. The longest is prefilled even where that takes long.
        new_tokens: Tokens generated after each; the end token does not stop it.
        progress: Told (model, tokens) before each measurement.

    Returns:
        A row a length and model: ``tokens`` (of the prompt), ``model``, ``ms_per_token`` (median over the new
        tokens but the first, which is the prefill's) and ``state_mib``, what the cache holds at the end.
    """
    rows = []
    for length, (name, model) in itertools.product(lengths, models.items()):
        model.eval()
        batch = {key: tensor.to(model.device) for key, tensor in inputs(length).items()}
        tokens = batch["input_ids"].shape[1]
        if progress is not None:
            progress(name, tokens)
        clock = _Clock()
        output = model.generate(  # type: ignore[operator]
            **batch,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            streamer=clock,
            return_dict_in_generate=True,
        )
        rows.append(
            {
                "tokens": tokens,
                "model": name,
                "ms_per_token": 1000 * statistics.median(clock.between_tokens()),
                "state_mib": cache_bytes(output.past_key_values) / 2**20,
            }
        )
    return rows


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of all tensors that the layers of a cache hold, each storage once."""
    storages: dict[int, int] = {}
    for layer in cache.layers:
        for held in vars(layer).values():
            for tensor in held.values() if isinstance(held, dict) else (held,):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class _Clock(BaseStreamer):
    """Notes when each token arrives on the host, which waits for the device."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []

    def put(self, value: Tensor) -> None:
        self.arrivals.append(time.perf_counter())

    def end(self) -> None:
        pass

    def between_tokens(self) -> list[float]:
        """Seconds between new tokens; the first arrival is the prompt, the second the prefill's token."""
        return [after - before for before, after in itertools.pairwise(self.arrivals[1:])]
