"""easy-VQA as a task: what the model is shown, what it must say, and how it is judged."""

from __future__ import annotations

import sys

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, Qwen2_5_VLConfig, Qwen2VLImageProcessorPil

from recipes.data.easyvqa import EasyVQA
from recipes.data.patches import Patcher
from recipes.data.task import (
    IGNORED,
    DatasetNotInstalled,
    EmptyBatch,
    NoVisionTokens,
    Task,
    UnsupportedModel,
    VideoTooShort,
    pad,
)
from recipes.tiny_vlm.build import build_config, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def config(tokenizer):
    return build_config(tokenizer)


@pytest.fixture(scope="module")
def task(config, tokenizer):
    return EasyVQA(config, tokenizer)


@pytest.fixture(scope="module")
def items(task):
    """Questions and answers of different lengths on different images."""
    return [task.test[i] for i in (0, 1, 2, 500, 1500, 9672)]


def processed(config, items):
    """What transformers' image processor makes of the items' images, without any cache."""
    vision = config.vision_config
    side = vision.patch_size * vision.spatial_merge_size
    processor = Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        size={"shortest_edge": side**2, "longest_edge": 1 << 20},
    )
    images = [Image.open(item["image"]).convert("RGB") for item in items]
    return processor(images, return_tensors="pt")


def test_it_is_a_task_with_the_official_splits(task):
    assert isinstance(task, Task)
    assert (len(task.train), len(task.test)) == (38_575, 9_673)
    assert len({item["image"] for item in task.train}) == 4_000
    assert len({item["image"] for item in task.test}) == 1_000
    assert not {item["image"] for item in task.train} & {item["image"] for item in task.test}


def test_no_word_is_unknown_to_the_tokenizer(task, tokenizer):
    texts = {item[part] for item in [*task.train, *task.test] for part in ("question", "answer")}
    assert all(tokenizer.unk_token_id not in ids for ids in task.ids(sorted(texts)))


@pytest.mark.parametrize("make", ["collate", "prompts"])
def test_pixels_are_those_of_the_image_processor(task, config, items, make):
    batch, expected = getattr(task, make)(items), processed(config, items)
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-6)
    assert torch.equal(batch["image_grid_thw"], expected["image_grid_thw"])


def test_an_image_is_read_once(config, tokenizer, items, monkeypatch):
    task = EasyVQA(config, tokenizer)
    first = task.collate(items)
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("the image was read again"))
    again = task.collate(items)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_each_row_holds_as_many_image_tokens_as_its_grid(task, config, items):
    batch = task.collate(items)
    expected = batch["image_grid_thw"].prod(1) // config.vision_config.spatial_merge_size**2
    assert torch.equal((batch["input_ids"] == config.image_token_id).sum(1), expected)
    assert torch.equal(batch["mm_token_type_ids"] == 1, batch["input_ids"] == config.image_token_id)


def test_labels_are_the_answer_and_its_end(task, tokenizer, items):
    for item, labels in zip(items, task.collate(items)["labels"]):
        assert tokenizer.decode(labels[labels != IGNORED]) == f"{item['answer']} {tokenizer.eos_token}"


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("yes <eos>", 1.0),
        ("yes", 1.0),
        ("yes <eos> no", 1.0),
        ("yes <eos> <pad>", 1.0),
        ("no <eos>", 0.0),
        ("yes yes <eos>", 0.0),
        ("<eos> yes", 0.0),
        ("<pad> yes", 0.0),
        ("", 0.0),
    ],
)
def test_only_the_exact_answer_scores(task, tokenizer, said, score):
    ids = torch.tensor(tokenizer(said)["input_ids"], dtype=torch.long)
    assert task.score({"answer": "yes"}, ids) == score


def test_the_longest_answer_fits_into_max_new_tokens(task):
    longest = max(len(ids) for ids in task.ids(sorted({item["answer"] for item in task.test})))
    assert task.max_new_tokens == longest + 1


@pytest.mark.parametrize(("wanted", "images"), [(64, 1), (100, 2), (640, 10), (64 * 1003, 1003)])
def test_a_slideshow_has_a_token_for_each_cell_of_its_grid(task, config, wanted, images):
    batch = task.slideshow(wanted)
    assert batch["video_grid_thw"].tolist() == [[images, 16, 16]]
    shown = batch["input_ids"] == config.video_token_id
    assert int(shown.sum()) == images * 64
    assert torch.equal(batch["mm_token_type_ids"] == 2, shown)
    assert len(batch["pixel_values_videos"]) == images * 256


def test_a_slideshow_shows_the_patches_of_its_images(task, config):
    images = [{"image": path} for path in list(dict.fromkeys(item["image"] for item in task.test))[:3]]
    expected = processed(config, images)["pixel_values"]
    found = task.slideshow(3 * 64)["pixel_values_videos"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_slideshow_shorter_than_an_image_is_refused(task):
    with pytest.raises(VideoTooShort, match="at least 64"):
        task.slideshow(63)


def test_it_fits_the_patches_of_the_real_models_too(tokenizer, config):
    real = Qwen2_5_VLConfig(
        **{name: value for name, value in config.to_dict().items() if name.endswith("_token_id")}
    )
    task = EasyVQA(real, tokenizer)
    batch = task.collate(task.test[:1])
    assert batch["image_grid_thw"].tolist() == [[1, 4, 4]]  # 64 pixels are resized to 56, of 14 a patch
    assert int((batch["input_ids"] == real.image_token_id).sum()) == 4


@pytest.mark.parametrize("size", [(7, 64), (64, 7), (1, 1)])
def test_an_image_without_a_token_is_refused(config, size):
    with pytest.raises(NoVisionTokens, match="8×8"):
        Patcher(config.vision_config).cut([Image.new("RGB", (64, 64)), Image.new("RGB", size)])


def test_the_smallest_image_gives_one_token(config):
    patcher = Patcher(config.vision_config)
    (image,) = patcher.cut([Image.new("RGB", (8, 8))])
    assert patcher.tokens(image) == 1


def test_missing_data_names_the_extra_to_install(config, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(DatasetNotInstalled, match=r'pip install "linmu\[demo\]"'):
        EasyVQA(config, tokenizer)


def test_a_model_that_cannot_see_is_refused(tokenizer):
    with pytest.raises(UnsupportedModel, match="'llama'"):
        EasyVQA(LlamaConfig(), tokenizer)


@pytest.mark.parametrize("token", ["eos_token", "pad_token"])
def test_a_tokenizer_without_end_or_padding_is_refused(config, token):
    tokenizer = build_tokenizer()
    setattr(tokenizer, token, None)
    with pytest.raises(UnsupportedModel, match=token):
        EasyVQA(config, tokenizer)


def test_a_batch_of_nothing_is_refused(task):
    for make in (task.collate, task.prompts, lambda items: pad(items, 0, "left")):
        with pytest.raises(EmptyBatch, match="at least one"):
            make([])
