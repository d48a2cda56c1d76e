"""The rotary embedding, against rotation by complex numbers."""

from __future__ import annotations

import pytest
import torch

from mixers.rotary import apply_rotary


@pytest.mark.parametrize("width", [2, 4, 8])
def test_rotates_pairs_of_channels(width: int) -> None:
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    angle = torch.randn(2, 5, width // 2, dtype=torch.float64)
    table = angle.repeat(1, 1, 2)
    y = apply_rotary(x, table.cos(), table.sin())
    pairs = torch.complex(x[..., : width // 2], x[..., width // 2 : width])
    turned = pairs * torch.polar(torch.ones_like(angle), angle)[:, :, None]
    torch.testing.assert_close(y[..., :width], torch.cat([turned.real, turned.imag], dim=-1))
    assert torch.equal(y[..., width:], x[..., width:])


def test_keeps_the_dtype() -> None:
    x, table = torch.randn(1, 2, 1, 8, dtype=torch.bfloat16), torch.ones(1, 2, 8)
    assert apply_rotary(x, table, table).dtype == torch.bfloat16
