"""easy-VQA: questions about one coloured shape in a 64×64 image, for models of the Qwen-VL kind.

The data (5,000 images, 48,248 questions, official splits) is that of the PyPI package `easy-vqa` by Victor
Zhou (MIT).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from recipes.data.patches import Pixels
from recipes.data.task import Batch, DatasetNotInstalled, Item, VideoTooShort
from recipes.data.visual import Shown, VisualTask

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


class EasyVQA(VisualTask):
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
        super().__init__(config, tokenizer)
        self.train = self._items(easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths())
        self.test = self._items(easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths())
        self.max_new_tokens = 1 + max(map(len, self.answer_ids(easy_vqa.get_answers())))
        self._pixels: dict[str, Pixels] = {}

    @staticmethod
    def _items(questions: tuple[list[str], list[str], list[int]], paths: dict[int, str]) -> list[Item]:
        return [{"image": paths[i], "question": q, "answer": a} for q, a, i in zip(*questions)]

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

    def shown(self, items: Sequence[Item]) -> list[Shown]:
        """The image of each item."""
        return [Shown([pixels]) for pixels in self.pixels([item["image"] for item in items])]

    def slideshow(self, tokens: int, question: str = "what is the shape?") -> Batch:
        """A video of many test images and a question on it: a real input of any length, for benchmarks.

        The images come in the order of the test split, from the start again when they are used up.

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
        images = self.pixels([paths[i % len(paths)] for i in range(round(tokens / per_image))])
        return self._batch([question], [Shown(images, video=True)], "left")
