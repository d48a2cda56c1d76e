"""Checkpoints of what is new alone: the weights by which a converted model differs from its teacher.

They hold mixers, what else was trained, and peft's adapters; the teacher is loaded from where it came from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from bridges.atomic import atomic_directory
from bridges.attention import MixerAttention
from bridges.errors import CheckpointError
from bridges.plan import Report, find_attention, plan
from bridges.pretrained import note_settings, open_weights, read_json
from bridges.record import NEW_WEIGHTS, RECORD, teacher_name, upgraded
from bridges.replace import replace_attention

WEIGHTS = "new_weights.safetensors"


def save_new_weights(model: Any, path: str | Path, *, teacher: PreTrainedModel) -> None:
    """Save the weights of a converted model that are not its teacher's, and peft's adapters if there are any.

    Args:
        model: A converted model, or one wrapped by peft.
        path: Directory to write, whole or not at all. What an older call wrote there is replaced, other files stay.
        teacher: The model that it was converted from, with its weights as they were.

    Raises:
        CheckpointError: The model is not converted, the teacher is, is another model, or the directory holds
            something else.
    """
    path = Path(path)
    if path.is_dir() and any(path.iterdir()) and not (path / NEW_WEIGHTS).exists():
        raise CheckpointError(f"{path} holds something else; choose an empty or a new directory.")
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    if not hasattr(base.config.get_text_config(decoder=True), RECORD):
        raise CheckpointError(f"{type(base).__name__} is not converted; it has no new weights.")
    if any(isinstance(module, MixerAttention) for module in teacher.modules()):
        raise CheckpointError(
            "the teacher is converted too; pass the model as it was before, or load it again."
        )
    theirs = dict(teacher.named_parameters())
    new = {}
    for name, parameter in _own_parameters(base, model):
        known = theirs.get(name, theirs.get(name.replace(".mixer.", ".")))
        if known is not None and known.shape != parameter.shape:
            raise CheckpointError(
                f"{name} is {list(parameter.shape)} in the model and {list(known.shape)} in the teacher: it is "
                "another model's teacher."
            )
        if known is None or not torch.equal(known.to(parameter.device, parameter.dtype), parameter):
            new[name] = parameter.detach().cpu().contiguous()
    about = {
        "base_model_type": teacher.config.model_type,
        "teacher": teacher_name(teacher),
        "adapters": hasattr(model, "peft_config"),
        RECORD: note_settings(base),
    }
    with atomic_directory(path, replaces="adapter_*") as folder:
        if about["adapters"]:
            model.save_pretrained(folder)
        save_file(new, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / NEW_WEIGHTS).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def load_new_weights(teacher: PreTrainedModel, path: str | Path) -> Any:
    """Convert a teacher in place to the model whose new weights were saved.

    Args:
        teacher: The same teacher, as it was loaded.
        path: The directory that :func:`save_new_weights` wrote.

    Returns:
        The converted model; wrapped by peft if adapters were saved with it.

    Raises:
        CheckpointError: The directory is missing, damaged, of a newer format, or of another teacher. The teacher
            is then as it was.
        BridgeError: As :func:`replace_attention` says.
    """
    path = Path(path)
    about = read_json(path / NEW_WEIGHTS)
    record = upgraded(about.get(RECORD) or {}, path)
    if about.get("base_model_type") != teacher.config.model_type:
        raise CheckpointError(
            f"{path} is of a {about.get('base_model_type')!r} model, found a {teacher.config.model_type!r}; load "
            f"its teacher{_named(about)}."
        )
    spec = {index: {"mixer": layer["mixer"], **layer["config"]} for index, layer in record["layers"].items()}
    planned = plan(teacher, spec)
    with open_weights(path / WEIGHTS) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
    _check(tensors, _shapes(teacher, planned), path, about)
    if about.get("adapters"):
        from peft import PeftModel

        read_json(path / "adapter_config.json")
        with open_weights(path / "adapter_model.safetensors"):
            pass
    replace_attention(teacher, spec)
    parameters = dict(teacher.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].data = tensor.to(parameters[name].device, parameters[name].dtype)
    if about.get("adapters"):
        return PeftModel.from_pretrained(teacher, str(path))
    return teacher


def _own_parameters(base: nn.Module, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's parameters by their names without peft, which may wrap it and saves its own itself."""
    adapters = [".modules_to_save."]
    if model is not base:
        adapters += [f".{getattr(model.base_model, 'prefix', 'lora_')}"]
    for name, parameter in base.named_parameters():
        if not any(part in name for part in adapters):
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), parameter


def _shapes(teacher: PreTrainedModel, planned: Report) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Return name → (shape, whether it must be given) of every parameter that the converted teacher will have."""
    _, attentions = find_attention(teacher)
    converted = {row.index for row in planned.layers}
    places = {id(module): name for name, module in teacher.named_modules()}
    prefixes = {index: places[id(attentions[index])] for index in converted}
    inside = tuple(f"{prefix}." for prefix in prefixes.values())
    shapes = {
        name: (tuple(p.shape), False) for name, p in teacher.named_parameters() if not name.startswith(inside)
    }
    for row in planned.layers:
        for transfer in row.transfers:
            if transfer.shape is not None:
                given = transfer.action != "kept"
                shapes[f"{prefixes[row.index]}.mixer.{transfer.name}"] = (transfer.shape, given)
    return shapes


def _check(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[tuple[int, ...], bool]],
    path: Path,
    about: Mapping[str, Any],
) -> None:
    for name, tensor in tensors.items():
        if name not in shapes or shapes[name][0] != tuple(tensor.shape):
            found = f"{list(shapes[name][0])} there" if name in shapes else "not there"
            raise CheckpointError(
                f"{path} does not fit this model: {name} is {list(tensor.shape)}, and {found}; load its "
                f"teacher{_named(about)}."
            )
    if missing := [name for name, (_, given) in shapes.items() if given and name not in tensors]:
        raise CheckpointError(
            f"{path / WEIGHTS} lacks {missing[0]}, and {len(missing) - 1} more; save it again."
        )


def _named(about: Mapping[str, Any]) -> str:
    return f", {about['teacher']!r}" if about.get("teacher") else ""
