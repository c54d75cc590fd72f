"""The penalty while it is in use: on a model's present parameters, with the present settings."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor, nn

from hf_ewc.config import EWCConfig
from hf_ewc.fisher.uses.table import TensorTable
from hf_ewc.parameters.adapters import space_of
from hf_ewc.parameters.selection import select_parameters
from hf_ewc.state import heads
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.training import deepspeed
from hf_ewc.training.penalty import Penalty
from hf_ewc.training.penalty_log import PenaltyLog, warn_about, warn_of_nothing

# Parameters that a run of this process has begun with, as those that were consolidated.
_begun_with = TensorTable()


class ActivePenalty:
    """λ/2 Σ F (θ − θ*)² of one state on one model, its λ as configured, and its log.

    Args:
        state: importances and anchors; not the empty one.
        model: wrapped or not; its parameters are looked up here, and kept.
        config: where and how strongly to protect; later changes come by `follow`.
        former: the log of the same run under an earlier state.

    Attributes:
        penalty: the value and its gradient.
        log: means of the value between two logs of the Trainer.

    Raises:
        ValueError: the state does not fit the model, or a pattern of the configuration matches
            nothing.
    """

    def __init__(
        self,
        state: EWCState,
        model: nn.Module,
        config: EWCConfig,
        former: PenaltyLog | None = None,
    ) -> None:
        self._state = state
        self._model = model
        self._settings = replace(config)  # a copy, which no change of `config` reaches
        self._told = _Told(state)
        self.penalty = Penalty(state, model, self._strengths(), config.ewc_offload)
        names = [term.name for term in self.penalty.terms]
        self.log = PenaltyLog(names, config.ewc_log_groups, former)

    def follow(self, config: EWCConfig) -> None:
        """Take up what has changed in the settings, as by a callback that anneals λ.

        Raises:
            ValueError: a changed value is not allowed.
        """
        if config != self._settings:
            self._settings = replace(config)  # which checks the values
            self.penalty.set_strengths(self._strengths())

    def begin(self, global_step: int) -> None:
        """Say what is wrong with the penalty, if anything, as training starts.

        Raises:
            ValueError: the model's head is not the one that was consolidated.
        """
        if global_step == 0:
            self._refuse_another_head()
        for term in self.penalty.terms:
            for parameter in term.trained:
                _begun_with.put(parameter)
        if global_step == 0:
            warn_about(self.penalty, at_anchor=self._settings.ewc_mode == "online")
        else:  # from a checkpoint, as far from the anchor as training has come
            warn_of_nothing(self.penalty)

    def _refuse_another_head(self) -> None:
        fingerprint = self._state.metadata.get("fingerprint") or {}
        if not fingerprint.get("head"):
            return
        distances = {t.name: d for t, d in self.penalty.relative_distances() if t.is_matrix}
        names = heads.replaced(fingerprint["head"], self._model, distances)
        names = [name for name in names if not self._was_trained_on(name)]
        if names:
            raise ValueError(
                f"The head of the model ({', '.join(names)}) is not the one that was consolidated: "
                f"it is {max(distances[name] for name in names):.2g} times its norm away from the "
                "EWC anchor, with no likeness to it, and nothing else that is trained is. Load "
                "that head, or give it up: "
                f"state.without(['{heads.module_of(fingerprint['head'])}']). If it is that head, "
                "trained on since: state.with_head(model)."
            )

    def _was_trained_on(self, name: str) -> bool:
        """Whether a head that is far from its anchor came there by training."""
        (term,) = (term for term in self.penalty.terms if term.name == name)
        known = any(_begun_with.get(parameter) for parameter in term.trained)
        return known or heads.is_like(term.parameter, self._state.anchor[name])

    def add_gradients(self, loss_scale: float = 1.0, members: Container[int] | None = None) -> None:
        """Add `loss_scale` · λ F (θ − θ*) to the gradients, and the value to the log.

        Args:
            loss_scale: what the gradients in place are multiplied by.
            members: numbers of the penalty's terms that are meant; None: all.
        """
        self._note(self.penalty.add_gradients(loss_scale, members))

    def add_gradients_in(self, engine: Any) -> None:
        """As `add_gradients`, to the gradients that DeepSpeed's engine keeps."""
        self._note(deepspeed.add_gradients(self.penalty, engine))

    def _note(self, values: Tensor) -> None:
        self.log.add(values, self.penalty.constant)

    def _strengths(self) -> dict[str, float]:
        """λ of each parameter of the state, 0 where the configuration leaves it free."""
        config, state = self._settings.settled(self._told), self._state
        strengths = config.lambdas(state.importance, state.num_tasks)
        patterns = config.ewc_target_modules, config.ewc_exclude_modules
        if not any(patterns):
            return strengths
        space = space_of(state.importance, self._model)
        chosen = set(select_parameters(self._model, *patterns, trainable_only=False, space=space))
        return {name: value if name in chosen else 0.0 for name, value in strengths.items()}


class _Told:
    """What a state tells, found once.

    Args:
        state: that is in force.
    """

    def __init__(self, state: EWCState) -> None:
        self.told_lambda = cache(state.told_lambda)
        self.told_layer_lambdas = cache(state.told_layer_lambdas)
