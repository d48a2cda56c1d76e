"""Others' short convolutions, which know no edges."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from mixers.ops import short_conv
from recipes.bench.peers.peer import Peer, needs


def _conv1d(x: Tensor, weight: Tensor) -> Tensor:
    taps = weight.shape[1]
    y = F.conv1d(x.transpose(1, 2), weight[:, None], padding=taps - 1, groups=x.shape[2])
    return y[..., : x.shape[1]].transpose(1, 2)


def _causal_conv1d(x: Tensor, weight: Tensor) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(x.transpose(1, 2), weight).transpose(1, 2)


def _fla_conv(x: Tensor, weight: Tensor) -> Tensor:
    from fla.modules.causal_conv1d import causal_conv1d

    return causal_conv1d(x, weight)[0]


def _conv(name: str, run: Callable[..., Tensor], *modules: str) -> Peer:
    return Peer(
        name,
        ("short_conv",),
        needs(*modules),
        lambda inputs, problem: inputs.args,
        run,
        lambda x, weight: short_conv(x, weight, backend="reference"),
    )


CONVOLUTION_PEERS = (
    _conv("causal_conv1d", _causal_conv1d, "causal_conv1d"),
    _conv("flash-linear-attention", _fla_conv, "fla.modules.causal_conv1d"),
    _conv("torch conv1d", _conv1d),
)
"""Stand beside the short convolution."""
