"""The losses of distillation as plain functions of tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from recipes.data.task import IGNORED
from recipes.errors import LossError

Head = Callable[[Tensor], Tensor]
"""Last hidden states [M, D] → logits [M, V]."""

CHUNK = 512
"""Tokens whose full-vocabulary logits exist at a time, where nothing else is said."""


def hidden_state_loss(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Squared distance as a fraction of the teacher's size: Σ‖s - t‖² / Σ‖t‖², over valid tokens.

    1 is what an output of zero would give, whatever the scale of the layer.

    Args:
        student: [B, N, D].
        teacher: [B, N, D].
        valid: bool [B, N]; what stands elsewhere is not read.

    Returns:
        fp32 scalar; 0 if no token is valid.
    """
    outside = ~valid[..., None]
    target = teacher.float().masked_fill(outside, 0)
    error = student.float().masked_fill(outside, 0) - target
    return error.square().sum() / target.square().sum().clamp_min(torch.finfo(torch.float32).tiny)


def token_kd(
    student_head: Head,
    teacher_head: Head,
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = CHUNK,
    count: Tensor | int | None = None,
) -> Tensor:
    """Token-level distillation (Hinton et al., arXiv 1503.02531): T²·KL(softmax(t/T) ‖ softmax(s/T)).

    Logits are made for ``chunk`` tokens at a time and made again in the backward pass, so no
    full-vocabulary tensor of more than ``chunk`` rows is ever alive.

    Args:
        student_head: Student's last hidden states to logits.
        teacher_head: The teacher's; no gradient goes through it.
        student: Last hidden states [M, D] of the tokens to learn from.
        teacher: The teacher's [M, D'].
        temperature: T.
        chunk: Tokens at a time.
        count: What the sum over tokens is divided by. Default: M.

    Returns:
        fp32 scalar; 0 if there is no token.
    """

    def divergence(s: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            target = F.log_softmax(teacher_head(t).float() / temperature, dim=-1)
        log_q = F.log_softmax(student_head(s).float() / temperature, dim=-1)
        return F.kl_div(log_q, target, reduction="sum", log_target=True)

    total = _chunked(divergence, student, teacher, chunk)
    return temperature**2 * total / _divisor(count, len(student))


def cross_entropy(
    head: Head, hidden: Tensor, labels: Tensor, *, chunk: int = CHUNK, count: Tensor | int | None = None
) -> Tensor:
    """Cross-entropy of labels under the student, with logits made in chunks as in :func:`token_kd`.

    Args:
        head: Last hidden states to logits.
        hidden: [M, D], at the tokens before the labelled ones.
        labels: int [M].
        chunk: Tokens at a time.
        count: What the sum over tokens is divided by. Default: M.

    Returns:
        fp32 scalar; 0 if there is no token.
    """

    def surprise(h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(head(h).float(), y, reduction="sum")

    return _chunked(surprise, hidden, labels, chunk) / _divisor(count, len(hidden))


def _chunked(loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, other: Tensor, chunk: int) -> Tensor:
    # The empty sum keeps the graph, so a batch without tokens has a zero gradient rather than none.
    total = hidden[:0].float().sum()
    for h, o in zip(hidden.split(chunk), other.split(chunk)):
        if len(h):
            total = total + checkpoint(loss, h, o, use_reentrant=False, preserve_rng_state=False)
    return total


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


def output_head(model: PreTrainedModel) -> Head:
    """Return how a model makes logits of its last hidden states, scaling and soft-cap included.

    Raises:
        LossError: The model has no output head.
    """
    linear = model.get_output_embeddings()
    if linear is None:
        raise LossError(f"{type(model).__name__} has no output head; load it as a model for generation.")
    config = model.config.get_text_config(decoder=True)
    factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)

    def head(hidden: Tensor) -> Tensor:
        logits = linear(hidden)
        if factor != 1.0:
            logits = logits * factor
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return head


def check_head(model: nn.Module, head: Head, hidden: Tensor, logits: Tensor) -> None:
    """Make sure that ``head`` gives the logits that the model gave.

    Args:
        model: For the message.
        head: From :func:`output_head`.
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
