from __future__ import annotations

import copy
import errno
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
)

import bridges
from tests.bridges import models
from tests.helpers import assert_close

SPECS: dict[str, Any] = {
    "mmate": {"*": {"mixer": "mmate", "text_window": 6, "window": (2, 2, 2)}},
    "own projections": {"*": {"mixer": "mmate", "share_projections": False}},
    "mixed": {"*": "mmate", "0": "attention"},
    "partial": {"1": {"mixer": "gated", "branches": {"mamba2": {}, "sliding_window": {"window": 3}}}},
}


@pytest.fixture(scope="module")
def llama() -> Any:
    return models.converted("llama")


@pytest.fixture(scope="module")
def saved(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded checkpoint, not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    llama.save_pretrained(folder, max_shard_size="60KB")
    return folder


def assert_same_model(ours: Any, theirs: Any, inputs: models.Inputs) -> None:
    """Equal bit for bit in every weight; outputs too, up to how far a file aligns them for the kernels."""
    wanted = theirs.state_dict()
    found = ours.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert_close("logits", models.logits(theirs, inputs), models.logits(ours, inputs), 1e-6)


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("spec", SPECS)
def test_round_trip(family: str, spec: str, tmp_path: Path) -> None:
    model, inputs = models.converted(family, SPECS[spec]), models.batch(family)
    model.save_pretrained(tmp_path / "m")
    loaded = bridges.load_pretrained(tmp_path / "m")
    assert not loaded.training
    assert type(loaded) is type(model)
    assert type(loaded.config) is type(model.config)
    assert_same_model(loaded, model, inputs)
    assert torch.equal(models.generate(loaded, inputs), models.generate(model, inputs))
    loaded.save_pretrained(tmp_path / "again")
    assert_same_model(bridges.load_pretrained(tmp_path / "again"), model, inputs)
    with pytest.raises(bridges.AlreadyConvertedError):
        bridges.replace_attention(loaded)


@pytest.mark.parametrize(
    ("family", "auto"),
    [
        ("llama", AutoModelForCausalLM),
        ("qwen2", AutoModelForCausalLM),
        ("qwen2_5_vl", AutoModelForImageTextToText),
    ],
)
def test_auto_classes(family: str, auto: Any, tmp_path: Path) -> None:
    model, inputs = models.converted(family), models.batch(family)
    model.save_pretrained(tmp_path / "m", max_shard_size="60KB")
    assert_same_model(auto.from_pretrained(tmp_path / "m"), model, inputs)
    config = AutoConfig.from_pretrained(tmp_path / "m")
    assert type(config) is type(model.config)
    base = AutoModel.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        hidden = base(**inputs).last_hidden_state
        wanted = model.model(**inputs).last_hidden_state
    assert_close("hidden", models.at_tokens(wanted, inputs), models.at_tokens(hidden, inputs), 1e-6)


@pytest.mark.parametrize("cls", [LlamaModel, LlamaForSequenceClassification])
def test_other_heads_round_trip(cls: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.converted(models.shake(cls(LlamaConfig(**models.text_fields()))).eval())
    model.save_pretrained(tmp_path / "m")
    auto = AutoModel if cls is LlamaModel else AutoModelForSequenceClassification
    for load in (bridges.load_pretrained, auto.from_pretrained):
        loaded = load(tmp_path / "m")
        assert type(loaded) is type(model)
        with torch.no_grad():
            wanted, found = (one(**models.text_batch())[0] for one in (model, loaded))
        assert_close(cls.__name__, wanted, found, 1e-6)


def test_many_shards(llama: Any, saved: Path) -> None:
    assert len(list(saved.glob("model-*.safetensors"))) > 3
    assert_same_model(bridges.load_pretrained(saved), llama, models.text_batch())


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_device_maps(llama: Any, saved: Path, device_map: Any) -> None:
    assert_same_model(bridges.load_pretrained(saved, device_map=device_map), llama, models.text_batch())


def test_rates_stay_fp32_in_another_dtype(llama: Any, saved: Path) -> None:
    for load in (bridges.load_pretrained, AutoModelForCausalLM.from_pretrained):
        loaded = load(saved, dtype=torch.bfloat16)
        for name, parameter in loaded.named_parameters():
            rate = name.split(".")[-1] in ("A_log", "dt_bias")
            assert parameter.dtype == (torch.float32 if rate else torch.bfloat16), name
            if rate:
                assert torch.equal(parameter, llama.get_parameter(name))
        wanted, found = (models.logits(m, models.text_batch()) for m in (llama, loaded))
        assert_close("logits", wanted, found.float(), 0.05)


def test_a_bfloat16_model_is_saved_as_such(tmp_path: Path) -> None:
    model = models.converted(models.teacher("llama").to(torch.bfloat16))
    model.save_pretrained(tmp_path / "m")
    loaded = bridges.load_pretrained(tmp_path / "m")
    assert {n: p.dtype for n, p in loaded.named_parameters()} == {
        n: p.dtype for n, p in model.named_parameters()
    }


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = models.converted(models.llama(tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "m")
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")
    loaded = bridges.load_pretrained(tmp_path / "m")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same_model(loaded, model, models.text_batch())


def test_the_vision_tower_may_have_another_implementation(tmp_path: Path) -> None:
    model = models.converted("qwen2_5_vl")
    model.save_pretrained(tmp_path / "m")
    loaded = bridges.load_pretrained(tmp_path / "m", attn_implementation="eager")
    assert loaded.config.vision_config._attn_implementation == "eager"
    assert loaded.config.text_config._attn_implementation == "linmu"


def test_weights_load_by_their_names_in_files_too(tmp_path: Path) -> None:
    """As ``Trainer`` does it when it resumes; Qwen2.5-VL's are named otherwise in memory."""
    model, other = models.converted("qwen2_5_vl"), models.converted("qwen2_5_vl", seed=9)
    models.shake(other, seed=9)
    model.save_pretrained(tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    assert not weights.keys() <= model.state_dict().keys()
    other.load_state_dict(weights)
    assert_same_model(other, model, models.batch("qwen2_5_vl"))
    other.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="extra"):
        other.load_state_dict({**weights, "model.extra": torch.zeros(1)})


def test_branches_that_are_active_stay_so(tmp_path: Path) -> None:
    model = models.converted("qwen2_5_vl")
    for attention in bridges.attention_layers(model).values():
        attention.mixer.set_active(("flex_ma",))
    model.save_pretrained(tmp_path / "m")
    loaded = bridges.load_pretrained(tmp_path / "m")
    assert all(a.mixer.config.active == ("flex_ma",) for a in bridges.attention_layers(loaded).values())
    assert_same_model(loaded, model, models.batch("qwen2_5_vl"))


def as_json(config: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(config.to_dict())), "_name_or_path": ""}


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
def test_an_older_format_is_read(family: str, tmp_path: Path) -> None:
    """Version 1 said nothing of the teacher, and until version 2 `mmate` might not name its sinks: it had none."""
    model = models.converted(family, sinks=0)
    model.save_pretrained(tmp_path)

    def as_in_version_1(fields: dict[str, Any]) -> None:
        record = fields.get("linmu") or fields["text_config"]["linmu"]
        record["version"] = 1
        del record["teacher"]
        for layer in record["layers"].values():
            del layer["config"]["sinks"]

    edit(tmp_path / "config.json", as_in_version_1)
    for load in (bridges.load_pretrained, type(model).from_pretrained):
        loaded = load(tmp_path)
        assert_same_model(loaded, model, models.batch(family))
        assert loaded.config.get_text_config().linmu["version"] == 3


class TestCard:
    def test_it_says_what_was_replaced_and_whence(self, tmp_path: Path) -> None:
        teacher = models.teacher("llama")
        teacher.config._name_or_path = "someone/a-llama"
        model = models.converted(teacher, {"1": "mmate"})
        model.save_pretrained(tmp_path / "student")
        card = (tmp_path / "student" / "README.md").read_text()
        assert "base_model: someone/a-llama" in card
        assert "| 1 | `mmate` |" in card
        assert "| 0 | nothing" in card
        assert 'bridges.load_pretrained("student")' in card

    def test_a_local_path_is_not_told(self, tmp_path: Path) -> None:
        models.teacher("llama").save_pretrained(tmp_path / "secret" / "tiny")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "secret" / "tiny")
        models.converted(model).save_pretrained(tmp_path / "student")
        card = (tmp_path / "student" / "README.md").read_text()
        assert "`tiny`" in card
        assert "secret" not in card
        assert "base_model" not in card

    @pytest.mark.parametrize("there", ["This model card has been automatically generated.", "mine"])
    def test_it_is_pushed_unless_the_repository_has_one(
        self, llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
    ) -> None:
        class Card:
            def save(self, path: str) -> None:
                Path(path).write_text(there)

        class Hub:
            create_repo = staticmethod(lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))

        pushed: list[str] = []
        monkeypatch.setattr(transformers.modeling_utils, "hf_api", Hub)
        monkeypatch.setattr(transformers.modeling_utils, "create_and_tag_model_card", lambda *_, **__: Card())
        monkeypatch.setattr(
            transformers.PreTrainedModel,
            "_upload_modified_files",
            lambda model, folder, *_, **__: pushed.append((Path(folder) / "README.md").read_text()),
        )
        llama.save_pretrained(tmp_path / "m", push_to_hub=True, repo_id="me/student")
        expected = 'bridges.load_pretrained("me/student")' if there != "mine" else "mine"
        assert expected in pushed[0]

    def test_one_that_is_there_stays(self, llama: Any, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text("mine")
        llama.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == "mine"


class TestConfig:
    @pytest.mark.parametrize("family", models.FAMILIES)
    def test_its_json(self, family: str, tmp_path: Path) -> None:
        model = models.converted(family, {"*": "mmate", "0": "attention"})
        model.save_pretrained(tmp_path)  # an empty directory that is there already
        fields = json.loads((tmp_path / "config.json").read_text())
        assert fields["model_type"] == "linmu"
        assert fields["base_model_type"] == family
        record = fields.get("linmu") or fields["text_config"]["linmu"]
        assert record["version"] == 3
        assert record["teacher"] is None
        assert {i: layer["mixer"] for i, layer in record["layers"].items()} == {
            "0": "attention",
            "1": "mmate",
        }
        assert as_json(AutoConfig.from_pretrained(tmp_path)) == as_json(model.config)

    @pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
    @pytest.mark.parametrize(
        "twin", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "pickle"]
    )
    def test_copies(self, family: str, twin: Callable[[Any], Any]) -> None:
        config = models.converted(family).config
        other = twin(config)
        assert type(other) is type(config)
        assert other.to_dict() == config.to_dict()
        assert json.loads(other.to_json_string())["model_type"] == "linmu"

    def test_a_model_of_a_config_alone(self) -> None:
        model = models.converted("llama")
        other = AutoModelForCausalLM.from_config(model.config)
        assert type(other) is type(model)
        other.load_state_dict(model.state_dict())
        assert_same_model(other.eval(), model, models.text_batch())


