"""Ways of not forgetting, side by side, on intents that come domain after domain (clinc150).

    scripts/reproduce clinc150 [--domains 10] [--only plain EWC ...] [--seeds N]

Ten domains of fifteen intents, 15 training examples of each; the upper two layers of MiniLM, its
pooler and one head are trained, six epochs a domain. EWC is the untouched `EWCConfig()`; the λ of
L2-SP and the shares were set once and not tuned. The head alone and LoRA learn at rates of their
own, of a grid that `--validation` shows, on data kept out of the training data.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from options import TableOptions, parsed
from sequences import TaskSequence, clinc150
from ways import ONLY_THE_LAST, ways, with_lora

RATES = (2e-3, 5e-3, 2e-2, 5e-2, 1e-1)


@dataclass
class Clinc150Options(TableOptions):
    domains: int = field(default=10, metadata={"help": "The first so many of the ten domains."})


def methods_of(sequence: TaskSequence) -> dict[str, Any]:
    lora = partial(
        with_lora, sequence.make_model, layers_to_transform=[4, 5], layers_pattern="layer"
    )
    return {
        **ways({"ewc_lambda": "state"}),
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
    options: Clinc150Options = parsed("clinc150", kind=Clinc150Options)
    sequence = clinc150(options, options.domains)
    methods = methods_of(sequence)
    if options.validation:
        methods = at_each_rate(methods)
    chosen = {name: methods[name] for name in options.among(methods)}
    print(sequence.compared(chosen, Path(str(options.output_dir)), options))


if __name__ == "__main__":
    main()
