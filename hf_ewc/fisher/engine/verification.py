"""The proof that the one-backward engine kept examples apart."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_ewc.fisher.engine.lookups import is_rows_only
from hf_ewc.fisher.engine.one_by_one import OneByOne, dense
from hf_ewc.fisher.engine.protocol import Objectives, Outputs
from hf_ewc.fisher.examples.batch import ExampleBatch
from hf_ewc.fisher.memory import is_out_of_memory
from hf_ewc.fisher.uses.product import Product
from hf_ewc.parameters.sharding import whole_shape
from hf_ewc.precision import wide_sum

# What rounding may change, a share of the sum of squares; in half precision it does much, in
# gradients more than in outputs.
_SHARE, _SHARE_IN_HALF, _OUTPUTS_SHARE_IN_HALF = 1e-6, 0.09, 0.0025
# Gradients of up to this many entries are kept as they are.
_SHORT = 4096


@dataclass(frozen=True)
class Comparison:
    """What came of comparing the one-backward engine with single examples.

    Args:
        wrong: the parameters on which the two differ.
        proved: those on which they agree and which had a gradient at all.
    """

    wrong: list[str]
    proved: set[str]


class Sketch:
    """The gradients of one example in few numbers: of each, its sums over rows and over columns.

    With random signs, so that the square of a sum of differences is their sum of squares in
    expectation. Sketches add up as gradients do.
    """

    def __init__(self, example: int = 0) -> None:
        self.example = example
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def see(self, name: str, gradient: Tensor | Product) -> None:
        """`gradient` is G or, of several whose sum it is, one; a product is not written out."""
        if isinstance(gradient, Tensor):
            sums = _of_matrix(_wide(gradient))
        else:
            sums = _of_product(gradient.wide())
        self._sums[name] = self._sums[name].add_(sums) if name in self._sums else sums

    def sizes(self, names: Iterable[str]) -> dict[str, float]:
        """Σ G² of each parameter, in expectation."""
        return {n: _sum(self._sums[n].square()) if n in self._sums else 0.0 for n in names}

    def differences(self, other: Sketch, names: Iterable[str]) -> dict[str, float]:
        """Σ (G − G')² of each parameter, in expectation."""
        return {name: self._difference(other, name) for name in names}

    def _difference(self, other: Sketch, name: str) -> float:
        own, others = self._sums.get(name), other._sums.get(name)
        if own is None or others is None:
            either = own if own is not None else others
            return 0.0 if either is None else _sum(either.square())
        return _sum((own - others).square())


def _of_matrix(gradient: Tensor) -> Tensor:
    if gradient.numel() <= _SHORT:
        return gradient.flatten().clone()
    matrix = gradient.reshape(gradient.shape[0], -1)
    rows, columns = (_signs(size).to(matrix) for size in matrix.shape)
    sums: Tensor = torch.cat([rows @ matrix, matrix @ columns]) * 0.5**0.5
    return sums


def _of_product(product: Product) -> Tensor:
    height, width = product.height, product.right.shape[1]
    if height * width <= _SHORT:
        return product.written_out().flatten()
    rows, columns = (_signs(size).to(product.right) for size in (height, width))
    sums: Tensor = torch.cat([product.times_rows(rows), product.times_columns(columns)]) * 0.5**0.5
    return sums


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@functools.lru_cache(maxsize=64)
def _signs(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return 2.0 * torch.randint(0, 2, (size,), generator=generator) - 1.0


class _Alone(OneByOne):
    """One example in a forward and backward of its own, whose gradients a sketch sees."""

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], sketch: Sketch
    ) -> None:
        super().__init__(model, parameters, totals={})
        self._sketch = sketch

    def _square(self, name: str, gradient: Tensor) -> None:
        if is_rows_only(gradient):
            (rows,) = gradient._indices()
            self._sketch.see(name, Product(rows, gradient._values(), len(gradient)))
        else:
            self._sketch.see(name, dense(gradient))


def compare_with_alone(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batch: ExampleBatch,
    objectives: Objectives,
    seen: Sketch,
) -> Comparison:
    """Hold what the one-backward engine saw of an example among others to that example alone.

    An axis of another meaning taken for the batch's would have mixed it with the others.
    """

    def all_at_once(one: ExampleBatch) -> Iterator[Tensor]:
        parts = list(objectives(one))
        if parts:
            yield torch.stack(parts).sum()

    alone = Sketch()
    _Alone(model, parameters, alone).add(batch.only([seen.example]), all_at_once)
    half = _is_half(model, parameters)
    limits = Limits(_SHARE_IN_HALF, 1e-3, 1e-6) if half else Limits(_SHARE, 0.0, 1e-10)
    sizes, errors = alone.sizes(parameters), alone.differences(seen, parameters)
    return within_rounding(parameters, sizes, errors, limits)