class TestSavingOver:
    def test_fewer_shards_leave_no_stale_one(self, llama: Any, saved: Path, tmp_path: Path) -> None:
        llama.save_pretrained(tmp_path / "m", max_shard_size="60KB")
        (tmp_path / "m" / "tokenizer.json").write_text("{}")
        other = models.converted("llama", seed=9)
        other.save_pretrained(tmp_path / "m")
        assert names(tmp_path / "m") == {
            "README.md",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
        }
        assert names(tmp_path) == {"m"}
        assert_same_model(bridges.load_pretrained(tmp_path / "m"), other, models.text_batch())

    def test_more_shards_leave_no_stale_file(self, llama: Any, tmp_path: Path) -> None:
        models.converted("llama", seed=9).save_pretrained(tmp_path / "m")
        llama.save_pretrained(tmp_path / "m", max_shard_size="60KB")
        assert "model.safetensors" not in names(tmp_path / "m")
        assert_same_model(bridges.load_pretrained(tmp_path / "m"), llama, models.text_batch())

    @pytest.mark.parametrize("existing", [False, True])
    @pytest.mark.parametrize("failing", ["first file", "third file", "config"])
    def test_a_full_disk_leaves_the_older_one(
        self, llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool, failing: str
    ) -> None:
        if existing:
            llama.save_pretrained(tmp_path / "m", max_shard_size="60KB")
        written = []
        full = OSError(errno.ENOSPC, "No space left on device")

        def write(tensors: Any, file: Any, **kwargs: Any) -> None:
            written.append(file)
            if len(written) == {"first file": 1, "third file": 3}.get(failing):
                Path(file).write_bytes(b"half")
                raise full
            save_file(tensors, file, **kwargs)

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise full

        monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", write)
        if failing == "config":
            monkeypatch.setattr(transformers.GenerationConfig, "save_pretrained", refuse)
        with pytest.raises(OSError, match="No space left"):
            models.converted("llama", seed=9).save_pretrained(tmp_path / "m", max_shard_size="60KB")
        monkeypatch.undo()
        assert names(tmp_path) == ({"m"} if existing else set())
        if existing:
            assert_same_model(bridges.load_pretrained(tmp_path / "m"), llama, models.text_batch())

    def test_a_process_that_is_not_the_main_one_writes_nothing(self, llama: Any, tmp_path: Path) -> None:
        llama.save_pretrained(tmp_path / "m")
        before = {f.name: f.read_bytes() for f in (tmp_path / "m").iterdir()}
        models.converted("llama", seed=9).save_pretrained(tmp_path / "m", is_main_process=False)
        assert {f.name: f.read_bytes() for f in (tmp_path / "m").iterdir()} == before

    def test_a_repository_is_named_after_the_directory(
        self, llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Hub:
            def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
                raise RuntimeError(repo_id)

        monkeypatch.setattr(transformers.modeling_utils, "hf_api", Hub)
        with pytest.raises(RuntimeError, match=r"^my-model$"):
            llama.save_pretrained(tmp_path / "my-model", push_to_hub=True)
        with pytest.raises(RuntimeError, match=r"^me/other$"):
            llama.save_pretrained(tmp_path / "my-model", push_to_hub=True, repo_id="me/other")


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def without_a_weight(folder: Path) -> None:
    file = next(f for f in folder.glob("model-*.safetensors") if any("gate" in n for n in load_file(f)))
    kept = {name: t for name, t in load_file(file).items() if "gate" not in name}
    save_file(kept, file, metadata={"format": "pt"})


def with_a_weight_more(folder: Path) -> None:
    save_file(
        {**load_file(shard(folder)), "model.extra": torch.zeros(2)}, shard(folder), metadata={"format": "pt"}
    )
    edit(
        folder / "model.safetensors.index.json",
        lambda f: f["weight_map"].update({"model.extra": shard(folder).name}),
    )


def with_another_shape(folder: Path) -> None:
    edit(folder / "config.json", lambda f: f.update(intermediate_size=100))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "half a config": (lambda d: cut(d / "config.json", 200), "not JSON"),
    "bytes for a config": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), "not JSON"),
    "a list for a config": (lambda d: (d / "config.json").write_text("[]"), "no JSON object"),
    "not converted": (
        lambda d: edit(d / "config.json", lambda f: f.update(model_type="llama")),
        "not a converted one",
    ),
    "a newer format": (
        lambda d: edit(d / "config.json", lambda f: f["linmu"].update(version=4)),
        "update linmu",
    ),
    "no record": (lambda d: edit(d / "config.json", lambda f: f.pop("linmu")), "format version None"),
    "no base": (
        lambda d: edit(d / "config.json", lambda f: f.pop("base_model_type")),
        "base_model_type None",
    ),
    "an unknown base": (
        lambda d: edit(d / "config.json", lambda f: f.update(base_model_type="lama")),
        "'lama'",
    ),
    "no class": (lambda d: edit(d / "config.json", lambda f: f.pop("architectures")), "architecture None"),
    "no model's class": (
        lambda d: edit(d / "config.json", lambda f: f.update(architectures=["pipeline"])),
        "'pipeline'",
    ),
    "a shard less": (lambda d: shard(d).unlink(), "is missing; the checkpoint is incomplete"),
    "half a shard": (lambda d: cut(shard(d), shard(d).stat().st_size // 2), "damaged or truncated"),
    "an empty shard": (lambda d: cut(shard(d), 0), "damaged or truncated"),
    "half an index": (lambda d: cut(d / "model.safetensors.index.json", 300), "not JSON"),
    "no index": (lambda d: (d / "model.safetensors.index.json").unlink(), "model.safetensors is missing"),
    "a weight less": (without_a_weight, "gate"),
    "a weight more": (with_a_weight_more, "model.extra"),
    "another shape": (with_another_shape, "does not hold"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused(saved: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    break_it, words = DAMAGE[damage]
    break_it(folder)
    with pytest.raises(bridges.CheckpointError, match=words):
        bridges.load_pretrained(folder)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(bridges.CheckpointError, match="no converted model"):
            bridges.load_pretrained(path)
    models.teacher("llama").save_pretrained(tmp_path / "teacher")
    with pytest.raises(bridges.CheckpointError, match="'llama' model, not a converted one"):
        bridges.load_pretrained(tmp_path / "teacher")


def same(ours: Any, theirs: Any) -> bool:
    found, wanted = ours.state_dict(), theirs.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[name], t) for name, t in wanted.items())


def test_a_repository_of_the_hub_is_loaded(
    llama: Any, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(name: str, **kwargs: Any) -> str:
        asked.append((name, kwargs))
        if name != "me/student":
            raise OSError("404")
        return str(saved)

    monkeypatch.setattr(bridges.pretrained, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert same(bridges.load_pretrained("me/student", revision="v2"), llama)
    with pytest.raises(bridges.CheckpointError, match="no such repository on the Hub"):
        bridges.load_pretrained("me/nothing")
    assert asked == [("me/student", {"revision": "v2"}), ("me/nothing", {})]
    (tmp_path / "runs").mkdir()
    with pytest.raises(bridges.CheckpointError, match=r"config\.json is missing"):
        bridges.load_pretrained("runs/student")
    assert len(asked) == 2


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_a_variant_is_loaded_by_its_name(llama: Any, size: str, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "m", variant="fp16", max_shard_size=size)
    assert same(bridges.load_pretrained(tmp_path / "m", variant="fp16"), llama)
    with pytest.raises(bridges.CheckpointError, match="safetensors is missing"):
        bridges.load_pretrained(tmp_path / "m")


def test_a_save_that_was_killed_is_pointed_to(llama: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "m")
    (tmp_path / "m").rename(tmp_path / ".m.old")
    with pytest.raises(bridges.CheckpointError, match=r"whole at .*\.m\.old"):
        bridges.load_pretrained(tmp_path / "m")


def through_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl"])
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch])
def test_a_whole_model_may_be_copied_and_pickled(family: str, twin: Callable[[Any], Any]) -> None:
    model, inputs = models.converted(family), models.batch(family)
    again = twin(model)
    assert type(again) is type(model)
    assert again.layout_capture is not model.layout_capture
    assert_same_model(again, model, inputs)
    assert torch.equal(models.generate(again, inputs), models.generate(model, inputs))
