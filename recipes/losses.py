"""The losses of distillation as plain functions of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from recipes.data.task import IGNORED
from recipes.errors import LossError

LOGITS = 2**27
"""Numbers of logits that exist at a time, where no chunk is given: 512 MiB in fp32."""


def hidden_state_loss(student: Tensor, teacher: Tensor, *kinds: Tensor) -> Tensor:
    """Squared distance as a fraction of the teacher's size: Σ‖s - t‖² / Σ‖t‖² over tokens.

    1 is what an output of zero would give, whatever the scale of the layer.

    Args:
        student: [B, N, D].
        teacher: [B, N, D].
        kinds: bool [B, N] each: the tokens of one kind, of which no token has two. The loss is the mean over the
            kinds that there are. What stands elsewhere is not read.

    Returns:
        fp32 scalar; 0 if no token is of any kind.
    """
    return _RelativeDistance.apply(student, teacher, torch.stack(kinds))


class _RelativeDistance(torch.autograd.Function):
    """The mean over kinds [K, B, N] of relative distances; by hand, for autograd's way is twice as many kernels."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, kinds: Tensor) -> Tensor:
        wide = torch.promote_types(student.dtype, torch.float32)
        error = student.to(wide) - teacher
        by_token = torch.stack([torch.linalg.vector_norm(t, dim=-1, dtype=wide) for t in (error, teacher)])
        errors, sizes = by_token.square()[:, None].masked_fill(~kinds, 0).sum((2, 3))
        sizes = sizes.clamp_min(torch.finfo(wide).tiny)
        if len(kinds) > 1:
            sizes = sizes * kinds.flatten(1).any(1).sum().clamp_min(1)
        ctx.save_for_backward(error, kinds, sizes)
        return (errors / sizes).sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        error, kinds, sizes = ctx.saved_tensors
        weight = (kinds / sizes[:, None, None]).sum(0)[..., None] * (2 * upstream[0])
        return (error * weight).masked_fill_(~kinds.any(0)[..., None], 0), None, None


def attention_weights_loss(student: Tensor, teacher: Tensor, asked: Tensor) -> Tensor:
    """KL(teacher ‖ student) of attention weights over tokens, averaged over heads and queries.

    Args:
        student: fp32 or wider [B, H, Q, N], as :meth:`mixers.TokenMixer.attention_weights` gives.
        teacher: [B, H, Q, N].
        asked: bool [B, Q], the queries that count.

    Returns:
        Scalar; 0 if no query counts.
    """
    share = asked / (asked.sum().clamp_min(1) * student.shape[1])
    return _Divergence.apply(student, teacher, share[:, None, :, None].to(student.dtype))


