"""One progress bar for a whole sequence of tasks."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TaskProgress(TrainerCallback):
    """A bar from the first task to the last, which names the task at work and its last loss.

    Args:
        names: of the tasks.
        done: how many of them were learnt before.
        label: what stands before the task's name.
    """

    def __init__(self, names: list[str], done: int, label: str) -> None:
        self.names, self.label, self.index = names, label, done
        self.bar: Any = tqdm(
            total=len(names),
            initial=done,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )

    def begin(self, index: int) -> None:
        """Show that this task begins."""
        self.index = index
        name = self.names[index]
        self.bar.set_description_str(f"{self.label}: {name} ({index + 1}/{len(self.names)})")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.bar.update(self.index + state.global_step / max(1, state.max_steps) - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        losses = {
            name: f"{float(value):.4g}"
            for name, value in (logs or {}).items()
            if name in ("loss", "task_loss", "ewc_penalty")
        }
        if losses:
            self.bar.set_postfix(losses)

    def close(self) -> None:
        self.bar.close()
