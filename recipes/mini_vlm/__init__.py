"""A vision-language model of real pretrained parts, small enough to train and distil on one GPU in minutes.

EfficientNet-Lite0 (ImageNet, frozen) sees, SmolLM2-135M-Instruct reads and writes, and a projector stands between
them. To transformers it is a Qwen2-VL with another vision tower: images and videos come as grids of patches, and
every 32×32 pixels of a frame become one token.

`build` joins the parts, `train` trains the projector and adapts the decoder on any task.
"""

from __future__ import annotations
