"""How many of the architectures and heads of `transformers` the Fisher is right for, and how.

    python scripts/coverage.py --output coverage.json [--processes 2] [--only bert,gpt2]

Every pair of a model type and a head that an auto class with labels knows is made tiny, and its
empirical Fisher is held to a float64 loop over single examples that shares no code with the
library: it squares the gradients of the model's own loss, times the number of labels that this
loss is a mean over. Each pair runs in a worker process with a time limit. Prints the counts:

    fast        right to 1e-4 for every parameter in one backward, or as far as float32 goes: as
                near as the loop in float32, or to 1e-3 where in float64 it is right to 1e-6
    slow        the same, run one by one, which a warning says
    refused     a `ValueError` that says why
    wrong       answered, but not right, or answered where the loss is of no known likelihood
    crashed     another exception, or out of time
    not built   the architecture could not be made tiny, or its own forward and loss fail

Results go to the output as they come; a second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import multiprocessing
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import coverage_models as models
import torch
from torch import Tensor, nn

STATUSES = ("fast", "slow", "refused", "wrong", "crashed", "not built")
TOLERANCE = 1e-4
# Where the estimate in float64 shows that an error in float32 is rounding: of that one, of this.
EXACT, ROUNDED = 1e-6, 1e-3


def one_example(batch: dict[str, Any], n: int) -> dict[str, Any]:
    return {
        name: value[n : n + 1] if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def in_float64(batch: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }


def number_of_labels(outputs: Any, batch: dict[str, Any]) -> float | None:
    """How many labels the loss of one example is a mean over; None where it is of another kind."""
    loss, labels = float(outputs["loss"].detach()), batch.get("labels")
    for count, mean in _known_means(outputs, labels, batch):
        if count and abs(float(mean.detach()) - loss) <= 1e-6 * (abs(loss) + 1e-3):
            return count
    return None


def _known_means(outputs: Any, labels: Tensor | None, batch: dict[str, Any]) -> Any:
    """(labels, mean loss over them) by each of the likelihoods that a head may have."""
    cross_entropy, ignored = nn.functional.cross_entropy, -100
    if "start_positions" in batch:
        if "start_logits" in outputs:
            sides = [
                cross_entropy(outputs[f"{side}_logits"], batch[f"{side}_positions"])
                for side in ("start", "end")
            ]
            yield 2, sum(sides) / 2
        return
    logits = outputs.get("logits", outputs.get("prediction_logits"))
    if labels is None or logits is None:
        return
    if logits.shape == labels.shape:
        binary = nn.functional.binary_cross_entropy_with_logits(logits, labels.double())
        yield labels.numel(), binary
        yield 1, binary * labels.shape[-1]
        flat = logits.flatten(0, -2)
        yield len(flat), cross_entropy(flat, labels.flatten(0, -2).argmax(-1))
        return
    if logits.dim() == 4 and labels.dim() == 3:
        upsampled = nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear")
        yield int((labels != 255).sum()), cross_entropy(upsampled, labels, ignore_index=255)
        return
    if labels.shape == logits.shape[:-1]:
        flat = logits.flatten(0, -2)
        yield int((labels != ignored).sum()), cross_entropy(flat, labels.flatten())
        if labels.dim() > 1:
            flat, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            yield int((labels != ignored).sum()), cross_entropy(flat, labels)
    elif logits.dim() == 3 and labels.dim() == 2:
        yield from _alignments(logits, labels)


def _alignments(logits: Tensor, labels: Tensor) -> Any:
    """CTC of one example, as a sum or divided by its length, over some number of frames."""
    count = int((labels >= 0).sum())
    log_p = logits.log_softmax(-1).transpose(0, 1)
    for frames in range(logits.shape[1], count - 1, -1):
        total = nn.functional.ctc_loss(
            log_p, labels[labels >= 0], torch.tensor([frames]), torch.tensor([count]),
            reduction="sum",
        )  # fmt: skip
        yield 1, total
        yield count, total / count


def by_the_loop(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor] | None:
    """(1/N) Σ_n (∂ log p(y_n | x_n))²; None where the loss is of no known likelihood.

    In float64, but for models that make float32 of it somewhere in between, or NaN.
    """
    try:
        found = _by_the_loop(copy.deepcopy(model).double(), in_float64(batch))
    except RuntimeError:
        found = None
    if found is not None and all(value.isfinite().all() for value in found.values()):
        return found
    return _by_the_loop(copy.deepcopy(model), batch)


def _by_the_loop(twin: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor] | None:
    if getattr(twin.config, "_experts_implementation", None) == "grouped_mm":
        twin.set_experts_implementation("eager")  # grouped products have no float64
    parameters = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    totals = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    examples = models.EXAMPLES
    known = True
    for n in range(examples):
        one = one_example(batch, n)
        outputs = twin(**one)
        count = number_of_labels(outputs, one)
        known = known and count is not None
        gradients = torch.autograd.grad(
            outputs["loss"], list(parameters.values()), allow_unused=True
        )
        for total, gradient in zip(totals.values(), gradients, strict=True):
            if gradient is not None and count is not None:
                total += (count * gradient.double()) ** 2 / examples
    return totals if known else None


def largest_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Of each parameter relative to its largest entry, above a floor for what is 0 but for
    rounding."""
    floor = 1e-5 * max(float(value.max()) for value in expected.values())
    errors = {
        name: float((actual[name].double() - value).abs().max()) / (float(value.max()) + floor)
        for name, value in expected.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def of_rounding(model: nn.Module, batch: dict[str, Any], expected: dict[str, Tensor]) -> float:
    """How far the same loop in float32 is from the one in float64."""
    rounded = _by_the_loop(copy.deepcopy(model), batch)
    return 0.0 if rounded is None else largest_error(rounded, expected)[0]


def estimate(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    from hf_ewc import estimate_fisher

    return estimate_fisher(model, [batch], fisher_type="empirical").diagonal


def is_rounding(
    error: float, model: nn.Module, batch: dict[str, Any], expected: dict[str, Tensor]
) -> bool:
    """Whether an error is what float32 makes: of the loop too, or of the estimate, and not in
    float64."""
    if error <= 3 * of_rounding(model, batch, expected):
        return True
    if not error <= ROUNDED:
        return False
    try:
        exact = estimate(copy.deepcopy(model).double(), in_float64(batch))
    except Exception:  # of models that do not run in float64
        return False
    return largest_error(exact, expected)[0] <= EXACT


def examine(model_type: str, head: str) -> dict[str, str]:
    """The status of a pair, and why."""
    try:
        model, batch = models.build(model_type, head)
        expected = by_the_loop(model, batch)
    except Exception as error:
        return {"status": "not built", "why": _line(error)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = estimate(model, batch)
        except ValueError as error:
            return {"status": "refused", "why": _line(error)}
        except Exception as error:
            return {"status": "crashed", "why": _line(error)}
    if expected is None:
        return {"status": "wrong", "why": "answered, though the loss is of no known likelihood"}
    error, name = largest_error(found, expected)
    if not error <= TOLERANCE and not is_rounding(error, model, batch, expected):
        return {"status": "wrong", "why": f"{name}: relative error {error:.2e}"}
    slow = [str(w.message) for w in caught if "one by one" in str(w.message)]
    return {"status": "slow", "why": slow[0][:300]} if slow else {"status": "fast", "why": ""}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def work(connection: Any) -> None:
    """A worker process: pairs in, statuses out."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    while (pair := connection.recv()) is not None:
        connection.send(examine(*pair))


class Worker:
    """One worker process, replaced where a pair takes it down or runs out of time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: Any = None

    def examine(self, pair: tuple[str, str]) -> dict[str, str]:
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=work, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
        try:
            self._connection.send(pair)
            if self._connection.poll(self._seconds):
                found: dict[str, str] = self._connection.recv()
                return found
            why = f"no answer in {self._seconds:.0f} seconds"
        except (EOFError, OSError):
            why = "the process ended"
        self.end()
        return {"status": "crashed", "why": why}

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def run(pairs: list[tuple[str, str]], output: Path, processes: int, seconds: float) -> None:
    """Examine the pairs that the output does not hold yet, and write each result as it comes."""
    results = json.loads(output.read_text())["pairs"] if output.exists() else {}
    left = [pair for pair in pairs if "/".join(pair) not in results]
    one_at_a_time = threading.Lock()

    def examine_share(share: list[tuple[str, str]]) -> None:
        worker = Worker(seconds)
        for pair in share:
            found = worker.examine(pair)
            print(f"{found['status']:9} {pair[0]} {pair[1]} {found['why'][:160]}", flush=True)
            with one_at_a_time:
                results["/".join(pair)] = found
                write(results, output)
        worker.end()

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(examine_share, [left[i::processes] for i in range(processes)]))
    write(results, output)
    chosen = {"/".join(pair) for pair in pairs}
    show({name: result for name, result in results.items() if name in chosen})


def counts(results: dict[str, dict[str, str]]) -> dict[str, int]:
    found = collections.Counter(result["status"] for result in results.values())
    return {status: found[status] for status in STATUSES}


def write(results: dict[str, dict[str, str]], output: Path) -> None:
    text = json.dumps({"counts": counts(results), "pairs": dict(sorted(results.items()))}, indent=1)
    beside = output.with_name(output.name + ".new")
    beside.write_text(text + "\n")
    beside.replace(output)


def show(results: dict[str, dict[str, str]]) -> None:
    for status in STATUSES[1:]:
        for name, result in sorted(results.items()):
            if result["status"] == status:
                print(f"{status:9} {name}: {result['why']}")
    print(", ".join(f"{count} {status}" for status, count in counts(results).items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("coverage.json"))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=180.0, help="time limit of a pair")
    parser.add_argument("--only", default="", help="model types, heads or TYPE/HEAD, with commas")
    parser.add_argument("--every", type=int, default=1, help="take each n-th pair alone")
    options = parser.parse_args()
    wanted = set(filter(None, options.only.split(",")))
    chosen = [p for p in models.pairs() if not wanted or wanted & {*p, "/".join(p)}]
    run(chosen[:: options.every], options.output, options.processes, options.seconds)


if __name__ == "__main__":
    main()
