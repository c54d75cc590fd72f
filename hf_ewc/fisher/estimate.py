"""`estimate_fisher`: the diagonal Fisher information of a model on a data set."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.utils import logging

from hf_ewc.config.checked import integer
from hf_ewc.fisher.counts import Counts
from hf_ewc.fisher.estimation import Estimation, warn_of_slowness
from hf_ewc.fisher.examples.batch import Collator
from hf_ewc.fisher.examples.packed import keeps_documents_apart
from hf_ewc.fisher.examples.sources import Selection, source_of
from hf_ewc.fisher.likelihood.own_loss import StatedLoss
from hf_ewc.fisher.passes import LogLikelihood, Passes, Plan
from hf_ewc.fisher.processes import Processes
from hf_ewc.fisher.proofs import Proofs, proofs_of
from hf_ewc.fisher.replicas import Replicas
from hf_ewc.fisher.sharded.in_step import InStep, is_sharded
from hf_ewc.fisher.untouched import in_turn, untouched
from hf_ewc.importance import FISHER_TYPES, Fisher
from hf_ewc.parameters import sharding
from hf_ewc.parameters.names import canonical_name, parameters_by_name, unwrap

# Scores of fp16 models are scaled up so that small gradients do not underflow, and no further, so
# that those of long sequences do not overflow.
_HALF_SCALE = 16.0


def estimate_fisher(
    model: nn.Module,
    data: Any,
    *,
    data_collator: Collator | None = None,
    fisher_type: str = "auto",
    num_samples: int | None = None,
    batch_size: int = 8,
    stratified: bool = False,
    seed: int = 0,
    parameters: Iterable[str] | None = None,
    log_likelihood: LogLikelihood | None = None,
    fallback: str = "warn",
    accelerator: Accelerator | None = None,
    num_draws: int = 1,
    stated: Sequence[StatedLoss] = (),
) -> Fisher:
    """Estimate the diagonal Fisher information of `model` on `data`, exactly per example.

    F_i = (1/N) Σ_n E_y[(∂ log p(y | x_n, θ) / ∂θ_i)²]   (Kirkpatrick et al. 2017, arXiv 1612.00796)

    log p of an example is the *sum* over its labelled positions; −100 and padding count nothing,
    and an example without a labelled position is not counted in N. Estimated in eval mode. The
    expectation over y (van de Ven 2025, arXiv 2502.11756) is

    - "exact": over the model's own classes, C − 1 backward passes for C classes (one for two);
      refused above 1000 passes an example, as over a vocabulary;
    - "sampled": `num_draws` labels ỹ ~ p(· | x_n), one per position given the real prefix;
    - "empirical": the true label;
    - "batched": the square of the gradient summed over a batch (B times the squared batch mean;
      no Fisher, for comparison with other libraries; it depends on the batches, and so on how
      many processes share the examples);
    - "auto": exact where it takes at most 9 passes, sampled otherwise.

    All examples of a batch take one backward, by interception of the forward's operations. That
    every use of every parameter was accounted for is checked on each batch; that examples were
    kept apart on one example of the first batch of each structure (number of examples, dtypes,
    lengths of lists, …), once for a model. Where either fails, examples are run one by one, and so
    are batches that are not a row for each example (images joined, some with two and some with
    none): what an example has when it is collated alone says which are.

    Args:
        model: any module; wrappers (DDP, compiled) are looked through.
        data: a data set or sequence of examples, or an iterable of batches (dicts with labels). A
            DataLoader over a whole data set stands for the data set: its sampler is not used.
        data_collator: makes a batch of a list of examples; `default_data_collator` if None.
        num_samples: how many examples are drawn, without replacement; None: all.
        batch_size: examples per backward; it does not change the result, "batched" apart. Halved,
            for the rest of the estimate, where a batch does not fit in memory.
        stratified: draw from each label in proportion to its share.
        seed: of the draw of examples and of the sampled labels.
        parameters: names to estimate, a tied one by any of its names; None: all that require a
            gradient.
        log_likelihood: a function of (model, batch) that returns log p(y|x) of each example,
            shape (B,), for heads that are not known here; taken as "empirical".
        fallback: "warn" where the slower way is taken, or "error" to refuse it.
        accelerator: whose processes each take their share of the examples; if None, those of
            torch.distributed where it runs. All of them have to call this, with the same data.
        num_draws: labels drawn per example for "sampled".
        stated: what a loss outside of the model comes to on a few examples and labels, such as a
            trainer's own: where it is −log p of what the outputs may mean, they mean that, and
            where it is not, a warning says so.

    Returns:
        The Fisher as a mean over the examples of all processes, fp32, by the names of the unwrapped
        model, the same in every process; under FSDP2 as DTensors that lie like the parameters.

    Raises:
        ValueError: no usable examples, no labels, an unknown parameter name or Fisher type, a
            complex parameter, a likelihood or gradient that is not finite, a use not covered with
            fallback="error".
        TypeError: batches or examples that are no dicts, a string for `parameters`.
        RuntimeError: another process has raised one of these.
        torch.OutOfMemoryError: one example does not fit in memory, or, where parameters are sharded
            (then in the process that it happens to, which has to end) or for "batched", a batch.
    """
    _check_arguments(
        fisher_type, num_samples, batch_size, fallback, num_draws, seed, log_likelihood
    )
    plain = unwrap(model)

    def estimate() -> Fisher:
        sharding.reshard(plain)
        selected = _select(plain, parameters)
        processes = replace(
            Processes.of(accelerator, next(iter(selected.values())).device),
            in_step=is_sharded(selected),
        )
        rank, size = processes.rank, processes.size
        packed = keeps_documents_apart(plain)
        wanted = Selection(num_samples, batch_size, stratified, seed, rank, size, packed)
        half = any(p.dtype == torch.float16 for p in selected.values())
        scale = _HALF_SCALE if half else 1.0
        plan = Plan(fisher_type, seed, num_draws, fallback, log_likelihood, scale, stated)
        estimation = _estimation(plain, selected, plan, processes)

        def run() -> None:
            read = functools.partial(source_of, data, data_collator, wanted)
            again = None if isinstance(data, Iterator) else read
            with processes.together():
                source = read()
            with processes.together():
                estimation.consume(source, _progress_bar(source.expected, processes), again)

        untouched(plain, selected, run)
        _warn_of_others(estimation, processes)
        return _finished(estimation, processes, plan, num_samples)

    return in_turn(plain, estimate)


def _estimation(
    model: nn.Module, selected: Mapping[str, nn.Parameter], plan: Plan, processes: Processes
) -> Estimation:
    one_by_one = plan.fisher_type != "batched"
    sharded = processes.in_step
    ways = (InStep if sharded else Replicas)(model, selected, processes, one_by_one=one_by_one)
    passes = Passes(model, plan, never_none=sharded)
    speaks = processes.rank == 0
    remembered = plan.log_likelihood is None
    proofs = proofs_of(model, selected) if remembered else Proofs()
    return Estimation(ways, passes, plan, model, proofs, speaks)


def _progress_bar(total: int | None, processes: Processes) -> functools.partial[Any]:
    return functools.partial(logging.tqdm, total=total, desc="Fisher", disable=processes.rank > 0)


def _warn_of_others(estimation: Estimation, processes: Processes) -> None:
    """On the main process, what the others ran into and it did not."""
    if not processes.largest([estimation.slow_because is not None])[0]:
        return
    reasons = processes.gather(estimation.slow_because)
    if processes.rank == 0 and estimation.slow_because is None:
        warn_of_slowness(next(filter(None, reasons)), stacklevel=3)


def _check_arguments(
    fisher_type: str,
    num_samples: int | None,
    batch_size: int,
    fallback: str,
    num_draws: int,
    seed: int,
    log_likelihood: LogLikelihood | None,
) -> None:
    allowed = ("auto", *FISHER_TYPES)
    if fisher_type not in allowed:
        raise ValueError(f"fisher_type is {fisher_type!r}; allowed are {', '.join(allowed)}.")
    if log_likelihood is not None and fisher_type in ("exact", "sampled"):
        raise ValueError(
            f"fisher_type={fisher_type!r} needs the distribution of labels, which log_likelihood "
            "does not give; use 'empirical' or 'auto' with it."
        )
    if num_samples is not None:
        integer("num_samples", num_samples, low=1, also="None for all")
    integer("batch_size", batch_size, low=1)
    integer("num_draws", num_draws, low=1)
    integer("seed", seed, low=0)
    if fallback not in ("warn", "error"):
        raise ValueError(f"fallback is {fallback!r}; allowed are 'warn' and 'error'.")


def _select(model: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Parameter]:
    every = parameters_by_name(model)
    if names is None:
        selected = {name: p for name, p in every.items() if p.requires_grad}
    else:
        if isinstance(names, str):
            raise TypeError(f"parameters is the string {names!r}; needed is a list of names.")
        aliases = _tied_names(model, every)
        wanted = [aliases.get(name, name) for name in names]
        if not wanted:
            raise ValueError("parameters is empty; give at least one name, or None for all.")
        if unknown := [name for name in wanted if name not in every]:
            raise ValueError(
                f"The model has no parameters {', '.join(map(repr, unknown[:5]))}; its names are "
                f"like {', '.join(map(repr, list(every)[:3]))}."
            )
        selected = {name: every[name] for name in wanted}
    if not selected:
        raise ValueError(
            "No parameter requires a gradient, so there is none to estimate the Fisher of. A PEFT "
            "adapter loaded without is_trainable=True is frozen."
        )
    _refuse_complex(selected)
    return selected


def _refuse_complex(selected: Mapping[str, nn.Parameter]) -> None:
    found = [name for name, parameter in selected.items() if parameter.is_complex()]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"The parameters {', '.join(map(repr, found[:3]))}{more} are complex "
            f"({str(selected[found[0]].dtype).removeprefix('torch.')}); the Fisher here is of real "
            "ones. Leave them out (parameters=, ewc_exclude_modules), or keep their real and "
            "imaginary parts as a real parameter and use it by torch.view_as_complex."
        )


def _tied_names(model: nn.Module, every: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """The name in `every` of each name that a tied parameter also has."""
    first = {id(parameter): name for name, parameter in every.items()}
    return {
        canonical_name(name): first[id(parameter)]
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _finished(
    estimation: Estimation, processes: Processes, plan: Plan, num_samples: int | None
) -> Fisher:
    """The mean over the examples of all processes, checked in each of them."""
    counts = _of_all(estimation.counts, processes)
    count = counts.examples
    if count == 0:
        raise ValueError(
            "No usable examples: the data set is empty, or no example has a labelled position "
            "(all labels are -100)."
        )
    if num_samples is not None and count < num_samples and processes.rank == 0:
        warnings.warn(
            f"The Fisher was estimated on {count} examples, fewer than the {num_samples} asked "
            "for: no more with a label were there.",
            stacklevel=3,
        )
    divisor = count * plan.scale**2
    diagonal = {name: total.div_(divisor).float() for name, total in estimation.totals().items()}
    with processes.together():
        _require_finite(diagonal)
    with processes.together():
        _require_numbers(counts.confidence)
    labels = max(counts.labels / count, 1.0)
    return Fisher(diagonal, count, estimation.fisher_type, labels, counts.confidence)


def _of_all(own: Counts, processes: Processes) -> Counts:
    examples, labels, sure, classed = processes.sums(astuple(own))
    return Counts(int(examples), int(labels), sure, int(classed))


def _require_numbers(confidence: float | None) -> None:
    if confidence is not None and math.isnan(confidence):
        raise ValueError(
            "The model's outputs are NaN on these examples: the training has diverged, or NaN "
            "stands in the weights or inputs. Lower the learning rate, or look for it there."
        )


def _require_finite(diagonal: Mapping[str, Tensor]) -> None:
    for name, value in diagonal.items():
        own = sharding.local_part(value)
        if own.numel() and not torch.isfinite(own.amax()):  # of squares: NaN or inf show in it
            raise ValueError(
                f"The gradient of {name!r} is not finite, so its Fisher is not. Look for NaN in "
                "the weights, or estimate in bf16 or fp32: fp16 ends at 65504."
            )
