"""Whatever ends an estimate, and whoever else estimates: the model is left as it was found."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import sys
import threading
from pathlib import Path

import fisher_oracle as oracle
import numpy as np
import pytest
import torch
from torch import nn

import hf_ewc
from hf_ewc import estimate_fisher
from hf_ewc.fisher import untouched, unwatched
from tests.models import bert

PACKAGE = str(Path(hf_ewc.__file__).parent)


class Noting(nn.Module):
    """Notes what it was given, normalizes with buffers, and has caches, hooks and gradients."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(1))
        self.config = type("Config", (), {})()
        self.config.use_cache = True
        self.inner.register_forward_hook(lambda module, args, output: output)
        self.head.bias.register_hook(lambda gradient: gradient)
        self.head.weight.grad = torch.ones(2, 4)
        self.norm.eval()
        self.inner.bias.requires_grad_(False)

    def forward(self, x, labels=None):
        self.longest, self.config.noted = len(x), True
        self.seen.data += 1
        return {"logits": self.head(torch.tanh(self.norm(self.inner(x))))}


def state_of(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "tensors": [(n, id(p), p.tolist(), p.requires_grad) for n, p in tensors],
        "gradients": [(n, id(p.grad)) for n, p in model.named_parameters()],
        "modules": [
            (name, module.training, len(module._forward_hooks), len(module._forward_pre_hooks),
             sorted(key for key in vars(module) if not key.startswith("_")))
            for name, module in model.named_modules()
        ],
        "parameter hooks": [
            (n, len(p._backward_hooks or {}), len(p._post_accumulate_grad_hooks or {}))
            for n, p in model.named_parameters()
        ],
        "config": dict(vars(model.config)) if isinstance(model, Noting) else None,
        "random": (
            random.getstate(), np.random.get_state()[1].tolist(),  # noqa: NPY002
            torch.get_rng_state().tolist(),
        ),
        "process": (
            torch._C._len_torch_function_stack(), torch.is_grad_enabled(),
            signal.getsignal(signal.SIGINT), dict(untouched._turn), set(untouched._under_estimate),
        ),
    }  # fmt: skip


def batches():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    return [{"x": x, "labels": torch.arange(4) % 2}, {"x": x[:1], "labels": torch.zeros(1).long()}]


def lines_of(action):
    """The lines of the package that an action runs, in the order of their first run."""
    found = {}

    def local(frame, event, argument):
        if event == "line":
            found.setdefault((frame.f_code.co_filename, frame.f_lineno))
        return local

    _traced(local, action)
    return list(found)


def interrupt_at(line, action):
    """Ctrl-C just before a line of the package is run first."""

    def local(frame, event, argument):
        if event == "line" and (frame.f_code.co_filename, frame.f_lineno) == line:
            raise KeyboardInterrupt
        return local

    _traced(local, action)


def _traced(local, action):
    before = sys.gettrace()
    sys.settrace(lambda frame, *_: local if frame.f_code.co_filename.startswith(PACKAGE) else None)
    try:
        action()
    finally:
        sys.settrace(before)


def test_a_ctrl_c_at_any_line_leaves_nothing_behind():
    """At each line of what changes the model; elsewhere at every seventh."""
    model = Noting()
    lines = lines_of(lambda: estimate_fisher(model, batches()))
    lines = lines_of(lambda: estimate_fisher(Noting(), batches(), seed=1)) + lines
    risky = ("untouched.py", "checkpointing.py", "one_by_one.py", "estimate.py", "interception.py")
    chosen = [
        line for n, line in enumerate(dict.fromkeys(lines)) if line[0].endswith(risky) or n % 7 == 0
    ]
    before, left = state_of(model), []
    for line in chosen:
        with contextlib.suppress(KeyboardInterrupt):
            interrupt_at(line, functools.partial(estimate_fisher, model, batches()))
        if state_of(model) != before:
            left.append(line)
            untouched._turn.clear()
            model = Noting()
            before = state_of(model)
    assert left == []
    assert len(chosen) > 200
    expected = estimate_fisher(Noting(), batches())
    assert estimate_fisher(model, batches()) == expected


def test_a_signal_while_a_model_is_put_back_waits(monkeypatch):
    model = Noting()
    before, put_back = state_of(model), untouched.Snapshot._put_back_parameters

    def interrupted(snapshot):
        os.kill(os.getpid(), signal.SIGINT)
        put_back(snapshot)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(untouched.Snapshot, "_put_back_parameters", interrupted)
    # A shell has its background processes ignore the signal, and these tests may be one.
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            estimate_fisher(model, batches())
    finally:
        signal.signal(signal.SIGINT, former)
    monkeypatch.undo()
    assert state_of(model) == before


@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_error_in_the_midst_of_a_backward(checkpointed):
    model = bert()
    if checkpointed:
        model.activation_checkpointing_enable()
    ids = torch.arange(8).view(2, 4)
    data = [{"input_ids": ids, "labels": torch.tensor([0, 1])}]
    before, calls = state_of(model), []

    def fail(gradient):
        calls.append(1)
        raise KeyboardInterrupt

    def hook(module, arguments, output):
        output.register_hook(fail)

    handle = model.bert.encoder.layer[1].output.dense.register_forward_hook(hook)
    with pytest.raises(KeyboardInterrupt):
        estimate_fisher(model.train(), data)
    handle.remove()
    assert calls == [1]
    assert state_of(model) == before


# Threads


def test_threads_that_estimate_on_one_model_wait_for_each_other():
    model, other = bert(), bert()
    ids = torch.randint(1, 50, (12, 6), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": ids[n], "labels": n % 3} for n in range(12)]
    expected = estimate_fisher(model, rows, batch_size=3)
    before, results = state_of(model), [None] * 4

    def estimate(n):
        which, some = (other if n == 3 else model), (["classifier.weight"] if n == 0 else None)
        results[n] = estimate_fisher(
            which, rows, batch_size=3, fisher_type="exact", parameters=some
        )

    threads = [threading.Thread(target=estimate, args=(n,), daemon=True) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert state_of(model) == before
    for fisher in results:
        wanted = {name: expected.diagonal[name].double() for name in fisher.diagonal}
        oracle.assert_close(fisher.diagonal, wanted)
    assert [len(fisher.diagonal) for fisher in results] == [1, *[len(expected.diagonal)] * 3]


def test_an_estimate_within_one_on_the_same_model_is_refused():
    model = Noting()

    def log_likelihood(module, batch):
        estimate_fisher(model, batches())
        return module(batch["x"])["logits"].sum(1)

    before = state_of(model)
    with pytest.raises(RuntimeError, match="being estimated already"):
        estimate_fisher(model, batches(), log_likelihood=log_likelihood)
    assert state_of(model) == before


def test_a_ctrl_c_at_any_line_of_a_forward_beside_leaves_none_behind():
    source = unwatched.__file__

    def beside():
        with unwatched.unwatched():
            pass

    lines = [line for line in lines_of(beside) if line[0] == source]
    assert len(lines) >= 4
    for line in lines:
        with contextlib.suppress(KeyboardInterrupt):
            interrupt_at(line, beside)
        assert unwatched.is_watched(), line
