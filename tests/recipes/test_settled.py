from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from recipes.settled import settled


def made(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


X = torch.linspace(-1, 1, 20).view(4, 5)


def test_value_and_gradient_are_those_of_the_loss(model: nn.Module) -> None:
    plain = made(model, X)
    loss = settled(made(model, X), model.parameters())
    assert torch.equal(loss, plain)
    expected = torch.autograd.grad(3 * plain, list(model.parameters()))
    (3 * loss).backward()
    for parameter, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)


def test_gradients_add_up_with_others(model: nn.Module) -> None:
    for _ in range(2):
        (settled(made(model, X), model.parameters()) + made(model, X)).backward()
    found = [p.grad for p in model.parameters()]
    expected = torch.autograd.grad(4 * made(model, X), list(model.parameters()))
    torch.testing.assert_close(found, list(expected))


def test_what_does_not_learn_or_is_not_reached_gets_nothing(model: nn.Module) -> None:
    model[0].bias.requires_grad_(False)
    apart = nn.Parameter(torch.ones(2))
    settled(made(model, X), [*model.parameters(), apart]).backward()
    assert model[0].bias.grad is None
    assert apart.grad is None
    assert model[0].weight.grad is not None


def test_without_gradients_it_is_the_loss_itself(model: nn.Module) -> None:
    with torch.no_grad():
        loss = made(model, X)
    assert settled(loss, model.parameters()) is loss
    loss = made(model, X)
    assert settled(loss, []) is loss


def test_the_graph_is_gone_at_once(model: nn.Module) -> None:
    between = model[0](X)
    alive = weakref.ref(between)
    loss = settled(model[2](between.tanh()).square().mean(), model.parameters())
    del between
    assert alive() is None
    loss.backward()


def test_under_autocast_it_is_as_a_backward_pass_behind_it(model: nn.Module) -> None:
    """fp32 parts of a graph, which a lower precision around the loss does not touch, keep theirs."""
    x = X.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            loss = made(model, x)
        loss = settled(loss, model.parameters())
    loss.backward()
    expected = torch.autograd.grad(made(model, X), list(model.parameters()))
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected), rtol=1e-6, atol=1e-8)