class _Divergence(torch.autograd.Function):
    """Σ share · t · log(t / s); by hand, for autograd would keep several tensors of this size for each layer."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, share: Tensor) -> Tensor:
        least = torch.finfo(student.dtype).tiny
        student = student.clamp_min(least)
        part = teacher * share
        ctx.save_for_backward((part / student).masked_fill_(student <= least, 0))
        return (part * (teacher.clamp_min(least) / student).log()).sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return -upstream[0] * slope, None, None


def token_kd(
    student_head: nn.Module,
    teacher_head: nn.Module,
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    count: Tensor | int | None = None,
) -> Tensor:
    """Token-level distillation (Hinton et al., arXiv 1503.02531): T²·KL(softmax(t/T) ‖ softmax(s/T)).

    Logits are made once, for ``chunk`` tokens at a time, and the gradients with them, so no full-vocabulary
    tensor of more than ``chunk`` rows is ever alive.

    Args:
        student_head: Student's last hidden states [M, D] to logits [M, V], with V as ``out_features``; its parameters
            get gradients too.
        teacher_head: The teacher's; no gradient goes through it.
        student: Last hidden states [M, D] of the tokens to learn from.
        teacher: The teacher's [M, D'].
        temperature: T.
        chunk: Tokens at a time. Default: as many as make :data:`LOGITS`.
        count: What the sum over tokens is divided by. Default: M.

    Returns:
        fp32 scalar; 0 if there is no token.
    """

    def log_softmax(logits: Tensor) -> Tensor:
        scaled = logits.float() if temperature == 1 else logits.float() / temperature
        return F.log_softmax(scaled, dim=-1)

    def divergence(s: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            target = log_softmax(teacher_head(t))
        return F.kl_div(log_softmax(student_head(s)), target, reduction="sum", log_target=True)

    total = _chunked(divergence, student_head, student, teacher, chunk)
    return temperature**2 * total / _divisor(count, len(student))


def cross_entropy(
    head: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    *,
    chunk: int | None = None,
    count: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy of labels under the student, with logits made in chunks as in :func:`token_kd`.

    Args:
        head: As ``student_head`` there.
        hidden: [M, D], at the tokens before the labelled ones.
        labels: int [M].
        chunk: Tokens at a time. Default: as many as make :data:`LOGITS`.
        count: What the sum over tokens is divided by. Default: M.

    Returns:
        fp32 scalar; 0 if there is no token.
    """

    def surprise(h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(head(h).float(), y, reduction="sum")

    return _chunked(surprise, head, hidden, labels, chunk) / _divisor(count, len(hidden))


def _chunked(
    loss: Callable[[Tensor, Tensor], Tensor],
    head: nn.Module,
    hidden: Tensor,
    other: Tensor,
    chunk: int | None,
) -> Tensor:
    vocabulary: Any = head.out_features
    chunk = chunk or max(LOGITS // vocabulary, 1)
    weights = [p for p in head.parameters() if p.requires_grad]
    return _WithGradients.apply(loss, chunk, other, hidden, *weights)


class _WithGradients(torch.autograd.Function):
    """Sums a loss over chunks, and works out its gradients while the logits of a chunk are there."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Callable[[Tensor, Tensor], Tensor],
        chunk: int,
        other: Tensor,
        hidden: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        grads = [torch.zeros_like(t) for t in (hidden, *weights)]
        for h, o, grad in zip(hidden.split(chunk), other.split(chunk), grads[0].split(chunk)):
            if len(h):
                with torch.enable_grad():
                    h = h.detach().requires_grad_()
                    part = loss(h, o)
                total += part.detach()
                found = torch.autograd.grad(part, (h, *weights))
                for held, new in zip((grad, *grads[1:]), found):
                    held += new
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = upstream
        return None, None, None, *(grad * scale.to(grad.dtype) for grad in ctx.saved_tensors)


def _divisor(count: Tensor | int | None, tokens: int) -> Tensor | int:
    if isinstance(count, Tensor):
        return count.clamp_min(1)
    return max(tokens if count is None else count, 1)


def valid_tokens(batch: dict[str, Tensor]) -> Tensor:
    """Return bool [B, N]: the tokens of a batch that are not padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask != 0


def predicted_tokens(batch: dict[str, Tensor], tokens: str) -> Tensor:
    """Return bool [B, N]: True at i if token i + 1 counts, as a label or (``"valid"``) as a token at all."""
    valid = valid_tokens(batch)
    counts = valid if tokens == "valid" else batch["labels"] != IGNORED
    return F.pad(counts[:, 1:] & valid[:, :-1], (0, 1))


class OutputHead(nn.Module):
    """How a model makes logits [.., V] of its last hidden states [.., D]: scaling and soft-cap included.

    Args:
        model: Its output embeddings are shared, not copied.

    Raises:
        LossError: The model has no output head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        linear = model.get_output_embeddings()
        if linear is None:
            raise LossError(f"{type(model).__name__} has no output head; load it as a model for generation.")
        config = model.config.get_text_config(decoder=True)
        scale = getattr(config, "logit_scale", None) or 1.0
        self.linear = linear
        self.out_features: int = linear.out_features
        self.factor = scale / (getattr(config, "logits_scaling", None) or 1.0)
        self.cap = getattr(config, "final_logit_softcapping", None)

    def forward(self, hidden: Tensor) -> Tensor:
        """Make logits."""
        logits = self.linear(hidden)
        if self.factor != 1.0:
            logits = logits * self.factor
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def check_head(model: nn.Module, head: nn.Module, hidden: Tensor, logits: Tensor) -> None:
    """Make sure that ``head`` gives the logits that the model gave.

    Args:
        model: For the message.
        head: Its :class:`OutputHead`.
        hidden: Last hidden states [B, D].
        logits: The model's own [B, V] for them.

    Raises:
        LossError: It does not: the model does something else to its logits.
    """
    with torch.no_grad():
        made, own = head(hidden).float(), logits.detach().float()
    if not torch.allclose(made, own, rtol=0, atol=2e-2 * float(own.abs().max())):
        raise LossError(
            f"{type(model).__name__} makes its logits in another way than by its output head, logit scaling and "
            "soft-cap, so token losses would be wrong; use hidden-state alignment alone for this model."
        )
