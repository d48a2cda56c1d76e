"""Trains the tiny vision-language model on easy-VQA from random weights.

    python -m recipes.tiny_vlm.train --out DIR

Prints one JSON object a line: progress, then the accuracy by generation on the whole official test split.
The folder is complete (config, weights, tokenizer) after every epoch and at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from recipes.data.easyvqa import EasyVQA
from recipes.data.task import Batch
from recipes.evaluate import evaluate
from recipes.tiny_vlm.build import build_model, build_tokenizer
from recipes.tiny_vlm.packing import Packer, attend_in_one_call, by_image


def train(
    model: PreTrainedModel,
    loader: DataLoader[Batch],
    *,
    epochs: float,
    seconds: float,
    learning_rate: float,
    weight_decay: float,
) -> Iterator[dict[str, float | Tensor]]:
    """AdamW with a warm-up of 3% and a cosine decay to 0 over `epochs` or `seconds`, whichever ends first.

    Yields:
        The state after every step: `step`, `epoch` (fractional), `loss`, `learning_rate`, `seconds`.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    start, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        for batch in loader:
            model.train()
            rate = learning_rate * min(done / 0.03 + 0.01, 1) * 0.5 * (1 + math.cos(math.pi * done))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss: Tensor = model(**_to(batch, model.device)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            epoch, elapsed = step / len(loader), time.monotonic() - start
            done = max(epoch / epochs, elapsed / seconds)
            yield {
                "step": step,
                "epoch": epoch,
                "loss": loss.detach(),
                "learning_rate": rate,
                "seconds": elapsed,
            }
            if done >= 1:
                return


def _to(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, saves and evaluates; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--epochs", type=float, default=40.0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop here if the epochs take longer")
    parser.add_argument("--batch-size", type=int, default=32, help="images a step, with all their questions")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches")
    parser.add_argument(
        "--questions", type=int, default=None, help="test questions to judge by (default: all)"
    )
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).to(options.device)
    task = EasyVQA(model.config, tokenizer)
    attend_in_one_call(model)
    images: Any = by_image(task.train)  # a list is a map-style dataset, but not to torch's type hints
    loader: DataLoader[Batch] = DataLoader(
        images,
        options.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=Packer(model, task),
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
    )

    def save() -> None:
        model.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)

    state: dict[str, float | Tensor] = {}
    for state in train(
        model,
        loader,
        epochs=options.epochs,
        seconds=options.seconds,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
    ):
        if state["step"] % 50 == 0:
            print(json.dumps({key: round(float(value), 6) for key, value in state.items()}), flush=True)
        if state["step"] % len(loader) == 0:
            save()
    save()

    evaluation = evaluate(model, task, limit=options.questions, batch_size=256)
    result = {
        "accuracy": evaluation.accuracy,
        "questions": evaluation.questions,
        "epochs": round(float(state["epoch"]), 3),
        "seconds": round(float(state["seconds"]), 1),
        "parameters": model.num_parameters(),
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else model.device.type,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
