"""On a CUDA device every mixer gives what it gives on the CPU: values, gradients, states, bf16."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from mixers import TokenLayout, TokenMixer
from tests.helpers import assert_close
from tests.mixers.zoo import AVERAGES, TINY, VARIANTS, random_rotary, tiny

pytestmark = pytest.mark.gpu
every_variant = pytest.mark.parametrize("variant", VARIANTS)
LENGTH = 150


@pytest.fixture(autouse=True)
def _full_precision() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def mixed_layout() -> TokenLayout:
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[1, :9] = False
    return TokenLayout.from_grids(LENGTH, [[(3, (3, 4, 5)), (70, (2, 3, 3))], [(20, (4, 5, 6))]], valid=valid)


def gradients(
    mixer: TokenMixer, x: Tensor, layout: TokenLayout, rotary: tuple[Tensor, Tensor]
) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    y = mixer(leaf, layout, rotary)
    kept = torch.ones_like(y[..., 0]) if layout.valid is None else layout.valid.to(y)
    weight = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y)
    grads = torch.autograd.grad(
        (y * weight * kept[..., None]).sum(), [leaf, *mixer.parameters()], allow_unused=True
    )
    return [y * kept[..., None], *(g for g in grads if g is not None)]


@every_variant
@pytest.mark.parametrize("layer", range(2))
def test_values_and_gradients(variant: str, layer: int) -> None:
    layout, rotary = mixed_layout(), random_rotary(2, LENGTH, torch.float64)
    exact = tiny(variant, layer_idx=layer, dtype=torch.float64)
    x = torch.randn(2, LENGTH, TINY["dim"], dtype=torch.float64)
    expected = gradients(exact, x, layout, rotary)
    on_gpu = copy.deepcopy(exact).float().cuda()
    found = gradients(on_gpu, x.float().cuda(), layout.to("cuda"), tuple(t.float().cuda() for t in rotary))
    names = ["y", "x", *(name for name, _ in exact.named_parameters())]
    assert len(found) == len(expected)
    for number, (a, b) in enumerate(zip(expected, found)):
        name = names[number] if len(names) == len(expected) else f"tensor {number}"
        # A_log's gradient is a difference of sums over all tokens that nearly cancel.
        assert_close(f"{variant}, {name}", a, b.cpu(), 1e-3 if name.endswith("A_log") else 2e-5)


@pytest.mark.parametrize("variant", AVERAGES)
@pytest.mark.parametrize("layer", range(2))
def test_attention_weights(variant: str, layer: int) -> None:
    """They are the CPU's, and their gradients too."""
    layout, rotary = mixed_layout(), random_rotary(2, LENGTH, torch.float64)
    exact = tiny(variant, layer_idx=layer, dtype=torch.float64)
    x, queries = torch.randn(2, LENGTH, TINY["dim"], dtype=torch.float64), torch.randint(10, LENGTH, (2, 30))
    on_gpu = copy.deepcopy(exact).float().cuda()
    found = {}
    for mixer in (exact, on_gpu):
        like = mixer.q_proj.weight
        weights = mixer.attention_weights(
            x.to(like), queries.to(like.device), layout.to(like.device), tuple(t.to(like) for t in rotary)
        )
        slope = torch.cos(torch.arange(weights.numel(), dtype=torch.float64)).view(weights.shape).to(weights)
        (weights * slope).sum().backward()
        grads = {name: p.grad for name, p in mixer.named_parameters() if p.grad is not None}
        found[like.device.type] = {"weights": weights.detach(), **grads}
    assert found["cpu"].keys() == found["cuda"].keys()
    for name, expected in found["cpu"].items():
        if name != "k_proj.bias":  # softmax does not see it; what is left is rounding
            assert_close(name, expected, found["cuda"][name].cpu(), 1e-3 if name.endswith("A_log") else 2e-5)


@every_variant
def test_bf16(variant: str) -> None:
    layout, rotary = mixed_layout().to("cuda"), tuple(t.cuda() for t in random_rotary(2, LENGTH))
    mixer, x = tiny(variant).cuda(), torch.randn(2, LENGTH, TINY["dim"], device="cuda")
    with torch.no_grad():
        expected = mixer(x, layout, rotary)
        found = copy.deepcopy(mixer).to(torch.bfloat16)(x.to(torch.bfloat16), layout, rotary)
    valid = layout.valid
    assert found.dtype == torch.bfloat16
    assert_close(variant, expected[valid], found[valid].float(), 4e-2)


@every_variant
def test_cached_decoding(variant: str) -> None:
    """Prefill to past the clips, then token by token, in fp32 on the device."""
    layout, rotary = mixed_layout().to("cuda"), tuple(t.cuda() for t in random_rotary(2, LENGTH))
    mixer, x = tiny(variant).cuda(), torch.randn(2, LENGTH, TINY["dim"], device="cuda")
    start = 141
    state = mixer.init_state(2, device="cuda")
    with torch.no_grad():
        whole = mixer(x, layout, rotary)
        parts = [
            mixer(
                x[:, :start],
                layout.select(tokens=slice(0, start)),
                tuple(t[:, :start] for t in rotary),
                state,
            )
        ]
        for i in range(start, LENGTH):
            parts.append(mixer(x[:, i : i + 1], None, tuple(t[:, i : i + 1] for t in rotary), state))
    valid = layout.valid
    assert_close(variant, whole[valid], torch.cat(parts, dim=1)[valid], 1e-5)
