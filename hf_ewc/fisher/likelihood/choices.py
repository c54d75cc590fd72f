"""What is decided about each example while its objectives are made: drawn labels, orders."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from torch import Tensor

# (count, example) → `count` uniform numbers that depend on the example and the seed alone.
Uniforms = Callable[[int, int], Tensor]
# What was decided, by example and place.
Decided = dict[Hashable, Tensor]


class Choices:
    """What is decided about the examples of a batch; the same again where it is remembered.

    A label is drawn by inverting the distribution function, and classes are put in order by their
    probabilities. In half precision an example's outputs are not quite the same among others and
    alone, and the least difference decides otherwise. To compare the two, what was decided among
    others holds alone too.

    Args:
        uniforms: the numbers that labels are drawn with.
        ids: of the examples, in the order of the batch.
        decided: what was decided before, which is added to; None: nothing is remembered.
        place: what tells apart several decisions about one example.
        skipped: how many of an example's uniform numbers others have.
    """

    def __init__(
        self,
        uniforms: Uniforms,
        ids: Sequence[int],
        decided: Decided | None = None,
        place: tuple[Hashable, ...] = (),
        skipped: int = 0,
    ) -> None:
        self._uniforms = uniforms
        self._ids = ids
        self._decided = decided
        self._place = place
        self._skipped = skipped

    def of_factor(self, number: int) -> Choices:
        """Those of one of several independent outputs, which has numbers of its own."""
        place = (*self._place, number)
        return Choices(self._uniforms, self._ids, self._decided, place, self._skipped + number)

    def uniforms(self, count: int, example: int) -> Tensor:
        return self._uniforms(count + self._skipped, example)[self._skipped :]

    def settled(self, example: int, made: Tensor, *place: Hashable) -> Tensor:
        """What was decided of an example at this place before, and `made` where nothing was."""
        if self._decided is None:
            return made
        return self._decided.setdefault((self._ids[example], *self._place, *place), made)
