"""The section on EWC in the model card that the Trainer writes."""

from __future__ import annotations

from pathlib import Path

from hf_ewc.config import EWCConfig
from hf_ewc.state import card
from hf_ewc.state.ewc_state import EWCState


def add_section(path: Path, config: EWCConfig, state: EWCState) -> None:
    """Give the card at `path` the tag `ewc` and a section on λ and the tasks, once."""
    text = card.with_section(path.read_text(encoding="utf-8"), section_on(config, state))
    path.write_text(text, encoding="utf-8")


def section_on(config: EWCConfig, state: EWCState) -> str:
    """A section of a model card on λ and the tasks."""
    growth = config.ewc_lambda_growth
    settings: dict[str, object] = {
        "λ": config.shown_lambda() + (f" × {growth:g} per further task" if growth != 1 else ""),
        "Mode": f"{config.ewc_mode}, γ = {config.ewc_gamma:g}",
    }
    if config.ewc_layer_lambdas:
        settings["λ by layer"] = f"`{config.ewc_layer_lambdas}`"
    return state.card_section(settings)
