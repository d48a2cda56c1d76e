"""The vision tower: what it sees of the patches, where its tokens come from, and that it stays as it is."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import Qwen2VLImageProcessorPil

from recipes.mini_vlm import tower as tower_module
from recipes.mini_vlm.efficientnet import EfficientNetLite0, SameConv2d
from recipes.mini_vlm.tower import GridError, MiniVLMVisionConfig, MiniVLMVisionTower


@pytest.fixture(scope="module")
def tower():
    torch.manual_seed(0)
    return MiniVLMVisionTower(MiniVLMVisionConfig(hidden_size=24)).eval()


def picture(height, width, seed=0):
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return pixels.to(torch.uint8)


def cut(*pictures):
    processor = Qwen2VLImageProcessorPil(
        patch_size=16,
        temporal_patch_size=1,
        merge_size=2,
        size={"shortest_edge": 32**2, "longest_edge": 2**20},
    )
    out = processor([Image.fromarray(p.numpy()) for p in pictures], return_tensors="pt")
    return out["pixel_values"], out["image_grid_thw"]


def seen(tower, *pictures):
    """The images that the network gets."""
    images = []
    hook = tower.encoder.register_forward_pre_hook(lambda module, args: images.append(args[0]))
    with torch.no_grad():
        tower(*cut(*pictures))
    hook.remove()
    return images


def normed(features):
    return (features - features.mean()) / features.std(correction=0)


def test_the_network_sees_the_picture_that_was_cut_into_patches(tower):
    image = picture(64, 96)
    (frames,) = seen(tower, image, image)
    expected = (image.permute(2, 0, 1).float() - 127) / 128
    torch.testing.assert_close(frames, expected.expand(2, -1, -1, -1), atol=1e-5, rtol=0)


def test_a_token_holds_the_features_of_its_pixels(tower):
    image = picture(64, 96)
    with torch.no_grad():
        out = tower(*cut(image))
        middle, last = tower.encoder(((image.permute(2, 0, 1).float() - 127) / 128)[None])
        assert middle.shape == (1, 112, 4, 6)
        assert out.last_hidden_state.shape == (2 * 3, 1728)
        assert out.pooler_output.shape == (2 * 3, 24)
        for row in range(2):
            for column in range(3):
                token = out.last_hidden_state[3 * row + column]
                square = middle[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
                torch.testing.assert_close(token[:448], normed(square), atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(token[448:], normed(last[0, :, row, column]), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_clips_of_any_size_are_encoded_as_if_alone(tower):
    sizes = [(64, 32), (32, 32), (64, 32), (96, 64)]
    pictures = [picture(*size, seed=seed) for seed, size in enumerate(sizes)]
    together = tower(*cut(*pictures)).pooler_output
    alone = torch.cat([tower(*cut(p)).pooler_output for p in pictures])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_video_is_its_frames_however_many_go_at_a_time(tower, monkeypatch):
    patches, grids = cut(*(picture(32, 64, seed=seed) for seed in range(5)))
    images = tower(patches, grids).pooler_output
    monkeypatch.setattr(tower_module, "FRAMES", 2)
    video = tower(patches, torch.tensor([[5, 2, 4]])).pooler_output
    torch.testing.assert_close(video, images, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_training_does_not_move_its_statistics(tower):
    patches, grids = cut(picture(64, 64))
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    expected = tower(patches, grids).last_hidden_state
    tower.train()
    assert torch.equal(tower(patches, grids).last_hidden_state, expected)
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())
    tower.eval()


@pytest.mark.parametrize(
    ("patches", "width", "grid", "message"),
    [
        (8, 768, [1, 4, 4], "ask for"),
        (16, 1536, [1, 4, 4], "temporal_patch_size 1"),
        (12, 768, [1, 3, 4], "multiples of 32 pixels"),
        (0, 768, [0, 4, 4], "whole number"),
    ],
)
def test_patches_that_are_not_the_grids_are_refused(tower, patches, width, grid, message):
    with pytest.raises(GridError, match=message):
        tower(torch.zeros(patches, width), torch.tensor([grid]))


def test_tokens_of_other_sizes_are_refused():
    with pytest.raises(GridError, match="take 16, 2 and 1"):
        MiniVLMVisionTower(MiniVLMVisionConfig(patch_size=14))


@pytest.mark.parametrize(("kernel", "expected"), [(3, [[9, 6], [6, 4]]), (5, [[16, 12], [12, 9]])])
def test_padding_at_stride_two_is_tensorflows(kernel, expected):
    """A 4×4 image of ones under a kernel of ones: the odd pixel of padding is right and below."""
    convolution = SameConv2d(1, 1, kernel, stride=2)
    nn.init.ones_(convolution.weight)
    assert convolution(torch.ones(1, 1, 4, 4))[0, 0].tolist() == expected


def test_the_modules_are_named_as_in_the_checkpoint():
    names = EfficientNetLite0().state_dict().keys()
    assert len([name for name in names if name.endswith("weight")]) == 2 * 49
    for name in (
        "_conv_stem.weight",
        "_blocks.0._bn2.running_var",
        "_blocks.15._expand_conv.weight",
        "_bn1.bias",
    ):
        assert name in names
    assert "_blocks.0._expand_conv.weight" not in names
