"""Where the penalty's gradient enters: once per optimizer step, whoever computes the loss.

A training step may be the user's own, with several losses in it (adversarial training), several
optimizers, or steps that it takes itself. So nothing here looks at losses. The gradient enters at
the first of

- the end of the outermost training step that closes an accumulation window,
- a clipping of gradients by the accelerator, or by the norm that torch's own takes,
- the step of an optimizer that holds a protected parameter; torch announces every optimizer's,

at the weights there are then, and not again before that optimizer has stepped. What has no gradient
at all takes no step, and gets none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from hf_ewc.config import EWCConfig
from hf_ewc.parameters.sharding import local_part
from hf_ewc.training.active_penalty import ActivePenalty
from hf_ewc.training.moved_weights import MovedWeights

# Numbers of the terms of a penalty.
Members = frozenset[int]


class OncePerStep:
    """Which gradients hold the penalty's, between one optimizer step and the next.

    Args:
        active: whose gradients are added.
        model: that is trained, to see whether its parameters are still those of the penalty.
        settings: those of now, which hold for the gradients that enter.
    """

    def __init__(
        self, active: ActivePenalty, model: nn.Module, settings: Callable[[], EWCConfig]
    ) -> None:
        self._active = active
        self._model = model
        self._settings = settings
        terms = active.penalty.terms
        self._by_parameter: dict[int, set[int]] = {}
        for i, term in enumerate(terms):
            for parameter in term.parameters:
                self._by_parameter.setdefault(id(parameter), set()).add(i)
        self._every: Members = frozenset(range(len(terms)))
        self._entered: Members = frozenset()
        self._optimizers: WeakKeyDictionary[Optimizer, tuple[int, Members]] = WeakKeyDictionary()
        self._closures: list[Callable[[], Any]] = []
        self._depth = 0
        self._noted = False
        self._witness = _Witness()
        self._has_entered = False
        self._before: MovedWeights | None = None

    def close(self) -> None:
        """Take the hooks off."""
        self._witness.close()

    def forget(self) -> None:
        """No gradient holds the penalty's: as a training step begins."""
        self._entered, self._depth = frozenset(), 0
        self._noted = False
        self._closures.clear()
        self._witness.let_go()

    @property
    def has_entered(self) -> bool:
        """Whether the gradients in place hold the whole penalty's."""
        return self._entered == self._every and not self._witness.saw_another_gradient()

    def enter(self, loss_scale: float = 1.0, members: Members | None = None) -> None:
        """Add the penalty's gradient where it is not yet, if there are gradients at all.

        Args:
            loss_scale: by which the gradients in place are multiplied.
            members: the parameters concerned; None: all.
        """
        if self._entered and self._witness.saw_another_gradient():
            self._entered = frozenset()
        missing = (self._every if members is None else members) - self._entered
        if not missing:
            self._note_nothing()
            return
        if self._entered:
            self._add(loss_scale, missing)
        elif self._witness.has_gradient or _have_gradients(self._model.parameters()):
            terms = self._active.penalty.terms
            self._witness.watch(p for i in missing for p in terms[i].parameters)
            self._add(loss_scale, missing)
            self._witness.remember()
        else:
            return
        self._entered |= missing

    def look_before(self) -> None:
        """As a window begins: what some weights are, until the penalty has entered once."""
        if not self._has_entered and self._before is None:
            terms = self._active.penalty.terms
            pulled = (p for term in terms if term.is_pulled for p in term.parameters)
            self._before = MovedWeights(pulled)

    def look_after(self) -> None:
        """As a window ends.

        Raises:
            RuntimeError: its training steps have moved weights, and no penalty entered.
        """
        before, self._before = self._before, None
        if before is not None and not self._has_entered:
            before.refuse()

    def _note_nothing(self) -> None:
        """A penalty that protects nothing is 0 in the log of each step, once."""
        if not self._every and not self._noted:
            self._noted = True
            self._add(1.0, self._every)

    def _add(self, loss_scale: float, missing: Members) -> None:
        self._has_entered = True
        self._active.follow(self._settings())
        self._active.add_gradients(loss_scale, None if missing == self._every else missing)

    def before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """At the beginning of any optimizer's step; may replace its arguments.

        The step of an optimizer around another one may take several gradients, as SAM's does: then
        the inner one's step is what counts.
        """
        members = self._members(optimizer)
        if not members:
            return None
        self._depth += 1
        _, *given = args  # torch hands on the optimizer, too
        closure = given[0] if given else kwargs.get("closure")
        if closure in self._closures:  # handed on to the step of a base class
            return None
        if closure is None:
            if _have_gradients_in(optimizer):
                self.enter(_scale_left(optimizer), members)
            return None
        self._entered -= members
        if _holds_another(optimizer):
            return None
        closure = self._with_penalty(closure, members)
        self._closures.append(closure)
        further = {name: value for name, value in kwargs.items() if name != "closure"}
        return (optimizer, closure, *given[1:]), further

    def _with_penalty(self, closure: Callable[[], Any], members: Members) -> Callable[[], Any]:
        """A closure that computes loss and gradients anew, of the task and the penalty."""

        def evaluate() -> Any:
            loss = closure()
            self._entered -= members
            self.enter(1.0, members)
            return None if loss is None else loss + self._active.penalty.value()

        return evaluate

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """At the end of any optimizer's step.

        Raises:
            RuntimeError: it moved protected parameters by gradients without the penalty's.
        """
        members = self._members(optimizer)
        if not members:
            return
        self._depth -= 1
        if self._depth > 0:
            return
        without = members - self._entered
        self._entered -= members
        self._closures.clear()
        self._witness.let_go()
        if without and _have_gradients_in(optimizer):
            raise RuntimeError(
                f"The optimizer {type(optimizer).__name__} took a step with gradients that it "
                "computed itself, which do not hold the EWC penalty's. Use an optimizer that takes "
                "its gradients from backward passes before its step."
            )

    def _members(self, optimizer: Optimizer) -> Members:
        """The terms whose parameters `optimizer` holds; looked up once for each optimizer.

        Raises:
            ValueError: the model has other parameters than those that the run began with.
        """
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._optimizers.get(optimizer)
        if known is not None and known[0] == size:
            return known[1]
        if not self._active.penalty.fits(self._model):
            raise ValueError(
                "Parameters that EWC protects were replaced during training, so that the optimizer "
                "would move others than those. Replace them before train(), or set "
                "trainer.ewc_state again, which looks them up anew."
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        members = frozenset(i for key in held for i in self._by_parameter.get(key, ()))
        self._optimizers[optimizer] = size, members
        return members


@contextmanager
def watched_optimizers(before: Callable[..., Any], after: Callable[..., None]) -> Iterator[None]:
    """Call `before` and `after` at every optimizer's step, with its (optimizer, args, kwargs)."""
    with ExitStack() as stack:
        stack.callback(register_optimizer_step_pre_hook(before).remove)
        stack.callback(register_optimizer_step_post_hook(after).remove)
        yield


@contextmanager
def replaced(owner: Any, name: str, around: Callable[[Callable[..., Any]], Any]) -> Iterator[None]:
    """Inside, `owner.name` is what `around` makes of it; nothing where there is none."""
    original = getattr(owner, name, None)
    if original is None:
        yield
        return
    own = name in vars(owner)
    setattr(owner, name, functools.wraps(original)(around(original)))
    try:
        yield
    finally:
        setattr(owner, name, original) if own else delattr(owner, name)


class _Witness:
    """Notices that gradients were cleared and computed again after the penalty had entered.

    Gradients that were merely replaced (clipped, say, by the user) still hold it; so one parameter
    is asked whether a backward pass has reached it since, and whether its gradient is another, or
    was 0 then.
    """

    def __init__(self) -> None:
        self._parameter: Tensor | None = None
        self._gradient: Tensor | None = None
        self._value: Tensor | None = None
        self._reached = self._was_zeroed = False
        self._handles: list[Any] = []

    @property
    def has_gradient(self) -> bool:
        """Whether the parameter has one; no parameter has none."""
        return self._parameter is not None and self._parameter.grad is not None

    def watch(self, candidates: Iterable[Tensor]) -> None:
        """Take the smallest parameter that the task's backward has reached."""
        if self.has_gradient:
            return
        self.close()
        reached = [p for p in candidates if p.grad is not None and p.is_leaf and p.requires_grad]
        if reached:
            parameter = self._parameter = min(reached, key=Tensor.numel)
            self._handles = [
                parameter.register_hook(self._look),
                parameter.register_post_accumulate_grad_hook(self._note),
            ]

    def remember(self) -> None:
        self._gradient = None if self._parameter is None else self._parameter.grad
        self._value = None if self._gradient is None else local_part(self._gradient).clone()
        self._reached = self._was_zeroed = False

    def let_go(self) -> None:
        """Keep no gradient alive."""
        self._gradient = self._value = None

    def saw_another_gradient(self) -> bool:
        """Whether the gradient is a new one, computed since `remember`."""
        parameter = self._parameter
        if parameter is None or not self._reached:
            return False
        return self._was_zeroed or parameter.grad is not self._gradient

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._parameter = self._gradient = self._value = None
        self._handles = []

    def _look(self, _: Tensor) -> None:
        """Before a backward pass adds to the gradient: it may be 0 now, the same tensor."""
        if self._gradient is None or self._value is None or self._was_zeroed:
            return
        self._was_zeroed = bool(self._value.any()) and not local_part(self._gradient).any()

    def _note(self, parameter: Tensor) -> None:
        self._reached = True


def _have_gradients(parameters: Iterable[Tensor]) -> bool:
    return any(parameter.grad is not None for parameter in parameters)


def _have_gradients_in(optimizer: Optimizer) -> bool:
    return _have_gradients(p for group in optimizer.param_groups for p in group["params"])


def _holds_another(optimizer: Optimizer) -> bool:
    return any(isinstance(value, Optimizer) for value in vars(optimizer).values())


def _scale_left(optimizer: Optimizer) -> float:
    """What gradients are multiplied by at an optimizer's step: fused ones unscale in it."""
    scale = getattr(optimizer, "grad_scale", None)
    return float(scale) if isinstance(scale, Tensor) else 1.0
