"""M-MATE inside ``generate()``: with its cache as without, alone as in a batch, in one turn as in two."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, LogitsProcessor, StaticCache
from transformers.generation.streamers import BaseStreamer

import bridges
import mixers
from tests.bridges import models
from tests.helpers import assert_close

SPECS: dict[str, Any] = {
    "all": {"*": {"mixer": "mmate", "text_window": 6, "window": (2, 2, 2), "chunk_size": 8}},
    "mixed": {"*": {"mixer": "mmate", "text_window": 6, "sinks": 2}, "0": "attention"},
    "first only": {"0": {"mixer": "mmate", "text_window": 6, "rotary": True}},
    "last only": {"-1": {"mixer": "mmate", "text_window": 0, "scan": "raster"}},
}


@pytest.fixture(scope="module", params=models.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=SPECS)
def model(request: pytest.FixtureRequest, family: str) -> Any:
    return models.converted(family, SPECS[request.param])


@pytest.fixture(scope="module")
def linear(family: str) -> Any:
    return models.converted(family, SPECS["all"])


def generated(model: Any, inputs: models.Inputs, **settings: Any) -> tuple[Tensor, Tensor]:
    """Generate, and sample alike each time; see :func:`models.generated`."""
    torch.manual_seed(5)
    return models.generated(model, inputs, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 3},
        {"do_sample": True, "temperature": 2.0, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
    ],
    ids=str,
)
def test_with_a_cache_as_without(family: str, model: Any, settings: dict[str, Any]) -> None:
    inputs = models.batch(family)
    cached = generated(model, inputs, new_tokens=8, **settings)
    plain = generated(model, inputs, new_tokens=8, use_cache=False, **settings)
    assert torch.equal(cached[0], plain[0])
    if "num_beams" not in settings:
        assert_close("logits", plain[1], cached[1], 1e-5)


def test_a_row_as_alone_without_padding(family: str, model: Any) -> None:
    tokens, logits = generated(model, models.batch(family))
    for row in range(len(tokens)):
        alone, alone_logits = generated(model, models.row_of(family, row))
        assert torch.equal(tokens[row], alone[0])
        assert_close(f"row {row}", alone_logits[:, 0], logits[:, row], 1e-5)


def test_padding_is_found_where_no_mask_is_given(family: str, model: Any) -> None:
    inputs = models.batch(family)
    ids_alone = {name: table for name, table in inputs.items() if name != "attention_mask"}
    assert torch.equal(models.generate(model, inputs), models.generate(model, ids_alone))


def test_a_static_cache_may_be_asked_for(family: str, model: Any) -> None:
    inputs = models.batch(family)
    plain = generated(model, inputs)
    static = generated(model, inputs, cache_implementation="static")
    assert torch.equal(plain[0], static[0])
    assert_close("logits", plain[1], static[1], 1e-5)


@pytest.mark.parametrize("make", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=64)])
def test_a_cache_may_be_given(family: str, model: Any, make: Any) -> None:
    inputs = models.batch(family)
    cache = make(config=model.config) if make is DynamicCache else make(model.config)
    assert torch.equal(models.generate(model, inputs, past_key_values=cache), models.generate(model, inputs))


@pytest.mark.parametrize("chunk", [1, 5, 9])
def test_prefill_in_chunks(family: str, model: Any, chunk: int) -> None:
    inputs = (
        models.batch(family)
        if family != "qwen2_5_vl"
        else models.vision_batch([1, 5, 6, 7, 8, 9, 10, 11, 12])
    )
    plain = generated(model, inputs)
    parts = generated(model, inputs, prefill_chunk_size=chunk)
    assert torch.equal(plain[0], parts[0])
    assert_close("logits", plain[1], parts[1], 1e-5)


def test_the_state_is_as_large_as_the_report_says(family: str) -> None:
    model = models.teacher(family)
    report = bridges.replace_attention(model, "mmate")
    inputs = models.batch(family)
    for new_tokens in (2, 12):
        out = models.generate(model, inputs, new_tokens, return_dict_in_generate=True)
        assert bridges.state_bytes(out.past_key_values) == 2 * report.state_bytes
        assert out.past_key_values.get_seq_length() == out.sequences.shape[1] - 1


@pytest.mark.parametrize("passed", ["all", "all but grids", "new ids"])
def test_a_second_turn_as_in_one_pass(family: str, model: Any, passed: str) -> None:
    inputs = models.batch(family)
    first = models.generate(model, inputs, return_dict_in_generate=True)
    more = torch.randint(3, 110, (len(first.sequences), 5), generator=torch.Generator().manual_seed(2))
    ids = torch.cat([first.sequences, more], dim=1)
    beyond = ids.shape[1] - inputs["input_ids"].shape[1]
    longer = {
        name: F.pad(inputs[name], (0, beyond), value=name == "attention_mask")
        for name in ("attention_mask", "mm_token_type_ids")
        if name in inputs
    }
    wanted = generated(model, {**inputs, **longer, "input_ids": ids})
    again = generated(model, inputs, past_key_values=(cache := DynamicCache(config=model.config)))
    assert torch.equal(
        again[0], first.sequences[:, -6:]
    )  # positions of the first turn, which the model keeps
    second = {**longer, "input_ids": ids}
    if passed == "all":
        second |= {name: table for name, table in inputs.items() if "grid" in name}
    elif passed == "new ids":
        second["input_ids"] = ids[:, cache.get_seq_length() :]
    found = generated(model, second, past_key_values=cache)
    assert torch.equal(wanted[0], found[0])
    assert_close("logits", wanted[1], found[1], 1e-5)


def test_a_prefix_may_be_kept_and_continued_twice(family: str, linear: Any) -> None:
    inputs = models.batch(family)
    with torch.no_grad():
        cache = linear(**inputs, use_cache=True).past_key_values
    token = {"input_ids": torch.full((len(inputs["input_ids"]), 1), 9)}
    outputs = [models.logits(linear, token, past_key_values=copy.deepcopy(cache)) for _ in range(2)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("family", ["llama", "qwen2"], scope="module")
def test_embeddings_may_be_given_for_ids(model: Any) -> None:
    inputs = models.text_batch()
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    wanted = generated(model, inputs)
    found = generated(model, {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]})
    assert torch.equal(wanted[0], found[0])
    assert_close("logits", wanted[1], found[1], 1e-5)


@pytest.mark.parametrize(
    "settings", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": None}], ids=["lookup", "assisted"]
)
def test_decoding_that_rolls_back_is_refused(family: str, model: Any, settings: dict[str, Any]) -> None:
    settings = {name: model if value is None else value for name, value in settings.items()}
    with pytest.raises(ValueError, match="stateful"):
        models.generate(model, models.row_of(family, 0), **settings)


def test_it_is_no_assistant_either() -> None:
    teacher = models.teacher("llama")
    with pytest.raises(bridges.CacheError, match=r"cropped|roll"):
        models.generate(teacher, models.row_of("llama", 0), 12, assistant_model=models.converted("llama"))


class Always(LogitsProcessor):
    """Make every next token the same."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -1e9)
        forced[:, self.token] = 0
        return forced


