"""easy-VQA: questions about one coloured shape in a 64×64 image, for models of the Qwen-VL kind.

The data (5,000 images, 48,248 questions, official splits) is that of the PyPI package `easy-vqa` by Victor
Zhou (MIT). Prompts have no chat template: `<|vision_start|>` image `<|vision_end|>` question, then the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from recipes.data.task import (
    IGNORED,
    Batch,
    DatasetNotInstalled,
    Item,
    NoVisionTokens,
    UnsupportedModel,
    VideoTooShort,
    pad,
)

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

IMAGE, VIDEO = 1, 2
"""The marks of transformers' `mm_token_type_ids`, text being 0."""


class Pixels(NamedTuple):
    """One image, cut into patches: `values` [patches, channels, patch area] uint8, and its (H, W) in patches."""

    values: Tensor
    grid: tuple[int, int]


class Patcher:
    """Images to the patches of a Qwen-VL vision tower, by transformers' own image processor.

    The processor runs once an image. What it gives is kept as bytes, one of the `temporal_patch_size` equal
    frames, an eighth of its size in fp32; a batch is normalised when it is made.

    Args:
        vision_config: The model's `config.vision_config`.
    """

    def __init__(self, vision_config: PreTrainedConfig):
        from transformers import Qwen2VLImageProcessorPil  # the other backend needs torchvision

        self.frames: int = vision_config.temporal_patch_size
        self.merge: int = vision_config.spatial_merge_size
        self.token_side: int = vision_config.patch_size * self.merge
        longest_edge = Qwen2VLImageProcessorPil.size["longest_edge"]
        self.processor = Qwen2VLImageProcessorPil(
            patch_size=vision_config.patch_size,
            temporal_patch_size=self.frames,
            merge_size=self.merge,
            size={"shortest_edge": self.token_side**2, "longest_edge": longest_edge},
        )
        self.mean = 255 * torch.tensor(self.processor.image_mean).view(1, -1, 1, 1)
        self.std = 255 * torch.tensor(self.processor.image_std).view(1, -1, 1, 1)

    def cut(self, images: Sequence[Image]) -> list[Pixels]:
        """Cuts images into patches.

        Raises:
            NoVisionTokens: An image is smaller than the square of pixels behind one vision token.
        """
        for image in images:
            if min(image.size) < self.token_side:
                raise NoVisionTokens(
                    f"an image of {image.width}×{image.height} pixels gives no vision token: this model makes one "
                    f"of {self.token_side}×{self.token_side} pixels; enlarge the image or leave it out"
                )
        cut = self.processor(list(images), do_rescale=False, do_normalize=False, return_tensors="pt")
        sizes = cut["image_grid_thw"].prod(1).tolist()
        values = cut["pixel_values"].to(torch.uint8).unflatten(1, (self.mean.shape[1], self.frames, -1))
        grids = [(h, w) for _, h, w in cut["image_grid_thw"].tolist()]
        return [Pixels(v.clone(), grid) for v, grid in zip(values[:, :, 0].split(sizes), grids)]

    def pixel_values(self, images: Sequence[Pixels]) -> Tensor:
        """The processor's own `pixel_values` [patches, channels × frames × patch area], fp32, for a batch."""
        values = torch.cat([image.values for image in images])[:, :, None].float()
        return ((values - self.mean) / self.std).expand(-1, -1, self.frames, -1).flatten(1)

    def tokens(self, image: Pixels) -> int:
        """Number of vision tokens that the decoder sees of an image."""
        return image.grid[0] * image.grid[1] // self.merge**2


