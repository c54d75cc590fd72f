"""The penalty against the textbook formula in float64, on dense, packed and odd tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hf_ewc.state.ewc_state import EWCState
from hf_ewc.training import fused, small
from hf_ewc.training.fused import Piece, value_and_gradient
from hf_ewc.training.penalty import Penalty
from tests.models import random_quadratic


class Net(nn.Module):
    """Parameters of every shape that matters: scalar, bias, matrix, kernel, larger than a block."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = {"scalar": (), "bias": (7,), "matrix": (33, 5), "large": (300, 301)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape).to(dtype)))
        self.conv = nn.Conv2d(3, 4, 2, dtype=dtype)


def oracle(
    model: nn.Module, importance: dict[str, Tensor], anchor: dict[str, Tensor], lam: float
) -> tuple[float, dict[str, Tensor]]:
    value, gradients = 0.0, {}
    for name, parameter in model.named_parameters():
        theta, fisher, center = (
            t.detach().double() for t in (parameter, importance[name], anchor[name])
        )
        value += (fisher * (theta - center) ** 2).sum().item() * lam / 2
        gradients[name] = lam * fisher * (theta - center)
    return value, gradients


def penalty_of(state: EWCState, model: nn.Module, lam: float = 2.5, **options: bool) -> Penalty:
    return Penalty(state, model, dict.fromkeys(state.importance, lam), **options)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    error = (actual.double() - expected.double()).norm()
    assert error <= tolerance * expected.double().norm()