def test_a_generated_vision_token_is_text() -> None:
    """A model may emit the token that stands for an image; there is no image, so it is read as text."""
    model = models.converted("qwen2_5_vl")
    inputs = {"input_ids": torch.tensor([[1, 5, 6, 7, 8]])}
    outputs = [
        model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            logits_processor=[Always(models.IMAGE)],
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_logits=True,
        )
        for use_cache in (True, False)
    ]
    cached, plain = (torch.stack(out.logits) for out in outputs)
    assert_close("logits", plain, cached, 1e-5)


def test_guidance_by_another_prompt_does_not_take_the_prompts_layout() -> None:
    """Classifier-free guidance runs another prompt through the same model while it generates."""
    model = models.converted("qwen2_5_vl")
    negative = torch.tensor([[7, 8, 9, 10, 11, 12]])
    with models.layouts(model) as seen:
        settings = {"guidance_scale": 1.5, "negative_prompt_ids": negative, "use_cache": False}
        models.generate(model, models.row_of("qwen2_5_vl", 1), 2, **settings)
    assert {(layout.length, layout.clip is None) for layout in seen} == {
        (23, False),
        (6, True),
        (24, False),
        (7, True),
    }


def test_a_cut_through_an_image_is_refused() -> None:
    model, inputs = models.converted("qwen2_5_vl"), models.batch("qwen2_5_vl")
    with pytest.raises(mixers.LayoutError, match="goes through a clip"):
        models.generate(model, inputs, prefill_chunk_size=7)
    assert models.generate(model, inputs).shape[1] > inputs["input_ids"].shape[1]


def test_chunks_that_end_between_images() -> None:
    model = models.converted("qwen2_5_vl", SPECS["all"])
    inputs = models.vision_batch([*models.IMAGE_ROW, 9, 10], [*models.IMAGE_ROW[:-1], 8, 3, 4])
    wanted, found = generated(model, inputs), generated(model, inputs, prefill_chunk_size=9)
    assert torch.equal(wanted[0], found[0])
    assert_close("logits", wanted[1], found[1], 1e-5)


def test_compiled_as_eager() -> None:
    """Layouts are worked out outside of what is traced: two batches padded otherwise share it."""
    model = models.converted("llama", SPECS["all"])
    compiled = torch.compile(model, backend="eager")
    for pads in ((0, 5), (3, 0)):
        inputs = models.text_batch(pads=pads)
        with torch.no_grad():
            found = compiled(**inputs).logits
        assert torch.equal(
            models.at_tokens(found, inputs), models.at_tokens(models.logits(model, inputs), inputs)
        )


def test_tokens_may_be_streamed() -> None:
    class Streamer(BaseStreamer):
        def __init__(self) -> None:
            self.parts: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.parts.append(value.reshape(-1))

        def end(self) -> None:
            self.parts.append(torch.tensor([], dtype=torch.long))

    model, inputs, streamer = models.converted("llama"), models.row_of("llama", 0), Streamer()
    whole = models.generate(model, inputs, streamer=streamer)
    assert torch.equal(torch.cat(streamer.parts), whole[0])