class EasyVQA:
    """easy-VQA as a `Task` for any model of the Qwen2-VL or Qwen2.5-VL class.

    Items are `{"image": path, "question": str, "answer": str}`; 38,575 to train, 9,673 to test.

    Args:
        config: The model's config: it says how images become patches and which ids mark vision.
        tokenizer: The model's tokenizer; its end-of-text token closes an answer.

    Raises:
        DatasetNotInstalled: The package `easy-vqa` or Pillow is missing.
        UnsupportedModel: The config has no Qwen-VL vision tower, or the tokenizer no end or pad token.
    """

    name = "easy-vqa"

    def __init__(self, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase):
        try:
            import easy_vqa
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise DatasetNotInstalled(
                f'easy-VQA needs the package {error.name!r}, which is not installed: pip install "linmu[demo]"'
            ) from error
        ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        missing = [name for name in ("vision_config", *ids) if not hasattr(config, name)]
        if missing or not hasattr(config.vision_config, "temporal_patch_size"):
            raise UnsupportedModel(
                f"easy-VQA shows images, but a {config.model_type!r} model has no Qwen-VL vision tower "
                f"(missing in its config: {', '.join(missing) or 'vision_config.temporal_patch_size'}); "
                "take a model of the Qwen2-VL or Qwen2.5-VL class"
            )
        if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
            raise UnsupportedModel("the tokenizer needs an end and a pad token: set eos_token and pad_token")

        self.config, self.tokenizer = config, tokenizer
        self.patcher = Patcher(config.vision_config)
        self.train = self._items(easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths())
        self.test = self._items(easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths())
        self.max_new_tokens = 1 + max(map(len, self.ids(easy_vqa.get_answers())))
        self._pixels: dict[str, Pixels] = {}

    @staticmethod
    def _items(questions: tuple[list[str], list[str], list[int]], paths: dict[int, str]) -> list[Item]:
        return [{"image": paths[i], "question": q, "answer": a} for q, a, i in zip(*questions)]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with no token added."""
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def pixels(self, paths: Sequence[str]) -> list[Pixels]:
        """The patches of image files, each read and cut once and then kept in memory (12 KB at 64×64)."""
        from PIL import Image

        new = [path for path in dict.fromkeys(paths) if path not in self._pixels]
        if new:
            images = []
            for path in new:
                with Image.open(path) as image:
                    images.append(image.convert("RGB"))
            self._pixels.update(zip(new, self.patcher.cut(images)))
        return [self._pixels[path] for path in paths]

    def prompt(self, question: list[int], vision_token: int, tokens: int) -> list[int]:
        """Ids of a prompt: an image or a video of `tokens` vision tokens, then the question's ids."""
        start, end = self.config.vision_start_token_id, self.config.vision_end_token_id
        return [start, *[vision_token] * tokens, end, *question]

    def _batch(self, items: Sequence[Item], with_answers: bool, side: Literal["left", "right"]) -> Batch:
        images = self.pixels([item["image"] for item in items])
        questions = self.ids([item["question"] for item in items])
        prompts = [
            self.prompt(question, self.config.image_token_id, self.patcher.tokens(image))
            for question, image in zip(questions, images)
        ]
        if with_answers:
            answers = [[*ids, self.tokenizer.eos_token_id] for ids in self.ids([i["answer"] for i in items])]
        else:
            answers = [[] for _ in items]
        rows = [prompt + answer for prompt, answer in zip(prompts, answers)]
        input_ids = pad(rows, self.tokenizer.pad_token_id, side)
        batch = {
            "input_ids": input_ids,
            "attention_mask": pad([[1] * len(row) for row in rows], 0, side),
            "mm_token_type_ids": IMAGE * (input_ids == self.config.image_token_id).long(),
            "pixel_values": self.patcher.pixel_values(images),
            "image_grid_thw": torch.tensor([(1, *image.grid) for image in images]),
        }
        if with_answers:
            labels = [[IGNORED] * len(prompt) + answer for prompt, answer in zip(prompts, answers)]
            batch["labels"] = pad(labels, IGNORED, side)
        return batch

    def collate(self, items: Sequence[Item]) -> Batch:
        """Training batch, right-padded; `labels` [B, N] is -100 except on the answer and its end token."""
        return self._batch(items, with_answers=True, side="right")

    def prompts(self, items: Sequence[Item]) -> Batch:
        """Inputs of `generate()`, left-padded."""
        return self._batch(items, with_answers=False, side="left")

    def score(self, item: Item, generated_ids: Tensor) -> float:
        """1.0 if the generated ids [N], up to the end token, read as the item's answer and nothing else."""
        ids: list[int] = generated_ids.tolist()
        if self.tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(self.tokenizer.eos_token_id)]
        return float(str(self.tokenizer.decode(ids)).strip() == item["answer"])

    def slideshow(self, tokens: int, question: str = "what is the shape?") -> Batch:
        """A video of many test images and a question on it: a real input of any length, for benchmarks.

        Each image is shown for `temporal_patch_size` frames, so the patches are those of the image alone. The
        images come in the order of the test split, from the start again when they are used up.

        Args:
            tokens: Vision tokens wanted. The video has the whole number of images nearest to it.
            question: Text after the video.

        Returns:
            Inputs of forward or `generate()` for one row: `input_ids`, `attention_mask`, `mm_token_type_ids`
            [1, N], `pixel_values_videos` and `video_grid_thw` [1, 3].

        Raises:
            VideoTooShort: Fewer tokens are wanted than one image has.
        """
        paths = list(dict.fromkeys(item["image"] for item in self.test))
        (first,) = self.pixels(paths[:1])
        per_image = self.patcher.tokens(first)
        if tokens < per_image:
            raise VideoTooShort(
                f"a slideshow of {tokens} vision tokens is shorter than one image, which has {per_image}: "
                f"ask for at least {per_image}"
            )
        steps = round(tokens / per_image)
        images = self.pixels([paths[i % len(paths)] for i in range(steps)])
        (ids,) = self.ids([question])
        input_ids = torch.tensor([self.prompt(ids, self.config.video_token_id, steps * per_image)])
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "mm_token_type_ids": VIDEO * (input_ids == self.config.video_token_id).long(),
            "pixel_values_videos": self.patcher.pixel_values(images),
            "video_grid_thw": torch.tensor([(steps, *first.grid)]),
        }
