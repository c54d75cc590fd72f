"""Batches that do not fit in memory: they are cut in half, and count once."""

from __future__ import annotations

import types

import fisher_oracle as oracle
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_ewc import estimate_fisher

ERRORS = {
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "host": MemoryError("Unable to allocate 64.0 GiB"),
}


class Full(torch.autograd.Function):
    """Memory that runs out in the backward of more than `most` examples."""

    @staticmethod
    def forward(ctx, x, model):
        ctx.model = model
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.model.run_out(len(gradient), "backward")
        return gradient, None


class Limited(nn.Module):
    """A classifier in which memory runs out where a pass has too many examples.

    Args:
        most: examples of a pass that fit.
        where: "forward" or "backward".
        error: what is raised then.
        spared: passes of many that fit all the same.
    """

    def __init__(self, most, where="forward", error="device", spared=0):
        super().__init__()
        torch.manual_seed(0)
        self.config = types.SimpleNamespace()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
        self.most, self.where, self.error = most, where, ERRORS[error]
        self.spared, self.largest = spared, []

    def run_out(self, size, where):
        if where != self.where:
            return
        if self.spared > 0 and size > 2:
            self.spared -= 1
        elif size > self.most:
            raise self.error
        self.largest.append(size)

    def forward(self, x, labels=None):
        self.run_out(len(x), "forward")
        logits = self.head(Full.apply(torch.tanh(self.first(x)), self))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def examples(number=19):
    torch.manual_seed(1)
    return [{"x": torch.randn(3), "labels": torch.tensor(n % 3)} for n in range(number)]


def collated(data):
    return {name: torch.stack([one[name] for one in data]) for name in data[0]}


def expected(data):
    return oracle.exact(Limited(99).double(), collated(data))


KINDS = {
    "data set": lambda data: data,
    "DataLoader": lambda data: DataLoader(data, batch_size=8),
    "batches": lambda data: [collated(data[start : start + 8]) for start in range(0, 19, 8)],
    "iterator": lambda data: iter([collated(data[start : start + 8]) for start in (0, 8, 16)]),
}


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(
    ("kind", "error"), [*((kind, "device") for kind in KINDS), ("data set", "CPU")]
)
def test_batches_are_cut_in_half_and_count_once(kind, where, error, caplog):
    data, model = examples(), Limited(3, where, error)
    found = estimate_fisher(model, KINDS[kind](data), batch_size=8)
    assert found.num_examples == 19
    for name, value in expected(data).items():
        torch.testing.assert_close(found.diagonal[name].double(), value, rtol=1e-5, atol=1e-9)
    said = [text for text in caplog.messages if "fit in memory" in text]
    assert [text.rsplit(" ", 1)[1] for text in said] == ["4.", "2."]  # which is remembered


@pytest.mark.parametrize("most", [2, 4])
@pytest.mark.parametrize("kind", ["data set", "DataLoader", "batches"])
def test_memory_that_runs_out_in_a_later_backward(kind, most):
    data, model = examples(), Limited(most, "backward", spared=2)
    found = estimate_fisher(model, KINDS[kind](data), batch_size=8)
    assert model.largest[0] == 8  # the first batch was whole, and is taken off again
    assert found.num_examples == 19
    for name, value in expected(data).items():
        torch.testing.assert_close(found.diagonal[name].double(), value, rtol=1e-5, atol=1e-9)


def test_an_iterator_cannot_be_read_again():
    model = Limited(2, "backward", spared=2)
    with pytest.raises(torch.OutOfMemoryError, match=r"cannot be read again.*smaller batches"):
        estimate_fisher(model, KINDS["iterator"](examples()))


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", ERRORS)
def test_one_example_that_does_not_fit(where, error):
    with pytest.raises(torch.OutOfMemoryError, match="One example of the Fisher does not fit"):
        estimate_fisher(Limited(0, where, error), examples(), batch_size=4)


def test_batches_are_kept_where_the_result_depends_on_them():
    with pytest.raises(torch.OutOfMemoryError, match=r"8 examples .* smaller batch_size"):
        estimate_fisher(Limited(3, "backward"), examples(), fisher_type="batched")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("use `model.train()` to put the model into training mode", "fails in eval mode.*train"),
        ("relation is indeterminate", "backward of the log-likelihood fails with .*indeterminate"),
    ],
)
def test_other_errors_of_a_backward_say_eval_mode_where_that_is_it(error, said):
    model = Limited(3, "backward")
    model.error = RuntimeError(error)
    with pytest.raises(ValueError, match=said):
        estimate_fisher(model, examples())
