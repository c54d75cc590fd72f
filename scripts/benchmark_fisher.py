"""What an exact per-example Fisher costs, against one plain forward+backward on the same batch.

    python scripts/benchmark_fisher.py --out runs/benchmarks/fisher.json

Protocol: random tokens or pixels, the true labels (`empirical`), eval mode. In one process the
methods take turns on the same batch: the plain forward+backward; the one-backward engine; a loop
over single examples; `torch.func.vmap(grad)`; and, where it is installed, opacus. A method's ratio
is the median over turns of (its time) / (the plain time of that turn). "error" is the largest
relative error of a parameter's Fisher, summed over its entries, against the loop; what raises is
"fails". "estimate 24" and "estimate 200" are whole calls of `estimate_fisher` on that many examples
of a model that it sees for the first time, with the proof that examples are kept apart, against as
many plain passes. Times are CPU times, on a GPU those of the clock. Peak memory is measured in a
process of its own for each method: what is allocated at most over two passes, model included (on a
CPU: resident memory above that before the model was made). The plain passes then keep their
gradients, as with gradient accumulation: a Fisher that sums over batches takes the place of
`.grad`.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import write_json
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from hf_ewc import estimate_fisher
from hf_ewc.fisher.engine.one_backward import OneBackward
from hf_ewc.fisher.engine.one_by_one import OneByOne
from hf_ewc.fisher.examples.batch import ExampleBatch
from hf_ewc.fisher.likelihood.reader import LabelReader

Batch = dict[str, Tensor]
Pass = Callable[[], dict[str, Tensor] | None]
WIDTH = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}


def bert(examples: int, length: int) -> tuple[nn.Module, Batch]:
    config = transformers.BertConfig(
        **{**WIDTH, "num_attention_heads": 12},
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    ids = torch.randint(1000, config.vocab_size, (examples, length))
    mask = torch.ones_like(ids)
    mask[::2, -length // 4 :] = 0  # padded
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(examples) % 2}
    return transformers.BertForSequenceClassification(config), batch


def vit(examples: int) -> tuple[nn.Module, Batch]:
    config = transformers.ViTConfig(**WIDTH, intermediate_size=1536, num_labels=10)
    pixels = torch.randn(examples, 3, 224, 224)
    batch = {"pixel_values": pixels, "labels": torch.arange(examples) % 10}
    return transformers.ViTForImageClassification(config), batch


def gpt2(examples: int, length: int) -> tuple[nn.Module, Batch]:
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    config = transformers.GPT2Config(n_embd=384, n_layer=6, n_head=6, **off)
    ids = torch.randint(0, config.vocab_size, (examples, length))
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


def llama(examples: int, length: int) -> tuple[nn.Module, Batch]:
    config = transformers.LlamaConfig(
        **WIDTH, vocab_size=32000, intermediate_size=1024, use_cache=False
    )
    ids = torch.randint(0, config.vocab_size, (examples, length))
    return transformers.LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


def lora(examples: int, length: int) -> tuple[nn.Module, Batch]:
    model, batch = llama(examples, length)
    return get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"])), batch


CASES: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {
    "BERT T=128 B=8": lambda: bert(8, 128),
    "BERT T=32 B=32": lambda: bert(32, 32),
    "ViT T=197 B=8": lambda: vit(8),
    "GPT-2 tied T=128 B=8": lambda: gpt2(8, 128),
    "Llama T=128 B=8": lambda: llama(8, 128),
    "LoRA T=32 B=32": lambda: lora(32, 32),
}


def make(case: str, device: str, dtype: torch.dtype) -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model, batch = CASES[case]()
    moved = {
        name: value.to(device, dtype if value.is_floating_point() else None)
        for name, value in batch.items()
    }
    model.config.use_cache = False  # no method needs keys and values kept
    return model.to(device, dtype).eval(), moved


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# Each method: prepared once for a model and a batch, then run as often as needed. It returns the
# squares summed over the examples, by name.


def counted(batch: Batch) -> ExampleBatch:
    return ExampleBatch(dict(batch), list(range(len(batch["labels"]))))


def plain(model: nn.Module, batch: Batch, keep: bool = False) -> Pass:
    reader = LabelReader(model)
    reader.settle(counted(batch))

    def run() -> None:
        reader.distribution(dict(batch)).empirical().backward()
        if not keep:
            model.zero_grad(set_to_none=True)

    return run


def engine(model: nn.Module, batch: Batch, kind: type = OneBackward) -> Pass:
    reader = LabelReader(model)
    reader.settle(counted(batch))
    estimator = kind(model, trainable(model))

    def objectives(part: ExampleBatch) -> Iterator[Tensor]:
        yield reader.distribution(part.inputs).empirical()

    def run() -> dict[str, Tensor]:
        estimator.add(counted(batch), objectives)
        return estimator.totals()

    return run


def loop(model: nn.Module, batch: Batch) -> Pass:
    return engine(model, batch, OneByOne)


def per_example_vmap(model: nn.Module, batch: Batch) -> Pass:
    parameters = {name: p.detach() for name, p in trainable(model).items()}
    totals = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def loss(values: dict[str, Tensor], example: Batch) -> Tensor:
        one = {name: value.unsqueeze(0) for name, value in example.items() if name != "labels"}
        logits = functional_call(model, values, (), one).logits
        labels = example["labels"].unsqueeze(0)
        if logits.dim() == 3:
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return nn.functional.cross_entropy(logits, labels, reduction="sum")

    gradients = vmap(grad(loss), in_dims=(None, 0))

    def run() -> dict[str, Tensor]:
        for name, value in gradients(parameters, batch).items():
            totals[name] += value.square().sum(0)
        return totals

    return run


def opacus(model: nn.Module, batch: Batch) -> Pass:
    from opacus import GradSampleModule

    wrapped = GradSampleModule(model, strict=False, loss_reduction="sum")
    reader = LabelReader(model)
    reader.settle(counted(batch))
    totals = {name: torch.zeros_like(p) for name, p in trainable(model).items()}

    def run() -> dict[str, Tensor]:
        wrapped.train()  # it records in train mode alone; the models have no dropout
        reader.distribution(dict(batch)).empirical().backward()
        for name, parameter in trainable(model).items():
            totals[name] += parameter.grad_sample.square().sum(0)
            parameter.grad_sample = None
        wrapped.zero_grad(set_to_none=True)
        return totals

    return run


METHODS: dict[str, Callable[[nn.Module, Batch], Pass]] = {
    "plain": plain,
    "engine": engine,
    "loop": loop,
    "vmap": per_example_vmap,
    "opacus": opacus,
}


def timed(run: Callable[[], object], device: str) -> float:
    clock = time.perf_counter if device == "cuda" else time.process_time
    begin = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def measure_estimates(
    case: str, turns: int, device: str, dtype: torch.dtype, examples: int
) -> dict[str, Any]:
    """A whole estimate on `examples` of a new model, against the plain passes over them."""
    model, batch = make(case, device, dtype)
    batches = [batch] * max(examples // len(batch["labels"]), 1)
    passes = plain(model, batch)
    passes()
    ratios, seconds = [], []
    for _ in range(turns):
        fresh = copy.deepcopy(model)
        base = timed(lambda: [passes() for _ in batches], device)
        seconds.append(timed(lambda: estimated(fresh, batches), device))  # noqa: B023 (run at once)
        ratios.append(seconds[-1] / base)
    return {"ratio": statistics.median(ratios), "seconds": min(seconds), "peak_bytes": None}


def estimated(model: nn.Module, batches: list[Batch]) -> None:
    estimate_fisher(model, batches, fisher_type="empirical", fallback="error")


def measure(case: str, turns: int, device: str, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Ratios and errors of each method on one case."""
    runs: dict[str, Pass] = {}
    sums: dict[str, dict[str, float]] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, prepare in METHODS.items():
        model, batch = make(case, device, dtype)
        try:
            runs[name] = prepare(model, batch)
            squares = runs[name]() or {}
            sums[name] = {k.removeprefix("_module."): float(v.sum()) for k, v in squares.items()}
        except Exception as error:
            results[name] = {"fails": f"{type(error).__name__}: {str(error)[:80]}"}
            runs.pop(name, None)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            seconds[name].append(timed(run, device))
    for name in runs:
        ratios = [one / base for one, base in zip(seconds[name], seconds["plain"], strict=True)]
        results[name] = {"ratio": statistics.median(ratios), "seconds": min(seconds[name])}
        if sums[name] and name != "loop":
            results[name]["error"] = largest_error(sums[name], sums["loop"])
    return results


