"""A training batch at a quarter of the cost: each image once, with all its questions in the same row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Qwen2_5_VLForConditionalGeneration

from recipes.data.easyvqa import EasyVQA
from recipes.data.task import IGNORED, Batch, Item, pad


def by_image(items: Sequence[Item]) -> list[list[Item]]:
    """The items grouped by their image, in the order in which the images come first."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(item["image"], []).append(item)
    return list(groups.values())


class Packer:
    """Makes rows that hold an image and then all its questions and answers, each pair blind to the others.

    A pair sees the image and itself, at the positions that it has in a row of its own, so logits and loss are
    those of `EasyVQA.collate`. The images of a batch go through the vision tower as the frames of one grid: it
    attends and counts positions within a frame, so that changes nothing but the length of its Python loops.

    Args:
        model: The model, which says at which position each token of a row stands.
        task: Where ids and patches come from. All its images must have one size.
    """

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, task: EasyVQA):
        self.task = task
        row = task.collate([max(task.train, key=lambda item: len(item["question"].split()))])
        positions, _ = model.model.get_rope_index(
            row["input_ids"], mm_token_type_ids=row["mm_token_type_ids"], image_grid_thw=row["image_grid_thw"]
        )
        self.positions: Tensor = positions[:, 0]

    def __call__(self, groups: Sequence[Sequence[Item]]) -> Batch:
        """A batch with a row for each image, given as its items: the keyword arguments of the model's forward.

        `attention_mask` is bool [B, 1, N, N], `position_ids` [3, B, N], `labels` [B, N].
        """
        task, end = self.task, self.task.tokenizer.eos_token_id
        images = task.pixels([items[0]["image"] for items in groups])
        head = task.prompt([], task.config.image_token_id, task.patcher.tokens(images[0]))
        rows = []
        for items in groups:
            tokens = [(token, IGNORED, column, 0) for column, token in enumerate(head)]
            questions, answers = (task.ids([item[part] for item in items]) for part in ("question", "answer"))
            for pair, (question, answer) in enumerate(zip(questions, answers), start=1):
                known = [*answer, end]
                labelled = zip([*question, *known], [IGNORED] * len(question) + known)
                tokens += [(token, label, len(head) + i, pair) for i, (token, label) in enumerate(labelled)]
            rows.append(tokens)
        ids, labels, columns, owners = (
            pad([[token[field] for token in row] for row in rows], filler, "right")
            for field, filler in enumerate((task.tokenizer.pad_token_id, IGNORED, 0, -1))
        )
        sees = (owners[:, None, :] == 0) | (owners[:, None, :] == owners[:, :, None])
        return {
            "input_ids": ids,
            "attention_mask": sees.tril()[:, None],
            "position_ids": self.positions[:, columns],
            "pixel_values": task.patcher.pixel_values(images),
            "image_grid_thw": torch.tensor([(len(images), *images[0].grid)]),
            "labels": labels,
        }


def attend_in_one_call(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Lets the vision tower attend to windows of equal length as one batch, not one window at a time.

    A forward with windows of several lengths raises a ValueError from then on.
    """
    # "flash" in the name makes transformers hand over all windows at once, with their bounds.
    AttentionInterface.register("flash_equal_windows", _equal_windows)
    model.model.visual.config._attn_implementation = "flash_equal_windows"


def _equal_windows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: object,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of [1, H, N, P] within N / W windows of equal length W; gives [1, N, H, P]."""
    windows = len(cu_seq_lens_q) - 1
    if windows * int(max_length_q) != query.shape[2]:
        raise ValueError(
            f"{windows} windows of up to {int(max_length_q)} patches hold {query.shape[2]} patches, so they are not of "
            "one length: use images whose sides are multiples of the vision tower's window_size"
        )
    query, key, value = (x[0].unflatten(1, (windows, -1)).transpose(0, 1) for x in (query, key, value))
    out = nn.functional.scaled_dot_product_attention(query, key, value)
    return out.transpose(1, 2).flatten(0, 1)[None], None
