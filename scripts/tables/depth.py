"""λ by layer: more, or less, the nearer a layer is to the pixels, or as each layer's state tells.

    scripts/reproduce depth [--seeds 3]

The digits of `scripts/quickstart`, λ = 1e4 everywhere, beside three times as much, or a third, in
each step from the upper layer down: lower layer, embeddings. And λ as the state tells it of all
parameters together, beside what it tells of each layer.
"""

from pathlib import Path

from options import TableOptions, parsed
from sequences import digits

MIDDLE = 1e4


def by_depth(factor: float) -> dict[str, object]:
    """λ by module; the upper layer and the head have the middle one."""
    lower = {"vit.layers.0": MIDDLE * factor, "vit.embeddings": MIDDLE * factor**2}
    return {"ewc_lambda": MIDDLE, "ewc_layer_lambdas": lower}


METHODS = {
    "everywhere": {"ewc_lambda": MIDDLE},
    "more below": by_depth(3.0),
    "less below": by_depth(1 / 3),
    "state": {"ewc_lambda": "state"},
    "state, by layer": {"ewc_lambda": "state", "ewc_layer_lambdas": "state"},
}


def main() -> None:
    options: TableOptions = parsed("depth")
    chosen = {name: METHODS[name] for name in options.among(METHODS)}
    print(digits(options).compared(chosen, Path(str(options.output_dir)), options))


if __name__ == "__main__":
    main()
