"""Mixers as torch modules: types, devices, copies, checkpoints, recomputation."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mixers import TokenLayout, TokenMixer
from tests.helpers import assert_close, relative_rms
from tests.mixers.zoo import TINY, VARIANTS, random_rotary, tiny

every_variant = pytest.mark.parametrize("variant", VARIANTS)


def example(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, TokenLayout, tuple[torch.Tensor, ...]]:
    torch.manual_seed(1)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, :4] = False
    layout = TokenLayout.from_grids(30, [[(8, (2, 3, 3))], [(1, (3, 2, 2)), (20, (1, 2, 2))]], valid=mask)
    return torch.randn(2, 30, TINY["dim"]).to(dtype), layout, random_rotary(2, 30)


def rates(mixer: TokenMixer) -> list[torch.Tensor]:
    return [p for name, p in mixer.named_parameters() if ".rates." in name]


@every_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights(variant: str, dtype: torch.dtype) -> None:
    """A model in bf16 runs in bf16, is near its fp32 self, and keeps its decay rates fp32."""
    wide = tiny(variant)
    narrow = copy.deepcopy(wide).to(dtype)
    assert all(p.dtype == torch.float32 for p in rates(narrow))
    assert all(torch.equal(p, q) for p, q in zip(rates(wide), rates(narrow)))
    others = [p for n, p in narrow.named_parameters() if ".rates." not in n]
    assert all(p.dtype == dtype for p in others)
    x, layout, rotary = example(dtype)
    y = narrow(x, layout, rotary)
    assert y.dtype == dtype
    want = wide(x.float(), layout, rotary)
    mask = layout.valid
    assert torch.isfinite(y).all()
    assert relative_rms(want[mask], y[mask]) < (3e-2 if dtype == torch.bfloat16 else 4e-3)
    y.float().square().mean().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in narrow.parameters())


@every_variant
def test_autocast(variant: str) -> None:
    mixer = tiny(variant)
    x, layout, rotary = example()
    want = mixer(x, layout, rotary)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixer(x, layout, rotary)
    assert y.dtype == torch.bfloat16
    assert relative_rms(want[layout.valid], y[layout.valid]) < 3e-2
    y.float().square().mean().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in mixer.parameters())


@every_variant
def test_narrow_decoding(variant: str) -> None:
    """In bf16, prefill and single tokens stay near one pass, with sums kept in fp32."""
    mixer = tiny(variant).to(torch.bfloat16)
    x, rotary = torch.randn(2, 12, TINY["dim"]).bfloat16(), random_rotary(2, 12)
    state = mixer.init_state(2, dtype=torch.bfloat16)
    assert all(t.dtype == torch.float32 for name, t in state.items() if name.endswith("ssd"))
    with torch.no_grad():
        whole = mixer(x, rotary=rotary)
        parts = [
            mixer(x[:, a:b], rotary=tuple(t[:, a:b] for t in rotary), state=state)
            for a, b in ((0, 8), (8, 9), (9, 10), (10, 11), (11, 12))
        ]
    found = torch.cat(parts, dim=1)
    assert found.dtype == torch.bfloat16
    assert relative_rms(whole, found) < 2e-2


@every_variant
def test_meta_then_memory(variant: str) -> None:
    """Built without memory, given memory, loaded: the same mixer."""
    real = tiny(variant)
    with torch.device("meta"):
        empty = tiny(variant)
    assert all(p.is_meta for p in empty.parameters())
    empty.to_empty(device="cpu").load_state_dict(real.state_dict())
    x, layout, rotary = example()
    assert torch.equal(empty(x, layout, rotary), real(x, layout, rotary))


@every_variant
def test_copies_and_files(variant: str) -> None:
    mixer = tiny(variant)
    x, layout, rotary = example()
    mixer(x, layout, rotary, mixer.init_state(2))
    want = mixer(x, layout, rotary)
    file = io.BytesIO()
    torch.save(mixer.state_dict(), file)
    file.seek(0)
    loaded = tiny(variant, seed=7)
    assert not torch.equal(loaded(x, layout, rotary), want)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer)), loaded):
        assert torch.equal(other(x, layout, rotary), want)
        assert other.config == mixer.config


@every_variant
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_gives_the_same_gradients(variant: str, reentrant: bool, small_blocks: None) -> None:
    """Under gradient checkpointing, with the layout passed along, gradients are equal to the bit."""
    x, layout, rotary = example()
    found = []
    for recompute in (False, True):
        mixer, leaf = (
            tiny(variant, chunk_size=4) if "chunk_size" in VARIANTS[variant][1] else tiny(variant),
            x.clone(),
        )
        leaf.requires_grad_()
        if recompute:
            fresh = pickle.loads(pickle.dumps(layout))
            y = checkpoint(mixer, leaf, fresh, rotary, use_reentrant=reentrant)
        else:
            y = mixer(leaf, layout, rotary)
        y.square().sum().backward()
        found.append([leaf.grad, *(p.grad for p in mixer.parameters())])
    for a, b in zip(*found):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@every_variant
def test_every_parameter_learns(variant: str) -> None:
    mixer = tiny(variant)
    x, layout, rotary = example()
    mixer(x, layout, rotary).square().sum().backward()
    dead = [n for n, p in mixer.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias on keys shifts all scores of a softmax alike.
    assert [n for n in dead if not n.endswith("k_proj.bias")] == []


@every_variant
def test_gradients_equal_finite_differences(variant: str) -> None:
    mixer = tiny(variant, dtype=torch.float64)
    layout = TokenLayout.from_grids(7, [[(2, (1, 2, 2))]], valid=torch.tensor([[False] + [True] * 6]))
    x = torch.randn(1, 7, TINY["dim"], dtype=torch.float64, requires_grad=True)
    rotary = random_rotary(1, 7, torch.float64)
    direction, weigh = torch.randn_like(x), torch.randn(1, 7, TINY["dim"], dtype=torch.float64)
    weigh[0, 0] = 0

    def loss(t: torch.Tensor) -> torch.Tensor:
        return (mixer(t, layout, rotary) * weigh).sum()

    (gradient,) = torch.autograd.grad(loss(x), x)
    step = 1e-5
    with torch.no_grad():
        slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    assert_close("slope", slope, (gradient * direction).sum(), 1e-6)
    assert not gradient[0, 0].any()


@every_variant
def test_x_is_left_alone(variant: str) -> None:
    mixer = tiny(variant)
    x, layout, rotary = example()
    before = [x.clone(), *(t.clone() for t in rotary)]
    mixer(x, layout, rotary, mixer.init_state(2))
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *rotary)))
