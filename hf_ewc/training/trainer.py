"""Elastic Weight Consolidation in the Hugging Face Trainer, and in any subclass of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import clip_grad
from torch.optim import Optimizer
from transformers import Seq2SeqTrainer, Trainer

from hf_ewc.config import EWCConfig
from hf_ewc.importance import Fisher
from hf_ewc.parameters.selection import select_parameters
from hf_ewc.processes import check_launch, uninterrupted
from hf_ewc.state.consolidation import Settings
from hf_ewc.state.ewc_state import EWCState
from hf_ewc.state.vanished import warn_of_vanished
from hf_ewc.training import deepspeed, model_card
from hf_ewc.training.active_penalty import ActivePenalty
from hf_ewc.training.estimation import fisher_of
from hf_ewc.training.final_weights import use_final_weights
from hf_ewc.training.held_out import hold_out
from hf_ewc.training.hyperparameters import without_ewc_settings
from hf_ewc.training.loss_scaling import answers_for_itself, correct_loss_scaling, has_own_loss
from hf_ewc.training.moved_weights import MovedWeights
from hf_ewc.training.once_per_step import OncePerStep, replaced, watched_optimizers
from hf_ewc.training.own_loop import has_own_loop, holds_any, watch_train
from hf_ewc.training.own_step import OwnStep
from hf_ewc.training.penalty_log import PenaltyLog
from hf_ewc.training.preferences import Likelihood
from hf_ewc.training.refusals import check_space, check_supported, refuse_another_model
from hf_ewc.training.runs import RunBegins, none_beyond_the_last_step
from hf_ewc.training.state_holder import StateHolder

logger = logging.getLogger("hf_ewc")


class EWCMixin(StateHolder):
    """Elastic Weight Consolidation for any subclass of the Trainer.

    >>> class EWCSFTTrainer(EWCMixin, SFTTrainer): ...

    Training minimizes L_task(θ) + (λ/2) Σ F (θ − θ*)² (Kirkpatrick et al. 2017, arXiv 1612.00796).
    The gradient that the optimizer gets is the task's plus exactly λ F (θ − θ*), once per optimizer
    step, in fp32, whatever the accumulation steps, processes, precision or loss function; gradient
    clipping and `grad_norm` see it. Evaluation is the task's alone. Logs hold `loss` =
    `task_loss` + `ewc_penalty`. With neither configuration nor state it is the plain Trainer.

    Args:
        ewc_config: how strongly and where to protect; the defaults if only a state is given.
        ewc_state: what earlier tasks left: an `EWCState`, a folder or an id on the Hub.

    Raises:
        ValueError: the state does not fit the model, the optimizer or sharding rules EWC out, or
            fewer processes take part than the launcher was asked for.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A subclass's own `train` is watched, too, where it does not call that of the mixin."""
        super().__init_subclass__(**kwargs)
        if cls.train is not EWCMixin.train:
            watch_train(cls, EWCMixin._ewc_watching)

    def __init__(
        self,
        *args: Any,
        ewc_config: EWCConfig | None = None,
        ewc_state: EWCState | str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if ewc_config is not None and not isinstance(ewc_config, EWCConfig):
            raise TypeError(
                f"ewc_config is a {type(ewc_config).__name__}; needed is an EWCConfig, such as "
                "EWCConfig(ewc_lambda=1e3)."
            )
        if ewc_config is not None and ewc_config.finds_lambda:
            _ = ewc_config.strength  # a number; no trainer knows of further trainings to find it by
        self.ewc_config = ewc_config if ewc_config is not None else EWCConfig()
        self._ewc_penalty: ActivePenalty | None = None
        self._ewc_log: PenaltyLog | None = None  # of this run, also where its state changes
        self._ewc_entry: OncePerStep | None = None
        self._ewc_has_begun = False  # whether this train() has taken its first step
        self._ewc_loss_is_scaled = False
        self._ewc_in_step = False
        self._ewc_is_watched = False
        self._ewc_in_own_loop = False  # which has called no training_step so far
        self._ewc_own_step = OwnStep(self)
        super().__init__(*args, ewc_config=ewc_config, **kwargs)
        self._ewc_data: tuple[Any, Any] = (None, None)  # what is trained on, and what is not
        self._ewc_hold_out()
        self.add_callback(RunBegins(self._ewc_expect_run))
        if self._ewc_requested or ewc_state is not None:
            check_launch(self.accelerator.num_processes)
            check_supported(self)
        if ewc_state is not None:
            self.ewc_state = ewc_state
        if self._ewc_requested and self.model is not None:
            self._ewc_check_patterns()

    def ewc_penalty(self) -> float:
        """λ/2 Σ F (θ − θ*)² + λ·offset of the model as it is now; 0 without a state.

        Under FSDP2 and ZeRO-3 every process has to call it, and each gets the whole sum.
        """
        return self._ewc_bound().penalty.value() if self._ewc_state else 0.0

    def consolidate(
        self,
        dataset: Any = None,
        *,
        name: str | None = None,
        weight: float = 1.0,
        log_likelihood: Likelihood | None = None,
        fisher: Fisher | None = None,
    ) -> EWCState:
        """Fold the Fisher of the model on `dataset` into the state, and protect it from now on.

        Call it after training on a task. Before any training, with a sample of general data, it
        protects what was learned in pretraining.

        Args:
            dataset: examples as the trainer's own `train_dataset` has them; that if None, or with
                `fisher_data` "held_out" the part of it that is not trained on. TRL's trainers
                tokenize texts, prompts and chats as they do their own, each an example. An iterable
                is read in order.
            name: of the task, for the records.
            weight: the task's weight in the sum of penalties.
            log_likelihood: a function of (model, batch) that returns log p(y|x) of each example,
                shape (batch,), for heads whose likelihood is not known; `batch` is what the
                trainer's collator makes. DPO's and reward trainers' pairs are known: one example is
                one pair, log p = log σ of the margin between its rewards.
            fisher: a Fisher that is there already, taken as it is, in place of an estimate.

        The new state takes the place of the former one and of the Fisher tensor by tensor: no
        more than the largest tensor is there twice, unless someone else holds them.

        Returns:
            The new state, also `self.ewc_state`. An optimizer with final weights apart from those
            that it trains (schedule-free) has put them into the model: they are the anchor.

        Raises:
            ValueError: there is no data, or none with labels; or both a Fisher and what to estimate
                it from.
            TypeError: `dataset` is no data set, `fisher` no Fisher.
        """
        config = self.ewc_config
        check_space(self._ewc_state, self._ewc_model, config.ewc_space)
        use_final_weights(self.optimizer)
        if fisher is None:
            data = self._ewc_hold_out() if dataset is None else dataset
            own = has_own_loss(self, EWCMixin) or self.compute_loss_func is not None
            own = own and not answers_for_itself(type(self))
            if log_likelihood is None and not own and self.is_world_process_zero():
                self._ewc_own_step.warn()
            fisher = fisher_of(self, self._ewc_model, data, config, log_likelihood, own)
        elif not isinstance(fisher, Fisher):
            raise TypeError(
                f"fisher is a {type(fisher).__name__}; needed is a Fisher, as estimate_fisher "
                "returns it."
            )
        elif dataset is not None or log_likelihood is not None:
            raise ValueError(
                "consolidate() got a fisher, which is taken as it is, and with it data or a "
                "log_likelihood to estimate one from; give one or the other."
            )
        settings = Settings(
            config.ewc_mode,
            config.ewc_gamma,
            weight,
            config.ewc_state_dtype,
            config.ewc_keep_fraction,
            "cpu" if config.ewc_offload else None,
            config.settled(self._ewc_state).strength_after(self._ewc_state.num_tasks),
        )
        finish = self._ewc_state.begin_consolidation(fisher, self._ewc_model, settings, name)
        self._ewc_weights_in_use.note("consolidated", self._ewc_model)
        del fisher
        with uninterrupted():  # from here the former state goes, tensor by tensor
            self._ewc_state = EWCState()
            self._ewc_drop_penalty()
            self.ewc_state = finish()
        warn_of_vanished(self.ewc_state.tasks, self.is_world_process_zero())
        return self.ewc_state

    def _ewc_hold_out(self) -> Any:
        """The data that the Fisher is of: all that is trained on, or a part kept out of training.

        That part is taken out once of each data set that the trainer is given.
        """
        if self.ewc_config.fisher_data != "held_out":
            return self.train_dataset
        trained_on, held_out = self._ewc_data
        if trained_on is None or self.train_dataset is not trained_on:
            held_out = hold_out(self)
            self._ewc_data = (self.train_dataset, held_out)
        return held_out

    # ---- Training ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The task loss, in training mode plus the penalty as a differentiable term.

        Within the Trainer's own steps it is the task loss, since there the penalty's gradient is
        added once per optimizer step by `training_step`.
        """
        self._ewc_own_step.reaches(inputs)
        result: Any = super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        in_step = self._ewc_in_step or self._ewc_in_own_loop
        if in_step or not model.training or not self._ewc_state:
            return result
        loss, *outputs = result if return_outputs else (result,)
        loss = loss + self._ewc_bound().penalty.differentiable().to(loss.device, loss.dtype)
        return (loss, *outputs) if return_outputs else loss

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Forward and backward of the task; at the end of a window, the penalty's gradient.

        Returns the task loss; the logs add the penalty (see `log`). Inside `train()` the gradient
        enters around whatever `training_step` a subclass has, also one that does not call this.
        """
        self._ewc_own_step.reaches(inputs)
        with self._ewc_around_step(model):
            if self._ewc_active:
                self._ewc_correct_scaling(model, inputs, num_items_in_batch)
            return super().training_step(model, inputs, num_items_in_batch, *args, **kwargs)

    @contextmanager
    def _ewc_around_step(self, model: nn.Module) -> Iterator[None]:
        """Around the outermost training step: losses in it are the task's, then the penalty enters.

        `OncePerStep` sees to optimizer steps that are taken before its end.
        """
        if self._ewc_in_step or not self._ewc_active:
            yield
            return
        self._ewc_in_own_loop = False
        if not self._ewc_has_begun:
            self._ewc_begin(model)
        if self._ewc_entry is not None:
            self._ewc_entry.forget()
            self._ewc_entry.look_before()
        self._ewc_in_step = True
        try:
            yield
        finally:
            self._ewc_in_step = False
        if self.accelerator.sync_gradients and not self.is_deepspeed_enabled:
            self._ewc_enter()
            if self._ewc_entry is not None:
                self._ewc_entry.look_after()

    def _ewc_enter(self) -> None:
        """Let the penalty's gradient enter, in the units that a gradient scaler left the others."""
        if self._ewc_entry is not None:
            scaler = self.accelerator.scaler
            self._ewc_entry.enter(1.0 if scaler is None else float(scaler.get_scale()))

    def _ewc_begin_without_step(self, optimizer: Optimizer | None = None) -> None:
        """In a training loop that calls no `training_step`, begin where its gradients are used."""
        if self._ewc_has_begun or not self._ewc_state or self.is_deepspeed_enabled:
            return
        if optimizer is None or holds_any(optimizer, self._ewc_model.parameters()):
            self._ewc_begin(self._ewc_model)

    @contextmanager
    def _ewc_watching(self) -> Iterator[None]:
        """For the time of a run: see each training step, clipping and optimizer step.

        Raises:
            RuntimeError: a loop of a subclass has moved weights, and no penalty entered.
        """
        if self._ewc_is_watched:
            yield
            return

        def before(optimizer: Optimizer, *step: Any) -> Any:
            self._ewc_begin_without_step(optimizer)
            return (
                None if self._ewc_entry is None else self._ewc_entry.before_step(optimizer, *step)
            )

        def after(*step: Any) -> None:
            if self._ewc_entry is not None:
                self._ewc_entry.after_step(*step)

        def around_step(step: Callable[..., Any]) -> Callable[..., Any]:
            def with_penalty(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                with self._ewc_around_step(model), self._ewc_own_step.around(inputs):
                    return step(model, inputs, *args, **kwargs)

            return with_penalty

        def before_clipping(clip: Callable[..., Any]) -> Callable[..., Any]:
            def with_penalty(*args: Any, **kwargs: Any) -> Any:
                if self.accelerator.sync_gradients:
                    self._ewc_begin_without_step()
                    self._ewc_enter()
                return clip(*args, **kwargs)

            return with_penalty

        def before_norm(norm: Callable[..., Any]) -> Callable[..., Any]:
            def with_penalty(gradients: Any, *args: Any, **kwargs: Any) -> Any:
                self._ewc_enter_before_norm(gradients)
                return norm(gradients, *args, **kwargs)

            return with_penalty

        with ExitStack() as stack:
            stack.enter_context(self._ewc_own_loop())
            stack.enter_context(replaced(self, "training_step", around_step))
            if not self.is_deepspeed_enabled:
                stack.enter_context(watched_optimizers(before, after))
                for name in ("clip_grad_norm_", "clip_grad_value_"):
                    stack.enter_context(replaced(self.accelerator, name, before_clipping))
                stack.enter_context(replaced(clip_grad, "_get_total_norm", before_norm))
            yield

    def _ewc_enter_before_norm(self, gradients: Any) -> None:
        """As torch's own `clip_grad_norm_` takes the norm of gradients, as in a user's step.

        Not where they are scaled: who clips them then may have unscaled them, or not.
        """
        entry = self._ewc_entry
        if (entry is not None and entry.has_entered) or not isinstance(gradients, (list, tuple)):
            return
        if not self.accelerator.sync_gradients or self.accelerator.scaler is not None:
            return
        own = {id(p.grad) for p in self._ewc_model.parameters() if p.grad is not None}
        if any(id(gradient) in own for gradient in gradients):
            self._ewc_begin_without_step()
            self._ewc_enter()

    @contextmanager
    def _ewc_own_loop(self) -> Iterator[None]:
        """Around a run, whose loop may be a subclass's own."""
        self._ewc_expect_run()
        self._ewc_is_watched = True
        self._ewc_in_own_loop = has_own_loop(type(self))
        looks = self._ewc_in_own_loop and bool(self._ewc_state)
        weights = MovedWeights(self._ewc_model.parameters()) if looks else None
        try:
            yield
        finally:
            own, self._ewc_in_own_loop, self._ewc_is_watched = self._ewc_in_own_loop, False, False
        if own and weights is not None and not self._ewc_has_begun:
            weights.refuse()

    def _ewc_correct_scaling(
        self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None
    ) -> None:
        """Find out, by the first batch that tells, whether the loss is scaled as assumed."""
        if not self._ewc_loss_is_scaled:
            own = has_own_loss(self, EWCMixin)
            self._ewc_loss_is_scaled = answers_for_itself(type(self)) or correct_loss_scaling(
                self, model, inputs, num_items, self.compute_loss if own else None
            )

    def _ewc_state_is_new(self) -> None:
        self._ewc_drop_penalty()

    def _ewc_drop_penalty(self) -> None:
        """The next use looks up anew what is protected."""
        if self._ewc_entry is not None:
            self._ewc_entry.close()
        self._ewc_penalty, self._ewc_entry, self._ewc_has_begun = None, None, False

    def _ewc_expect_run(self) -> None:
        """Training begins: what was found out in an earlier run may not hold for this one."""
        self._ewc_drop_penalty()
        self._ewc_log, self._ewc_loss_is_scaled = None, False

    def _ewc_begin(self, model: nn.Module) -> None:
        """At the first step of a run: look up what is protected.

        Only now are the parameters those that will be trained: FSDP2 has replaced them all, and
        `auto_find_batch_size` may have wrapped the model anew.
        """
        self._ewc_has_begun = True
        self._ewc_weights_in_use.forget()
        if not self._ewc_state:
            return
        active = ActivePenalty(self._ewc_state, model, self.ewc_config, self._ewc_log)
        self._ewc_penalty, self._ewc_log = active, active.log
        active.begin(self.state.global_step)
        if not self.is_deepspeed_enabled:
            self._ewc_entry = OncePerStep(active, model, lambda: self.ewc_config)
            return

        def add() -> None:
            active.follow(self.ewc_config)
            active.add_gradients_in(self.deepspeed)

        # The engine takes its step inside the backward pass.
        deepspeed.around_each_step(model, add, lambda: deepspeed.clear_gradients(active.penalty))

    def _ewc_check_patterns(self) -> None:
        """Refuse patterns that match nothing now, not after the training that they were meant for.

        Raises:
            ValueError: a pattern of the configuration matches no parameter.
        """
        config, state = self.ewc_config, self._ewc_state
        patterns = config.ewc_target_modules, config.ewc_exclude_modules
        if any(patterns) or config.ewc_layer_lambdas:
            names = select_parameters(self._ewc_model, *patterns, space=config.ewc_space)
            config.settled(state).lambdas(state.importance or names)

    def _ewc_bound(self) -> ActivePenalty:
        """The penalty on the model's present parameters, also outside of a run."""
        if self._ewc_penalty is None or not self._ewc_penalty.penalty.fits(self._ewc_model):
            self._ewc_drop_penalty()
            self._ewc_penalty = ActivePenalty(self._ewc_state, self._ewc_model, self.ewc_config)
        self._ewc_penalty.follow(self.ewc_config)
        return self._ewc_penalty

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent; warns where other weights are tested than those that were consolidated."""
        if self._ewc_active and not self.is_in_train and not self._ewc_in_half:
            use_final_weights(self.optimizer)
            self._ewc_weights_in_use.note("tested", self._ewc_model)
        return super().evaluation_loop(*args, **kwargs)

    @property
    def _ewc_in_half(self) -> bool:
        """Whether evaluation casts the model to half precision."""
        return bool(self.args.fp16_full_eval or self.args.bf16_full_eval)

    # ---- Logs ----

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log `loss` = `task_loss` + `ewc_penalty`, means since the last log."""
        if self._ewc_log is not None:
            self._ewc_log.amend(logs)
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card of the parent, with the tag `ewc` and a section on λ and the tasks."""
        super().create_model_card(*args, **kwargs)
        path = self._ewc_folder / "README.md"
        if self._ewc_state and self.is_world_process_zero() and path.is_file():
            model_card.add_section(path, self.ewc_config, self._ewc_state)

    # ---- Checkpoints ----

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As the parent; a checkpoint brings back the EWC state that it was saved with.

        `resume_from_checkpoint=True` takes the newest checkpoint that was saved to its end.
        """
        refuse_another_model(self)
        self._ewc_hold_out()
        if resume_from_checkpoint:
            resume_from_checkpoint = self._ewc_resume(resume_from_checkpoint)
        with self._ewc_watching(), none_beyond_the_last_step(self):
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        loss = output.metrics.get("train_loss", output.training_loss)
        return output if self._ewc_log is None else output._replace(training_loss=loss)

    def _hp_search_setup(self, trial: Any) -> None:
        """As the parent; what a trial says of fields of `EWCConfig` is set in `ewc_config`."""
        with without_ewc_settings(self, trial) as (rest, found):
            super()._hp_search_setup(rest)
        self._trial = trial
        if found:
            self.ewc_config = replace(self.ewc_config, **found)


class EWCTrainer(EWCMixin, Trainer):
    """The Hugging Face Trainer with Elastic Weight Consolidation; see `EWCMixin`."""


class EWCSeq2SeqTrainer(EWCMixin, Seq2SeqTrainer):
    """The Hugging Face Seq2SeqTrainer with Elastic Weight Consolidation; see `EWCMixin`."""