@torch.no_grad()
def is_what_it_was(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    one: ExampleBatch,
    among: Tensor,
    outputs: Outputs,
) -> bool:
    """Whether an example alone puts out what it did among others, (1, …).

    An example that makes others what they are, such as one with the largest input of a batch that
    is divided by it, is itself the same as alone: it takes another one to see that.
    """
    alone = outputs(one)
    if alone.shape != among.shape:
        return True
    share = _OUTPUTS_SHARE_IN_HALF if _is_half(model, parameters) else _SHARE
    finite = alone.isfinite() & among.isfinite()
    differences = (alone - among).masked_fill(~finite, 0.0)
    return _sum(differences.square()) <= share * _sum(among.masked_fill(~finite, 0.0).square())


@torch.no_grad()
def require_apart(batch: ExampleBatch, outputs: Outputs) -> None:
    """Hold each example, taken out of the batch and run alone, to what it was among the others.

    Not where the model takes one example at a time only, unless what is whose is doubtful. Of a
    batch that was cut off, it is all that there was.

    Raises:
        ValueError: one is another, so that what was taken out was not it.
    """
    batch = batch.cut_from or batch
    try:
        whole = outputs(batch)
    except Exception as error:
        if batch.doubtful or is_out_of_memory(error):
            raise
        return
    if len(whole) != len(batch):
        raise _inseparable(batch, 0, f"is one of {len(whole)} in the model's outputs")
    for n in range(len(batch)):
        try:
            alone = outputs(batch.only([n]))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise _inseparable(batch, n, f"fails alone with {error!s:.200}") from error
        if alone.shape[1:] != whole.shape[1:] or not _alike(alone[:1], whole[n : n + 1]):
            raise _inseparable(batch, n, "has other outputs alone than among the others")


def _alike(one: Tensor, other: Tensor) -> bool:
    share = 0.05 if one.element_size() < 4 or torch.is_autocast_enabled(one.device.type) else 1e-4
    finite = other.abs().nan_to_num(posinf=0.0)
    largest = finite.max() if other.numel() else torch.zeros(())
    return bool(((one == other) | ((one - other).abs() <= share * largest)).all())


def _inseparable(batch: ExampleBatch, n: int, what: str) -> ValueError:
    shapes = {k: tuple(v.shape) for k, v in batch.inputs.items() if isinstance(v, Tensor)}
    return ValueError(
        f"What belongs to which example of a batch cannot be told from its sizes ({shapes} for "
        f"{len(batch)} examples): example {n}, taken by its place, {what}. Give a data set of "
        "examples with its data_collator, or batches of one example (batch_size=1, "
        "fisher_batch_size=1)."
    )


@dataclass(frozen=True)
class Limits:
    """What rounding explains.

    Args:
        own: a share of a parameter's own sum.
        near, far: for gradients that are zero in exact arithmetic, such as those of attention's key
            biases, a share of the densest sum of the same module, and of the whole model.
    """

    own: float
    near: float
    far: float


def limits_of_squares(model: nn.Module, parameters: Mapping[str, Tensor]) -> Limits:
    """For sums of squared gradients and their absolute differences.

    In half precision mostly by the module, since the densest of the model would hide anything.
    """
    return Limits(0.3, 1e-3, 1e-6) if _is_half(model, parameters) else Limits(1e-3, 0.0, 1e-9)


def within_rounding(
    parameters: Mapping[str, Tensor],
    sizes: Mapping[str, float],
    errors: Mapping[str, float],
    limits: Limits,
) -> Comparison:
    """Tell from rounding what is not.

    Args:
        sizes: the sum over each parameter of what is compared.
        errors: that of its differences.
        limits: how large these may be.
    """
    numels = {name: max(math.prod(whole_shape(p)), 1) for name, p in parameters.items()}
    densities = {name: sizes[name] / numels[name] for name in parameters}
    densest = max(densities.values(), default=0.0)
    modules: dict[str, float] = {}
    for name, density in densities.items():
        module = name.rpartition(".")[0]
        modules[module] = max(density, modules.get(module, 0.0))
    wrong = [
        name
        for name, error in errors.items()
        if error
        > limits.own * sizes[name]
        + numels[name] * (limits.near * modules[name.rpartition(".")[0]] + limits.far * densest)
    ]
    seen = {name for name in parameters if sizes[name] > 0 or errors[name] > 0}
    return Comparison(wrong, seen - set(wrong))


def _is_half(model: nn.Module, parameters: Mapping[str, Tensor]) -> bool:
    return any(p.element_size() < 4 for p in parameters.values()) or _autocasts(model)


def _autocasts(model: nn.Module) -> bool:
    wrapped_by_accelerate = hasattr(model, "_original_forward")
    return wrapped_by_accelerate or any(
        torch.is_autocast_enabled(device) for device in ("cpu", "cuda")
    )


def _sum(tensor: Tensor) -> float:
    return float(wide_sum(tensor))
