"""A start for the projector: what it makes of a picture lies where the name of the picture lies among the words.

Without it a decoder sees noise at first, and must be led from there to the names of hundreds of things by its answers
alone. With it names are known before the first answer. Only the projector runs, on features that were made once, so
it takes seconds on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from recipes.data.task import Item
from recipes.data.visual import VisualTask

RATE, WEIGHT_DECAY = 2e-3, 0.05
TEMPERATURE = 0.05
DISTANCE = 0.1
"""Weight of the squared distance from the name, beside the choice among names."""


def pretrain_projector(
    model: PreTrainedModel,
    task: VisualTask,
    items: Sequence[Item],
    *,
    steps: int = 1000,
    batch_size: int = 4096,
    workers: int = 0,
    seed: int = 0,
) -> list[float]:
    """Teach the projector of a mini VLM to put each vision token near the embedding of what its picture shows.

    A name's place is the mean embedding of its tokens. Each vision token is to tell it from all other names by
    cosine (cross-entropy at temperature 0.05), and to lie near it, so that lengths are those of words too.

    Args:
        model: ``MiniVLMForConditionalGeneration``; its projector is trained in place.
        task: The dataset, to draw the items.
        items: On one image each, with its name as ``"answer"``.
        steps: Of AdamW, the learning rate falling on a cosine.
        batch_size: Vision tokens of a step.
        workers: Processes that draw.
        seed: Of the tokens' order.

    Returns:
        The loss of each step.
    """
    tower: Any = model.model.visual
    if not items:
        return []
    names = {name: number for number, name in enumerate(dict.fromkeys(item["answer"] for item in items))}
    places = _places(model, task, list(names))
    features, owners = _features(model, task, items, workers)
    numbers = torch.tensor([names[item["answer"]] for item in items], device=features.device)[owners]
    middle = places.mean(0)
    directions = F.normalize(places - middle, dim=1)
    projector = tower.projector
    dtype = next(projector.parameters()).dtype
    projector.float().requires_grad_(True)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        drawn = torch.randint(len(features), (batch_size,), generator=generator).to(features.device)
        tokens, wanted = projector(features[drawn].float()), numbers[drawn]
        cosines = F.normalize(tokens - middle, dim=1) @ directions.T
        distance = (tokens - places[wanted]).square().sum(1).mean()
        loss = F.cross_entropy(cosines / TEMPERATURE, wanted) + DISTANCE * distance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    projector.to(dtype)
    return torch.stack(losses).tolist()


@torch.no_grad()
def _places(model: PreTrainedModel, task: VisualTask, names: Sequence[str]) -> Tensor:
    """The mean embedding [names, D] of each name's tokens, as it stands in an answer; fp32."""
    words: Any = model.get_input_embeddings().weight
    return torch.stack([words[torch.tensor(ids)].float().mean(0) for ids in task.answer_ids(names)])


@torch.no_grad()
def _features(
    model: PreTrainedModel, task: VisualTask, items: Sequence[Item], workers: int
) -> tuple[Tensor, Tensor]:
    """The network's features [tokens, 1728] of all images, and the number of its item [tokens]."""
    tower: Any = model.model.visual
    features, counts = [], []
    for batch in DataLoader(items, batch_size=128, collate_fn=task.prompts, num_workers=workers):  # type: ignore[arg-type]
        grids = batch["image_grid_thw"]
        features.append(tower(batch["pixel_values"].to(model.device), grids).last_hidden_state)
        counts.append(grids.prod(1) // tower.spatial_merge_size**2)
    counted = torch.cat(counts).to(model.device)
    return torch.cat(features), torch.arange(len(counted), device=model.device).repeat_interleave(counted)
