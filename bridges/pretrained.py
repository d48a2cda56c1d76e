"""Converted models as first-class Hugging Face models: their classes, config, saving and loading.

A converted model's class is a subclass made on the fly from the teacher's class; its config's JSON says
``model_type: "linmu"`` and ``base_model_type``, and holds the surgery record under the text config.
Nothing in transformers is patched. Without ``import bridges`` loading fails with an unknown model type,
never with the teacher's attention in silence.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from packaging import version
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bridges import masks
from bridges.atomic import atomic_directory, older
from bridges.attention import MixerAttention, rotary_sections
from bridges.cache import mixer_layer
from bridges.card import model_card
from bridges.errors import CheckpointError, VersionError
from bridges.families import Family, family_for
from bridges.layout_capture import LayoutCapture
from bridges.record import NEW_WEIGHTS, RECORD, record_of, upgraded
from bridges.transfer import adopt_projections
from mixers import get

MODEL_TYPE = "linmu"
FP32_PARAMETERS = ("A_log", "dt_bias")
WEIGHT_FILES = "model*.safetensors*"
CARD = "README.md"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
EMPTY_CARD = "has been automatically generated"
CHUNKS_SINCE = "5.23"

_AUTO_CLASSES = [
    auto
    for name, auto in vars(modeling_auto).items()
    if name.startswith("AutoModel") and hasattr(auto, "_model_mapping")
]


def become_converted(model: PreTrainedModel, family: Family, record: dict[str, Any]) -> None:
    """Give a model whose attention modules are replaced the class, config and hooks of a converted model."""
    base_config: Any = type(model.config)
    base_model: Any = type(model)
    _own_config(model)
    text_config = model.config.get_text_config(decoder=True)
    setattr(text_config, RECORD, record)
    _register_auto(base_config)
    model.config.__class__ = converted_config(base_config)
    model.__class__ = converted_model(base_model)
    _connect(model, family, record)


def _own_config(model: PreTrainedModel) -> None:
    """Give a model a copy of its config, which other models may have been made from too."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and id(config) in copies:
            module.config = copies[id(config)]


