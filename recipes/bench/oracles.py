"""Dense O(N²) forms of the ops, read off their definitions: what a backend must agree with before it is timed."""

from __future__ import annotations

import torch
from torch import Tensor

from mixers.layout import Blocks, Scan
from mixers.ops.ssd.reference import Decay


def dense_ssd(
    c: Tensor,
    b: Tensor,
    x: Tensor,
    decay: Decay,
    backward_decay: Decay | None = None,
    *,
    scan: Scan,
    denominator: bool = False,
) -> Tensor:
    """Both directions of the SSD scan as one masked matrix, for rows of one valid sequence.

    Arguments are those of :func:`mixers.ops.ssd`; the final state is not returned.
    """
    step = torch.arange(c.shape[1], device=c.device)[None] if scan.order is None else scan.order
    row = torch.arange(c.shape[0], device=c.device)[:, None]
    c, b, x = c[row, step], b[row, step], x[row, step]
    past = torch.ones(2 * step.shape[1:], dtype=torch.bool, device=c.device).tril()

    log_a, dt = (t[row, step] for t in decay)
    reached = log_a.cumsum(1)
    weight = (reached[:, :, None] - reached[:, None]).masked_fill(~past[:, :, None], -torch.inf).exp() * dt[
        :, None
    ]
    if backward_decay is not None and scan.vision is not None and scan.extent is not None:
        clip = scan.extent.masked_fill(~scan.vision, -1)
        seen = (clip[:, :, None] == clip[:, None]) & (clip >= 0)[:, :, None] & ~past
        log_a, dt = (t[row, step] * scan.vision[..., None] for t in backward_decay)
        before = log_a.cumsum(1) - log_a
        distance = before[:, None] - before[:, :, None]
        weight = weight + distance.masked_fill(~seen[..., None], -torch.inf).exp() * dt[:, None]

    heads = c.shape[2]
    weight, b, x = (
        t.repeat_interleave(heads // t.shape[dim], dim=dim) for t, dim in ((weight, 3), (b, 2), (x, 2))
    )
    mixing = torch.einsum("bihk,bjhk->bijh", c, b) * weight
    y = torch.einsum("bijh,bjhp->bihp", mixing, x)
    if denominator:
        y = y / mixing.sum(2)[..., None]
    return torch.empty_like(y).index_put((row, step), y)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, *, scale: float) -> Tensor:
    """One N×N masked softmax attention that equals attention over the blocks of one row without history."""
    length = q.shape[1]
    allowed = torch.zeros(length, length, dtype=torch.bool, device=q.device)
    pairs = (blocks.queries >= 0)[:, :, None] & (blocks.keys >= 0)[:, None]
    if blocks.allowed is not None:
        pairs = pairs & blocks.allowed
    block, query, key = pairs.nonzero(as_tuple=True)
    allowed[blocks.queries[block, query], blocks.keys[block, key]] = True
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
    scores = torch.einsum("bihp,bjhp->bhij", q, k) * scale
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num()
    return torch.einsum("bhij,bjhp->bihp", weights, v)


def dense_conv(x: Tensor, weight: Tensor, *, scan: Scan) -> Tensor:
    """The short convolution as one N×N matrix a tap, for one row."""
    at = torch.arange(x.shape[1], device=x.device)
    order = at if scan.order is None else scan.order[0]
    run = torch.zeros_like(at) if scan.run is None else scan.run[0]
    y = torch.zeros_like(x[0])
    for back in range(weight.shape[1]):
        taken = (at[:, None] - at == back) & (run[:, None] == run)
        y = y + weight[:, -1 - back] * (taken.to(x.dtype) @ x[0, order])
    return y[order.argsort()][None]
