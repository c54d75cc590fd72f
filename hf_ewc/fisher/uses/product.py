"""One example's gradient of a matrix in factors, and what can be known of it from these."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Product:
    """G = gᵀ x of a linear map; of a look-up G_v = Σ_r [i_r = v] x_r.

    Args:
        left: g, (R, height), or i, (R,) integers.
        right: x, (R, width).
        height: of G.
    """

    left: Tensor
    right: Tensor
    height: int

    @property
    def _is_lookup(self) -> bool:
        return not self.left.is_floating_point()

    def wide(self) -> Product:
        """In fp32 at least."""
        left = self.left if self._is_lookup else _wide(self.left)
        return replace(self, left=left, right=_wide(self.right))

    def times_rows(self, rows: Tensor) -> Tensor:
        """rᵀ G for r of (height,)."""
        left = rows[self.left] if self._is_lookup else self.left @ rows
        return left @ self.right

    def times_columns(self, columns: Tensor) -> Tensor:
        """G c for c of (width,)."""
        values = self.right @ columns
        if self._is_lookup:
            return values.new_zeros(self.height).index_add_(0, self.left, values)
        return values @ self.left

    def written_out(self) -> Tensor:
        """G, (height, width)."""
        if self._is_lookup:
            zeros = self.right.new_zeros(self.height, self.right.shape[1])
            return zeros.index_add_(0, self.left, self.right)
        return self.left.T @ self.right


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
