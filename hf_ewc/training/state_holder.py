"""A trainer that holds an EWC state, which goes wherever its model is saved or loaded."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer

from hf_ewc.config import EWCConfig
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.training import checkpoints
from hf_ewc.training.converted_weights import load_converted
from hf_ewc.training.final_weights import WeightsInUse, use_final_weights
from hf_ewc.training.refusals import check_supported

logger = logging.getLogger("hf_ewc")

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class StateHolder(_Base):
    """The state of a trainer, in its folder and its checkpoints; `EWCMixin` says what it does.

    Args:
        ewc_config: the settings, None where they were not given.
    """

    ewc_config: EWCConfig

    def __init__(self, *args: Any, ewc_config: EWCConfig | None = None, **kwargs: Any) -> None:
        self._ewc_requested = ewc_config is not None
        self._ewc_state = EWCState()
        self._ewc_weights_in_use = WeightsInUse()
        super().__init__(*args, **kwargs)

    @property
    def ewc_state(self) -> EWCState:
        """What the tasks consolidated so far left behind; empty before the first."""
        return self._ewc_state

    @ewc_state.setter
    def ewc_state(self, state: EWCState | str | os.PathLike[str] | None) -> None:
        if isinstance(state, (str, os.PathLike)):
            self.accelerator.wait_for_everyone()  # the main process may be writing it still
            folder, state = state, EWCState.from_pretrained(state)
            if not state and self.is_world_process_zero():
                logger.warning("The EWC state in %s is empty and protects nothing.", folder)
        elif state is None:
            state = EWCState()
        if not isinstance(state, EWCState):
            raise TypeError(
                f"ewc_state is a {type(state).__name__}; needed is an EWCState, a folder that "
                "save_pretrained wrote, an id on the Hub, or None."
            )
        if state:
            check_supported(self)
            state.check(self._ewc_model)
        self._ewc_state = state
        self._ewc_state_is_new()

    @property
    def _ewc_model(self) -> nn.Module:
        if self.model is None:
            raise ValueError("The trainer has no model.")
        return self.model

    @property
    def _ewc_folder(self) -> Path:
        return Path(self.args.output_dir or ".")

    @property
    def _ewc_active(self) -> bool:
        return self._ewc_requested or bool(self._ewc_state)

    def _ewc_state_is_new(self) -> None:
        """Called after another state has been set."""

    def _ewc_resume(self, resume: str | bool) -> str | bool | None:
        if not self._ewc_active:
            checkpoints.check_plain(resume, self._ewc_folder)
            return resume
        self.accelerator.wait_for_everyone()  # the main process may be writing a checkpoint still
        found = checkpoints.checkpoint_to_resume(resume, self._ewc_folder)
        checkpoints.check_same_everywhere(found)
        if isinstance(found, (str, os.PathLike)):
            self.ewc_state = checkpoints.stored_state(Path(found), self._ewc_state)
        return found

    def _load_from_checkpoint(self, folder: str, model: nn.Module | None = None) -> None:
        """As the parent, and right for models that are saved under other names than they have."""
        if not load_converted(self._ewc_model if model is None else model, folder):
            super()._load_from_checkpoint(folder, model)

    def _load_best_model(self) -> None:
        """As the parent, and right for models that are saved under other names than they have."""
        if self._ewc_active:
            use_final_weights(self.optimizer)  # what was saved takes the place of these
        best = self.state.best_model_checkpoint
        if best is None or not load_converted(self._ewc_model, best):
            super()._load_best_model()

    def _save_rng_state(self, output_dir: str) -> None:
        """As the parent; then the files of all processes are there.

        The Trainer's next act is trainer_state.json, which says that the checkpoint is whole.
        """
        super()._save_rng_state(output_dir)
        if self._ewc_active:
            self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the parent, with the EWC state in the same folder; checkpoints refer to one file.

        As with the parent only the main process writes, and all have to call it where the model is
        in shards.
        """
        if self._ewc_active:
            use_final_weights(self.optimizer)
            if not self.is_in_train:
                self._ewc_weights_in_use.note("saved", self._ewc_model)
        folder = self._ewc_folder if output_dir is None else Path(output_dir)
        in_checkpoint = _internal_call and output_dir is not None
        checkpoints.store(self._ewc_state, folder, in_checkpoint, self.args.should_save)
        super().save_model(output_dir, _internal_call)
        if self._ewc_active and self.ewc_config.ewc_anchor == "reference" and not in_checkpoint:
            checkpoints.refer_to_weights(self._ewc_state, folder, self.args.should_save)
