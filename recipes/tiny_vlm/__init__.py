"""A vision-language model of one million weights that answers easy-VQA: the teacher of `linmu demo`.

It is a `Qwen2_5_VLForConditionalGeneration` like the real ones, with the same parts at a small size. `build`
makes it with random weights, `train` trains it from scratch, `weights/` holds the result.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

WEIGHTS = Path(__file__).parent / "weights"


def load(path: Path | str = WEIGHTS) -> tuple[Qwen2_5_VLForConditionalGeneration, PreTrainedTokenizerFast]:
    """The trained model (fp32, on the CPU, in eval mode) and its tokenizer.

    Args:
        path: A folder written by `train`; by default the one that ships with the package.

    Raises:
        FileNotFoundError: There is no model in the folder.
    """
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

    if not (Path(path) / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no tiny VLM in {path}: make one with `python -m recipes.tiny_vlm.train --out {path}`"
        )
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(path)