def largest_error(sums: dict[str, float], expected: dict[str, float]) -> float:
    floor = 1e-6 * max(expected.values())
    return max(
        abs(sums.get(name, 0.0) - value) / value
        for name, value in expected.items()
        if value > floor
    )


def peak_memory(case: str, method: str, device: str, dtype: torch.dtype) -> int | None:
    """Bytes, from a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = sender, case, method, device, dtype, torch.get_num_threads()
    process = context.Process(target=_peak_in_process, args=arguments)
    process.start()
    sender.close()
    try:
        peak: int | None = receiver.recv()
    except EOFError:
        peak = None
    process.join()
    return peak


def _peak_in_process(
    sender: Any, case: str, method: str, device: str, dtype: torch.dtype, threads: int
) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    before = _resident("VmRSS")
    model, batch = make(case, device, dtype)
    try:
        kept = method == "plain"
        run = plain(model, batch, keep=True) if kept else METHODS[method](model, batch)
        run()
        run()
    except Exception:
        sender.send(None)
        return
    if device == "cuda":
        sender.send(torch.cuda.max_memory_allocated())
    else:
        sender.send(_resident("VmHWM") - before)


def _resident(field: str) -> int:
    """Bytes resident now (VmRSS) or at most (VmHWM), on Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {field}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--estimates", nargs="*", type=int, default=[24, 200], metavar="EXAMPLES")
    parser.add_argument("--out", type=Path, help="write the figures as JSON to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    dtype = getattr(torch, options.dtype)
    results: dict[str, Any] = {}
    print(f"{'':<22}{'method':<14}{'time × plain':>13}{'memory × plain':>16}{'error':>10}")
    for case in options.cases:
        results[case] = measure(case, options.turns, options.device, dtype)
        memory = {m: peak_memory(case, m, options.device, dtype) for m in METHODS}
        for method, figures in results[case].items():
            figures["peak_bytes"] = memory[method]
        for count in options.estimates:
            results[case][f"estimate {count}"] = measure_estimates(
                case, options.turns, options.device, dtype, count
            )
        for method, figures in results[case].items():
            print(f"{case:<22}{method:<14}{_line(figures, memory)}", flush=True)
    result = {"cases": results, "device": options.device, "dtype": options.dtype}
    write_json(options.out, result)


def _line(figures: dict[str, Any], memory: dict[str, int | None]) -> str:
    if "fails" in figures:
        return f"   fails ({figures['fails']})"
    peak, base = figures["peak_bytes"], memory["plain"]
    used = f"{peak / base:16.2f}" if peak and base else " " * 16
    error = f"{figures['error']:10.0e}" if "error" in figures else ""
    return f"{figures['ratio']:13.2f}{used}{error}"


if __name__ == "__main__":
    main()