@pytest.mark.parametrize("largest", [small.LARGEST, 50, -1])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_value_and_gradient_are_those_of_the_formula(
    dtype: torch.dtype, offload: bool, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "LARGEST", largest)
    model = Net(dtype)
    importance, anchor = random_quadratic(model)
    value, gradients = oracle(model, importance, anchor, 2.5)
    penalty = penalty_of(EWCState(importance, anchor), model, offload=offload)
    values = penalty.add_gradients()
    assert values.sum().item() == pytest.approx(value, rel=1e-5)
    assert penalty.value() == pytest.approx(value, rel=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == dtype
        close(parameter.grad, gradients[name], 1e-5 if dtype != torch.bfloat16 else 4e-3)


def test_gradients_are_added_in_the_units_of_a_loss_scale() -> None:
    model = Net()
    importance, anchor = random_quadratic(model)
    _, gradients = oracle(model, importance, anchor, 2.5)
    before = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = before[name].clone()
    penalty_of(EWCState(importance, anchor), model).add_gradients(loss_scale=1024.0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        close(parameter.grad, before[name] + 1024 * gradients[name])


def test_the_differentiable_form_has_the_same_value_and_gradient() -> None:
    model = Net()
    importance, anchor = random_quadratic(model)
    value, gradients = oracle(model, importance, anchor, 2.5)
    loss = penalty_of(EWCState(importance, anchor), model).differentiable()
    assert loss.item() == pytest.approx(value, rel=1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        close(parameter.grad, gradients[name])


@pytest.mark.parametrize("layout", ["permuted parameter", "permuted gradient"])
def test_tensors_that_are_not_contiguous(layout: str) -> None:
    model = Net()
    importance, anchor = random_quadratic(model)
    if layout == "permuted parameter":
        model.conv.to(memory_format=torch.channels_last)
    _, gradients = oracle(model, importance, anchor, 2.5)
    model.conv.weight.grad = torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last)
    penalty_of(EWCState(importance, anchor), model).add_gradients()
    assert model.conv.weight.grad is not None
    close(model.conv.weight.grad, gradients["conv.weight"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("keep", [1.0, 0.3])
@pytest.mark.parametrize("device_path", [False, True])
def test_a_packed_state_acts_as_the_dense_tensors_it_reads_as(
    dtype: str, keep: float, device_path: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device_path:
        use_device_path(monkeypatch)
    model = Net()
    importance, anchor = random_quadratic(model)
    state = EWCState(importance, anchor).pack(dtype=dtype, keep_fraction=keep)
    value, gradients = oracle(model, dict(state.importance), dict(state.anchor), 2.5)
    penalty = penalty_of(state, model)
    assert penalty.add_gradients().sum().item() == pytest.approx(value, rel=1e-5)
    for name, parameter in model.named_parameters():
        if gradients[name].any():
            assert parameter.grad is not None
            close(parameter.grad, gradients[name])
    assert penalty.differentiable().item() == pytest.approx(value, rel=1e-5)


def use_device_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the foreach kernels of accelerators on the CPU too, in small groups."""
    monkeypatch.setattr(small, "LARGEST", -1)
    monkeypatch.setattr(fused, "_on_host", lambda device: False)
    monkeypatch.setattr(fused, "DEVICE_BLOCK", 50_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_foreach_kernels_agree_with_the_blocks(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = Net(dtype), Net(dtype)
    importance, anchor = random_quadratic(model)
    state = EWCState(importance, anchor)
    in_cache = penalty_of(state, model).add_gradients(8.0)
    use_device_path(monkeypatch)
    foreach = penalty_of(state, other).add_gradients(8.0)
    close(foreach, in_cache)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        close(two.grad, one.grad, 1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("largest", [small.LARGEST, 50])
@pytest.mark.parametrize("block", [small.BLOCK, 40])
def test_each_parameter_has_its_own_lambda(
    block: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "LARGEST", largest)
    monkeypatch.setattr(small, "BLOCK", block)
    model = Net()
    importance, anchor = random_quadratic(model)
    weights = {name: float(i) for i, name in enumerate(importance)}
    state = EWCState(importance, anchor, offsets=dict.fromkeys(importance, 2.0))
    penalty = Penalty(state, model, weights)
    values = penalty.add_gradients()
    for value, term in zip(values.tolist(), penalty.terms, strict=True):
        name = term.name
        theta = term.parameter.detach().double()
        delta = theta - anchor[name].double()
        assert value == pytest.approx(
            weights[name] / 2 * (importance[name] * delta**2).sum().item(), rel=1e-5
        )
    assert penalty.constant == pytest.approx(2 * sum(weights.values()))


def test_frozen_parameters_count_in_the_value_and_get_no_gradient() -> None:
    model = Net()
    importance, anchor = random_quadratic(model)
    value, _ = oracle(model, importance, anchor, 2.5)
    model.matrix.requires_grad_(False)
    penalty = penalty_of(EWCState(importance, anchor), model)
    assert penalty.value() == pytest.approx(value, rel=1e-5)
    penalty.add_gradients()
    assert model.matrix.grad is None


def test_unprotected_parameters_are_left_alone() -> None:
    model = Net()
    importance, anchor = random_quadratic(model)
    importance["matrix"].zero_()
    penalty_of(EWCState(importance, anchor), model).add_gradients()
    assert model.matrix.grad is None
    assert model.bias.grad is not None


def test_relative_distances() -> None:
    model = Net()
    importance, _ = random_quadratic(model)
    anchor = {name: p.detach() / 3 for name, p in model.named_parameters()}
    penalty = penalty_of(EWCState(importance, anchor), model)
    found = {term.name: distance for term, distance in penalty.relative_distances()}
    assert found == pytest.approx(dict.fromkeys(importance, 2.0), rel=1e-5)


def test_a_dense_pass_needs_scratch_space_of_two_blocks_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    original = torch.empty

    def counting(*size: int, **options: torch.dtype) -> Tensor:
        tensor: Tensor = original(*size, **options)  # type: ignore[call-overload]
        made.append(tensor.numel())
        return tensor

    monkeypatch.setattr(torch, "empty", counting)
    big = torch.randn(40 * fused.CACHE_BLOCK)
    value_and_gradient([Piece(big, big, torch.zeros_like(big), torch.zeros_like(big))])
    assert sum(made) == 2 * fused.CACHE_BLOCK


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_operands_are_subtracted_in_fp32(dtype: torch.dtype) -> None:
    model = Net(dtype)
    importance, anchor = random_quadratic(model)
    anchor = {name: tensor.to(dtype) for name, tensor in anchor.items()}
    value, _ = oracle(model, importance, anchor, 2.5)
    state = EWCState(importance, anchor)
    assert penalty_of(state, model).value() == pytest.approx(value, rel=1e-5)


def test_other_weights_are_taken_up_and_zero_leaves_a_parameter_alone() -> None:
    model = Net()
    importance, anchor = random_quadratic(model)
    state = EWCState(importance, anchor, offsets=dict.fromkeys(importance, 1.0))
    penalty = penalty_of(state, model)
    weights = {name: 4.0 if name == "matrix" else 0.0 for name in importance}
    penalty.set_strengths(weights)
    _, gradients = oracle(model, importance, anchor, 4.0)
    values = penalty.add_gradients()
    assert penalty.constant == 4.0
    assert model.bias.grad is None
    close(model.matrix.grad, gradients["matrix"])
    at = [term.name for term in penalty.terms].index("matrix")
    assert values[at] > 0
    assert values.sum() == values[at]


def test_what_is_frozen_is_looked_at_each_time() -> None:
    model = Net()
    importance, anchor = random_quadratic(model)
    model.matrix.requires_grad_(False)
    penalty = penalty_of(EWCState(importance, anchor), model)
    with torch.no_grad():
        model.matrix.add_(1.0)  # as load_state_dict would
    value, gradients = oracle(model, importance, anchor, 2.5)
    assert penalty.value() == pytest.approx(value, rel=1e-5)
    model.matrix.requires_grad_(True)
    model.bias.requires_grad_(False)
    penalty.add_gradients()
    assert model.bias.grad is None
    close(model.matrix.grad, gradients["matrix"])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_that_move_in_memory_are_followed(layout: torch.memory_format) -> None:
    model = Net()
    importance, anchor = random_quadratic(model)
    penalty = penalty_of(EWCState(importance, anchor), model)
    for parameter in model.parameters():
        moved = parameter.detach() * 2
        parameter.data = moved.to(memory_format=layout) if moved.dim() == 4 else moved
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
                parameter.grad = None
        value, gradients = oracle(model, importance, anchor, 2.5)
        assert penalty.add_gradients().sum().item() == pytest.approx(value, rel=1e-5)
        for name, parameter in model.named_parameters():
            close(parameter.grad, gradients[name])


def test_the_gradients_of_some_terms_alone() -> None:
    model = Net()
    importance, anchor = random_quadratic(model)
    penalty = penalty_of(EWCState(importance, anchor), model)
    value, gradients = oracle(model, importance, anchor, 2.5)
    at = [term.name for term in penalty.terms].index("matrix")
    assert penalty.add_gradients(members={at}).sum().item() == pytest.approx(value, rel=1e-5)
    close(model.matrix.grad, gradients["matrix"])
    assert all(p.grad is None for n, p in model.named_parameters() if n != "matrix")


def test_a_sparse_gradient_is_added_to() -> None:
    model = nn.Embedding(9, 4, sparse=True)
    importance, anchor = random_quadratic(model)
    model(torch.tensor([1, 3])).sum().backward()
    task = model.weight.grad.to_dense()
    _, gradients = oracle(model, importance, anchor, 2.5)
    penalty_of(EWCState(importance, anchor), model).add_gradients()
    close(model.weight.grad - task, gradients["weight"])
