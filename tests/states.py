"""Models, random Fishers and moves for the tests of states, and the explicit sum of penalties."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_ewc import EWCState, Fisher

Named = dict[str, Tensor]


def net(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def random_fisher(model: nn.Module, seed: int, names: tuple[str, ...] = ()) -> Fisher:
    generator = torch.Generator().manual_seed(seed)
    diagonal = {}
    for name, parameter in model.named_parameters():
        spread = torch.randn(parameter.shape, generator=generator) * 3
        value = spread.exp() * (torch.rand(parameter.shape, generator=generator) > 0.2)
        if not names or name in names:
            diagonal[name] = value
    return Fisher(diagonal, num_examples=10 + seed, fisher_type="exact")


def move(model: nn.Module, seed: int, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            whole = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            whole.add_(size * noise.to(parameter.dtype))


def values(model: nn.Module) -> Named:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def explicit_sum(terms: list[tuple[float, Named, Named]], model: nn.Module) -> tuple[float, Named]:
    """½ Σ_k w_k Σ F_k (θ − θ*_k)² in float64, task by task, and its gradient."""
    theta = {name: value.double().requires_grad_() for name, value in values(model).items()}
    total = torch.zeros((), dtype=torch.float64)
    for weight, fisher, anchor in terms:
        for name, importance in fisher.items():
            distance = theta[name] - anchor[name].double()
            total = total + 0.5 * weight * (importance.double() * distance**2).sum()
    gradients = torch.autograd.grad(total, list(theta.values()), allow_unused=True)
    pairs = zip(theta, gradients, strict=True)
    return total.item(), {n: torch.zeros_like(theta[n]) if g is None else g for n, g in pairs}


def penalty_and_gradient(state: EWCState, model: nn.Module) -> tuple[float, Named]:
    model.zero_grad()
    penalty = state.penalty(model)
    penalty.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    model.zero_grad()
    return penalty.item(), gradients


def assert_same(
    got: tuple[float, Named], expected: tuple[float, Named], rtol: float = 1e-5
) -> None:
    assert got[0] == pytest.approx(expected[0], rel=rtol)
    for name, gradient in expected[1].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(got[1][name].double(), gradient, rtol=rtol, atol=rtol * scale)
