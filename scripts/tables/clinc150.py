"""Ways of not forgetting, side by side, on intents that come domain after domain (clinc150).

    scripts/reproduce clinc150 [--only plain EWC ...] [--seeds N]

Five domains of fifteen intents, 15 training examples of each; the upper two layers of MiniLM, its
pooler and one head are trained, six epochs a domain. EWC has the untouched λ; that of L2-SP and the
shares were set once and not tuned. The head alone and LoRA learn at rates of their own, of a grid
that `--validation` shows, on data kept out of the training data.
"""

from functools import partial
from pathlib import Path
from typing import Any

from options import TableOptions, parsed
from sequences import TaskSequence, clinc150
from ways import ONLY_THE_LAST, ways, with_lora

RATES = (2e-3, 5e-3, 2e-2, 5e-2, 1e-1)


def methods_of(sequence: TaskSequence) -> dict[str, Any]:
    lora = partial(
        with_lora, sequence.make_model, layers_to_transform=[4, 5], layers_pattern="layer"
    )
    return {
        **ways({"ewc_lambda": 1e3, "fisher_type": "sampled"}),
        "frozen encoder": {"trained_modules": ["classifier"], "learning_rate": 2e-2},
        "LoRA": {"make_model": lora, "sequence_config": ONLY_THE_LAST, "learning_rate": 5e-3},
    }


def at_each_rate(methods: dict[str, Any]) -> dict[str, Any]:
    """The methods with a learning rate of their own, with each of `RATES`."""
    return {
        f"{name}, {rate:g}": {**settings, "learning_rate": rate}
        for name, settings in methods.items() if "learning_rate" in settings
        for rate in RATES
    }  # fmt: skip


def main() -> None:
    options: TableOptions = parsed("clinc150")
    sequence = clinc150(options)
    methods = methods_of(sequence)
    if options.validation:
        methods = at_each_rate(methods)
    chosen = {name: methods[name] for name in options.among(methods)}
    print(sequence.compared(chosen, Path(str(options.output_dir)), options))


if __name__ == "__main__":
    main()