def load_pretrained(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a converted model that ``save_pretrained`` wrote.

    Args:
        path: Its directory, or the name of a repository on the Hub.
        **kwargs: For ``from_pretrained``, e.g. ``dtype``, ``device_map`` or ``variant``.

    Raises:
        CheckpointError: The directory or repository is missing, is no converted model, is of a newer format, has
            a truncated file, or does not hold exactly the model's parameters.
    """
    path = _directory(
        path, **{key: kwargs[key] for key in ("revision", "token", "cache_dir") if key in kwargs}
    )
    fields = _read_config(path)
    _check_weights(path, kwargs.get("variant"))
    config = AutoConfig.from_pretrained(path)
    try:
        model, info = converted_model(_architecture(path, fields)).from_pretrained(
            path, config=config, output_loading_info=True, **kwargs
        )
    except RuntimeError as error:  # shapes
        raise CheckpointError(f"{path} does not hold the model's parameters: {error}") from error
    wrong = {k: sorted(map(str, v)) for k, v in info.items() if v and k != "error_msgs"}
    if wrong or info.get("error_msgs"):
        raise CheckpointError(
            f"{path} does not hold exactly the model's parameters: {wrong or info['error_msgs']}."
        )
    return model


@cache
def converted_model(base: Any) -> Any:
    """Return the subclass of a model class whose instances are converted.

    It keeps the base's name and module, so transformers applies the base's own key conversions.
    """
    if issubclass(base, _Converted):
        return base

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        _rebuild(self)

    body = {
        "__init__": __init__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_is_stateful": True,
        "base_class": base,
        "config_class": converted_config(base.config_class),
    }
    if not issubclass(base, GenerationMixin):
        return type(base.__name__, (_Converted, base), body)
    prepare = _with_mixers_in_cache(base.prepare_inputs_for_generation)
    body["prepare_inputs_for_generation"] = prepare
    return type(base.__name__, (_Generating, _Converted, base), body)


class _Converted:
    """What converted models do otherwise than their base; mixed into the classes made on the fly."""

    base_class: type[PreTrainedModel]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank_model, (self.base_class,), self.__dict__

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load as the base does, and from the names in files too, where some bases name weights otherwise.

        ``Trainer`` resumes by loading what ``save_pretrained`` wrote in this way, and would leave such
        weights as they were.
        """
        own = self.state_dict()  # type: ignore[attr-defined]
        if not state_dict.keys() <= own.keys():
            in_memory = {id(tensor): name for name, tensor in own.items()}
            in_files = revert_weight_conversion(self, dict(own))  # type: ignore[arg-type]
            names = {file: in_memory.get(id(tensor), file) for file, tensor in in_files.items()}
            state_dict = {names.get(name, name): tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(state_dict, *args, **kwargs)  # type: ignore[misc]

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Set it as the base does, but where no attention layer is left, still build no mask for one."""
        super().set_attn_implementation(*args, **kwargs)  # type: ignore[misc]
        _build_no_masks(self)

    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Save so that a kill or a full disk leaves an older checkpoint in that directory whole."""
        save = functools.partial(super().save_pretrained, is_main_process=is_main_process, **kwargs)  # type: ignore[misc]
        if not is_main_process:
            return save(save_directory)
        if kwargs.get("push_to_hub"):
            save.keywords.setdefault("repo_id", Path(save_directory).name)
        note_settings(self)
        card, name = Path(save_directory) / CARD, Path(save_directory).resolve().name
        with atomic_directory(save_directory, replaces=WEIGHT_FILES) as temporary:
            if not card.exists():
                self._write_card(temporary, name)
            save(temporary)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Upload with the card of a converted model where transformers has put an empty one."""
        if EMPTY_CARD in (Path(working_dir) / CARD).read_text(encoding="utf-8"):
            self._write_card(Path(working_dir), repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)  # type: ignore[misc]

    def _write_card(self, folder: Path, name: str) -> None:
        card = model_card(name, type(self).__name__, _record(self))
        (folder / CARD).write_text(card, encoding="utf-8")


class _Generating:
    """What converted models that generate do otherwise than their base."""

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as the base does, with the prompt's vision layout known to every layer."""
        self._check_chunks(kwargs)
        ids = kwargs.get("input_ids") if inputs is None else inputs
        with self.layout_capture.prompt(self.config, ids, kwargs):  # type: ignore[attr-defined]
            return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def _check_chunks(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse prefill in chunks where this transformers mistakes the positions of models that see."""
        settings = kwargs.get("generation_config") or self.generation_config  # type: ignore[attr-defined]
        asked = kwargs.get("prefill_chunk_size", getattr(settings, "prefill_chunk_size", None))
        config = self.config  # type: ignore[attr-defined]
        sees = config.get_text_config(decoder=True) is not config
        if asked and sees and version.parse(transformers.__version__) < version.parse(CHUNKS_SINCE):
            raise VersionError(
                f"prefill_chunk_size={asked} with a model that sees needs transformers {CHUNKS_SINCE} or newer, "
                f"found {transformers.__version__}, which gets its positions wrong; update it, or prefill whole."
            )


def _with_mixers_in_cache(prepare: Any) -> Any:
    """Let ``prepare_inputs_for_generation`` find the mixers' layers in the cache before it asks for masks.

    A static cache would else turn the padding mask into one of pairs, which mixers cannot read.
    """

    @functools.wraps(prepare)
    def prepare_inputs_for_generation(
        self: Any, input_ids: Any, *args: Any, past_key_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        if isinstance(past_key_values, Cache):
            for index in map(int, _record(self)["layers"]):
                if index < len(past_key_values.layers):
                    mixer_layer(past_key_values, index)
        return prepare(self, input_ids, *args, past_key_values=past_key_values, **kwargs)

    return prepare_inputs_for_generation


@cache
def converted_config(base: Any) -> Any:
    """Return the subclass of a config class whose JSON is recognised as a converted model's."""
    if issubclass(base, _ConvertedConfig):
        return base
    body = {
        "__module__": __name__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "base_class": base,
    }
    return type(base.__name__, (_ConvertedConfig, base), body)


@cache
def _register_auto(base: Any) -> None:
    """Let every Auto class that serves the base config serve its converted config."""
    for auto in _AUTO_CLASSES:
        try:
            served = auto._model_mapping[base]
        except KeyError:
            continue
        served = served[0] if isinstance(served, tuple) else served
        if served.config_class is base:
            auto.register(converted_config(base), converted_model(served), exist_ok=True)


class _ConvertedConfig:
    """What a converted model's config does otherwise than its base."""

    base_class: type[PreTrainedConfig]

    def to_dict(self) -> dict[str, Any]:
        """Write ``model_type: "linmu"`` and the base's as ``base_model_type``."""
        fields = super().to_dict()  # type: ignore[misc]
        return {**fields, "base_model_type": fields["model_type"], "model_type": MODEL_TYPE}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read what :meth:`to_dict` wrote, now or in an older version of the library."""
        fields = {k: v for k, v in config_dict.items() if k != "base_model_type"}
        if record := record_of(fields):
            holder = fields if RECORD in fields else {**fields["text_config"]}
            holder[RECORD] = upgraded(record, "the config")
            fields = fields if RECORD in fields else {**fields, "text_config": holder}
        fields["model_type"] = cls.base_class.model_type
        return super().from_dict(fields, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _restore_config, (self.base_class, self.__dict__.copy())


class LinmuConfig(PreTrainedConfig):
    """Entry of ``AutoConfig`` for converted models; hands over to the base's converted config."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the converted config of ``base_model_type``."""
        base: Any = CONFIG_MAPPING[config_dict["base_model_type"]]
        _register_auto(base)
        return converted_config(base).from_dict(config_dict, **kwargs)


AutoConfig.register(MODEL_TYPE, LinmuConfig, exist_ok=True)


def _blank_model(base: Any) -> Any:
    """Make what a pickled model's fields go into, its class being made on the fly."""
    model_class = converted_model(base)
    return model_class.__new__(model_class)


def _restore_config(base: Any, fields: dict[str, Any]) -> PreTrainedConfig:
    config_class = converted_config(base)
    config = config_class.__new__(config_class)
    config.__dict__.update(fields)
    return config


def _rebuild(model: Any) -> None:
    """Replace the attention of a freshly constructed model as its config's record says."""
    record = _record(model)
    family = family_for(model)
    layers = family.layers(model)
    sections = rotary_sections(model.config.get_text_config(decoder=True))
    for index, entry in record["layers"].items():
        layer = layers[int(index)]
        attention = family.attention(layer)
        if isinstance(attention, MixerAttention):
            continue  # the base made its decoder by an Auto class, which converted it
        cls = get(entry["mixer"])
        mixer = cls(cls.config_class.from_dict(entry["config"]), projections=False)
        adopt_projections(mixer, attention, family)
        setattr(layer, family.attention_name, MixerAttention(mixer, int(index), sections))
    _connect(model, family, record)


def _record(model: Any) -> dict[str, Any]:
    record = getattr(model.config.get_text_config(decoder=True), RECORD, None)
    if record is None:
        raise CheckpointError("the config has no surgery record; it is not of a converted model.")
    return record


def note_settings(model: Any) -> dict[str, Any]:
    """Bring a model's record up to the settings that its mixers have now, which training may change; return it."""
    record = _record(model)
    for module in model.modules():
        if isinstance(module, MixerAttention):
            record["layers"][str(module.layer_idx)]["config"] = module.mixer.config.to_dict()
    return record


def _connect(model: Any, family: Family, record: dict[str, Any]) -> None:
    decoder = model.get_decoder()
    for module in {id(m): m for m in (model, decoder)}.values():
        kept = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
        module._keep_in_fp32_modules_strict = kept | set(FP32_PARAMETERS)
    _build_no_masks(model)
    model.layout_capture = LayoutCapture(family)
    model.layout_capture.attach(model, decoder)


def _build_no_masks(model: Any) -> None:
    record = _record(model)
    if len(record["layers"]) == record["layer_count"]:
        model.config.get_text_config(decoder=True)._attn_implementation_internal = masks.NAME


def _read_config(path: Path) -> dict[str, Any]:
    if (path / NEW_WEIGHTS).exists() and not (path / "config.json").exists():
        raise CheckpointError(
            f"there is no converted model at {path}, but new weights alone: load the teacher, and call "
            "load_new_weights(teacher, path)."
        )
    fields = read_json(path / "config.json")
    if fields.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{path} holds a {fields.get('model_type')!r} model, not a converted one; load it with transformers "
            "and convert it by replace_attention."
        )
    upgraded(record_of(fields), path)
    if fields.get("base_model_type") not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{path / 'config.json'} names the base_model_type {fields.get('base_model_type')!r}, unknown to "
            "transformers; if a package of its own registers it, import that first."
        )
    return fields


def _architecture(path: Path, fields: dict[str, Any]) -> Any:
    name = (fields.get("architectures") or [None])[0]
    served = [
        auto._model_mapping.get(CONFIG_MAPPING[fields["base_model_type"]], ()) for auto in _AUTO_CLASSES
    ]
    registered = [base for some in served for base in (some if isinstance(some, tuple) else (some,))]
    for base in (getattr(transformers, str(name), None), *registered):
        if isinstance(base, type) and issubclass(base, PreTrainedModel) and base.__name__ == name:
            return base
    raise CheckpointError(f"{path / 'config.json'} names the architecture {name!r}, unknown to transformers.")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object that belongs to a checkpoint.

    Raises:
        CheckpointError: It is missing, or damaged.
    """
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        left = older(file.parent)
        hint = f" A save to it was killed; the older model is whole at {left}." if left.exists() else ""
        raise CheckpointError(
            f"there is no converted model at {file.parent}: {file.name} is missing.{hint}"
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{file} is not JSON ({error}); the file is damaged, save the model again."
        ) from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file} holds no JSON object; the file is damaged, save the model again.")
    return fields


def _directory(path: str | Path, **kwargs: Any) -> Path:
    """Return the directory of a checkpoint: what is there, or a copy of a repository of the Hub."""
    folder = Path(path)
    if folder.parent.exists() or not REPOSITORY.fullmatch(str(path)):
        return folder
    try:
        return Path(snapshot_download(str(path), **kwargs))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"there is no converted model at {path}: no such directory, and no such repository on the Hub could be "
            f"read ({error})."
        ) from error


def _check_weights(path: Path, variant: str | None) -> None:
    """Raise CheckpointError unless every weight file that the checkpoint names is there and whole."""
    end = f"{variant}." if variant else ""
    index = path / f"model.safetensors.index.{end}json"
    names = [f"model.{end}safetensors"]
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
    for name in names:
        with open_weights(path / name) as file:
            file.keys()


@contextlib.contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """Open a safetensors file of a checkpoint.

    Raises:
        CheckpointError: It is missing, or damaged.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; the checkpoint is incomplete.") from error
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged or truncated ({error}); copy or save it again.") from error
