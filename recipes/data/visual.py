"""Questions on what is shown, for models of the Qwen-VL kind: the part that all datasets of pictures share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from recipes.data.patches import Patcher, Pixels
from recipes.data.task import IGNORED, Batch, Item, UnsupportedModel, pad

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

IMAGE, VIDEO = 1, 2
"""The marks of transformers' `mm_token_type_ids`, text being 0."""


class Shown(NamedTuple):
    """What a question is about: one image, or the frames of a video, all of one size."""

    frames: list[Pixels]
    video: bool = False


class Reply(NamedTuple):
    """What follows a prompt, and its labels."""

    ids: list[int]
    labels: list[int]


class VisualTask(ABC):
    """The part of a `Task` between items with `"question"` and `"answer"` and the tensors of a Qwen-VL model.

    Prompts have no chat template: `<|vision_start|>` image or video `<|vision_end|>` question, then a space and
    the answer. A frame of a video is shown for `temporal_patch_size` frames, so its patches are those of an image.

    Args:
        config: The model's config: it says how images become patches and which ids mark vision.
        tokenizer: The model's tokenizer; its end-of-text token closes an answer.

    Attributes:
        long_videos: Categories of the test split that are long videos.

    Raises:
        UnsupportedModel: The config has no Qwen-VL vision tower, or the tokenizer no end or pad token.
    """

    name: str
    long_videos: Collection[str] = frozenset()

    def __init__(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase):
        ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        missing = [name for name in ("vision_config", *ids) if not hasattr(config, name)]
        if missing or not hasattr(config.vision_config, "temporal_patch_size"):
            raise UnsupportedModel(
                f"{self.name} shows images, but a {config.model_type!r} model has no Qwen-VL vision tower "
                f"(missing in its config: {', '.join(missing) or 'vision_config.temporal_patch_size'}); "
                "take a model of the Qwen2-VL or Qwen2.5-VL class"
            )
        if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
            raise UnsupportedModel("the tokenizer needs an end and a pad token: set eos_token and pad_token")
        self.config, self.tokenizer = config, tokenizer
        dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        self.patcher = Patcher(config.vision_config, dtype)

    @abstractmethod
    def shown(self, items: Sequence[Item]) -> list[Shown]:
        """What each item shows."""

    def captioned(self, count: int) -> list[Item]:
        """Up to `count` training items on one image whose answer is what it shows; none unless a dataset has such."""
        return []

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with no token added."""
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def answer_ids(self, answers: Sequence[str]) -> list[list[int]]:
        """Token ids of answers as they follow a question, without the end token."""
        return self.ids([f" {answer}" for answer in answers])

    def prompt(self, question: list[int], vision_token: int, tokens: int) -> list[int]:
        """Ids of a prompt: an image or a video of `tokens` vision tokens, then the question's ids."""
        start, end = self.config.vision_start_token_id, self.config.vision_end_token_id
        return [start, *[vision_token] * tokens, end, *question]

    def _batch(
        self,
        questions: Sequence[str],
        shown: Sequence[Shown],
        side: Literal["left", "right"],
        replies: Sequence[Reply] | None = None,
    ) -> Batch:
        marks = {False: self.config.image_token_id, True: self.config.video_token_id}
        prompts = [
            self.prompt(question, marks[show.video], sum(map(self.patcher.tokens, show.frames)))
            for question, show in zip(self.ids(questions), shown)
        ]
        rows = prompts if replies is None else [p + reply.ids for p, reply in zip(prompts, replies)]
        input_ids = pad(rows, self.tokenizer.pad_token_id, side)
        batch = {
            "input_ids": input_ids,
            "attention_mask": pad([[1] * len(row) for row in rows], 0, side),
            "mm_token_type_ids": IMAGE * (input_ids == marks[False]).long()
            + VIDEO * (input_ids == marks[True]).long(),
        }
        for video, values, grids in (
            (False, "pixel_values", "image_grid_thw"),
            (True, "pixel_values_videos", "video_grid_thw"),
        ):
            if of_kind := [show.frames for show in shown if show.video == video]:
                batch[values] = self.patcher.pixel_values([frame for frames in of_kind for frame in frames])
                batch[grids] = torch.tensor([(len(frames), *frames[0].grid) for frames in of_kind])
        if replies is not None:
            labels = [[IGNORED] * len(prompt) + reply.labels for prompt, reply in zip(prompts, replies)]
            batch["labels"] = pad(labels, IGNORED, side)
        return batch

    def collate(self, items: Sequence[Item]) -> Batch:
        """Training batch, right-padded; `labels` [B, N] is -100 except on answers and their end tokens.

        An item's `"further"` questions, if it has any, follow its answer, each with its own.
        """
        questions = [item["question"] for item in items]
        return self._batch(questions, self.shown(items), "right", [self._reply(item) for item in items])

    def text_tokens(self, item: Item) -> int:
        """How many tokens a training row has beside its image or video."""
        return len(self.prompt(self.ids([item["question"]])[0], 0, 0)) + len(self._reply(item).ids)

    def _reply(self, item: Item) -> Reply:
        end = self.tokenizer.eos_token_id
        questions, answers = zip(("", item["answer"]), *item.get("further", ()))
        reply = Reply([], [])
        for question, answer in zip(self.ids(questions), self.answer_ids(answers)):
            reply.ids.extend([*question, *answer, end])
            reply.labels.extend([*[IGNORED] * len(question), *answer, end])
        return reply

    def prompts(self, items: Sequence[Item]) -> Batch:
        """Inputs of `generate()`, left-padded."""
        questions = [item["question"] for item in items]
        return self._batch(questions, self.shown(items), "left")

    def score(self, item: Item, generated_ids: Tensor) -> float:
        """1.0 if the generated ids [N], up to the end token, read as the item's answer and nothing else.

        White space around it and case do not matter.
        """
        ids: list[int] = generated_ids.tolist()
        if self.tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(self.tokenizer.eos_token_id)]
        return float(str(self.tokenizer.decode(ids)).strip().casefold() == item["answer"].casefold())
