from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import bridges
from tests.bridges import models
from tests.helpers import assert_close


@pytest.fixture(scope="module")
def model() -> Any:
    return models.converted("llama", {"*": {"mixer": "mmate", "text_window": 5}})


@pytest.fixture
def cache(model: Any) -> DynamicCache:
    with torch.no_grad():
        return model(**models.text_batch(), use_cache=True).past_key_values


NEXT = torch.tensor([[9], [30]])


def after(model: Any, cache: DynamicCache, ids: torch.Tensor = NEXT) -> torch.Tensor:
    """Logits of the next tokens; the cache is left as it was."""
    return models.logits(model, {"input_ids": ids}, past_key_values=copy.deepcopy(cache))


def test_every_layer_holds_a_state(cache: DynamicCache) -> None:
    assert [type(layer) for layer in cache.layers] == [bridges.MixerCacheLayer] * 2
    assert cache.get_seq_length() == 20
    assert cache.get_max_length() == -1
    assert not cache.is_compileable
    for layer in cache.layers:
        assert {len(t) for t in layer.state.values()} == {2}
        assert not any(t.requires_grad for t in layer.state.values())


def test_beams_are_reordered(model: Any, cache: DynamicCache) -> None:
    wanted = after(model, cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert_close("row 1 twice", wanted[[1, 1]], after(model, cache, NEXT[[1, 1]]), 1e-6)


def test_rows_are_repeated_and_selected(model: Any, cache: DynamicCache) -> None:
    wanted = after(model, cache)
    cache.batch_repeat_interleave(2)
    assert_close("repeated", wanted[[0, 0, 1, 1]], after(model, cache, NEXT[[0, 0, 1, 1]]), 1e-6)
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert_close("selected", wanted[[1, 0]], after(model, cache, NEXT[[1, 0]]), 1e-6)


def test_reset_forgets(model: Any, cache: DynamicCache) -> None:
    inputs = models.text_batch()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_close(
        "logits", models.logits(model, inputs), models.logits(model, inputs, past_key_values=cache), 1e-6
    )


def test_offloading_moves_the_state(cache: DynamicCache, model: Any) -> None:
    wanted = after(model, cache)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert torch.equal(after(model, cache), wanted)


def test_it_does_not_roll_back(cache: DynamicCache) -> None:
    before = copy.deepcopy(cache.layers[0].state)
    for tokens in (-1, -20, 3):
        with pytest.raises(bridges.CacheError, match="cannot be cropped"):
            cache.crop(tokens)
    cache.crop(0)  # nothing to remove
    with pytest.raises(bridges.CacheError, match="assisted decoding"):
        cache.layers[0].activate_past_recording()
    assert all(torch.equal(t, before[name]) for name, t in cache.layers[0].state.items())
    assert cache.get_seq_length() == 20


def test_keys_and_values_do_not_go_where_a_state_is(cache: DynamicCache) -> None:
    keys = torch.zeros(2, 2, 1, 16)
    with pytest.raises(bridges.CacheError, match="keys and values"):
        cache.update(keys, keys, 0)
    with pytest.raises(bridges.CacheError, match="keys and values"):
        models.logits(models.teacher("llama"), {"input_ids": NEXT}, past_key_values=cache)


def test_a_state_does_not_go_where_keys_and_values_are(model: Any) -> None:
    with torch.no_grad():
        cache = models.teacher("llama")(**models.text_batch(), use_cache=True).past_key_values
    with pytest.raises(bridges.CacheError, match="another model"):
        models.logits(model, {"input_ids": NEXT}, past_key_values=cache)


def test_a_state_of_other_rows_is_refused(model: Any, cache: DynamicCache) -> None:
    with pytest.raises(ValueError, match="batch size"):
        models.logits(model, {"input_ids": NEXT[:1]}, past_key_values=cache)


def test_a_cache_from_inference_mode_may_be_continued_outside(model: Any) -> None:
    inputs = models.text_batch()
    with torch.inference_mode():
        cache = model(**inputs, use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([0, 1]))
    with torch.no_grad():
        wanted = model(**inputs, use_cache=True).past_key_values
    assert_close(
        "logits", after(model, wanted), models.logits(model, {"input_ids": NEXT}, past_key_values=cache), 1e-6
    )


def test_no_cache_is_written_while_training() -> None:
    model = models.converted("llama").train()
    out = model(**models.text_batch(), use_cache=True)
    assert bridges.state_bytes(out.past_key_values) == 0
    out.logits.sum().backward()


def test_gradients_in_evaluation_do_not_need_the_cache_off(model: Any) -> None:
    grads = []
    for use_cache in (True, False):
        embeddings = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        model(inputs_embeds=embeddings, use_cache=use_cache).logits.square().sum().backward()
        grads.append(embeddings.grad)
    model.zero_grad()
    assert_close("gradient", grads[1], grads[0], 1e-5)


@pytest.mark.parametrize("spec", ["mmate", "mamba2", "sliding_window", "attention", {"0": "mmate"}], ids=str)
def test_token_by_token_as_in_one_pass(spec: Any) -> None:
    model, ids = models.converted("qwen2", spec), models.text_batch(pads=(0, 0))["input_ids"]
    wanted = models.logits(model, {"input_ids": ids})
    cache, steps = DynamicCache(config=model.config), []
    for token in ids.split(1, dim=1):
        steps.append(models.logits(model, {"input_ids": token}, past_key_values=cache))
    assert_close("logits", wanted, torch.cat(steps, dim=1), 1e-5)
