"""EfficientNet-Lite0, a convolutional network for images (Tan & Le, arXiv 1905.11946), as a frozen encoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Blocks(NamedTuple):
    """A stage of blocks of one shape: the first strides, the others keep their input's size."""

    repeats: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STEM, HEAD = 32, 1280
STAGES = (
    Blocks(1, 3, 1, 1, 16),
    Blocks(2, 3, 2, 6, 24),
    Blocks(2, 5, 2, 6, 40),
    Blocks(3, 3, 2, 6, 80),
    Blocks(3, 5, 1, 6, 112),
    Blocks(4, 5, 2, 6, 192),
    Blocks(1, 3, 1, 6, 320),
)
STRIDE = 32
"""Pixels a side behind one position of the last feature map; an image's sides are multiples of it."""

MIDDLE = 112
"""Channels at stride 16, after the fifth stage."""


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding, which at stride 2 has its odd pixel right and below."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        even = (kernel - 1) // 2 if stride == 1 else 0
        super().__init__(inputs, outputs, kernel, stride, even, groups=groups, bias=False)
        before, after = (kernel - stride) // 2, (kernel - stride + 1) // 2
        self.uneven = (before, after, before, after) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Convolve [B, C, H, W], H and W being multiples of the stride."""
        return super().forward(x if self.uneven is None else F.pad(x, self.uneven))


class Block(nn.Module):
    """An inverted residual: expand, convolve each channel, project."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expands, self.residual = expansion > 1, stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv, self._bn0 = SameConv2d(inputs, width, 1), _norm(width)
        self._depthwise_conv, self._bn1 = SameConv2d(width, width, kernel, stride, groups=width), _norm(width)
        self._project_conv, self._bn2 = SameConv2d(width, outputs, 1), _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C', H / stride, W / stride]."""
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """The network up to its classifier; its modules are named as in the checkpoints of the PyTorch port.

    Batch norms use their stored statistics always, in train mode too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv2d(3, STEM, 3, stride=2), _norm(STEM)
        shapes, inputs = [], STEM
        for stage in STAGES:
            for number in range(stage.repeats):
                stride = stage.stride if number == 0 else 1
                shapes.append((inputs, stage.channels, stage.kernel, stride, stage.expansion))
                inputs = stage.channels
        self._blocks = nn.ModuleList(Block(*shape) for shape in shapes)
        self._middle = sum(stage.repeats for stage in STAGES[:5]) - 1
        self._conv_head, self._bn1 = SameConv2d(inputs, HEAD, 1), _norm(HEAD)
        self.train(False)

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Stay in eval mode, whatever is asked for."""
        return super().train(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return two feature maps; the classifier would read the mean of the second.

        Args:
            images: [B, 3, H, W], (RGB of 0…255 - 127) / 128, sides multiples of 32.

        Returns:
            At stride 16 [B, 112, H / 16, W / 16] and at stride 32 [B, 1280, H / 32, W / 32].
        """
        x = F.relu6(self._bn0(self._conv_stem(images.contiguous(memory_format=torch.channels_last))))
        middle = x
        for number, block in enumerate(self._blocks):
            x = block(x)
            if number == self._middle:
                middle = x
        return middle, F.relu6(self._bn1(self._conv_head(x)))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)
