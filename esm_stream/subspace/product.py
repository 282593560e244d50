"""Product of the polar factors of two stacks, the first of which is never whole in float64.

From:  methods/, the bases of all experts, read by rows, and their stacked coordinates.
To:    methods/, the merged update.
Peak:  float64: the root of the bases (polar.py; side S = min(O, R)) beside two R x I where R > I,
       or two squares of R; the coordinates while they are needed; one panel of 1024 rows of the
       bases; the update in the dtype it is asked for. O x I once more where R > O.

Letters: O output features, I input features, K columns of one block, R columns of the stack.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

from esm_stream.subspace.gram import row_panels
from esm_stream.subspace.polar import factor_by_reflectors, polar_root
from esm_stream.subspace.sizes import PANEL_ROWS, is_reduced


class Rows(Protocol):
    """A matrix whose rows are read when asked for; a tensor is one, and [:] makes one."""

    @property
    def shape(self) -> Sequence[int]:
        """(O, K)."""

    def __getitem__(self, rows: slice) -> Tensor:
        """The rows of a slice."""


class Stack:
    """[B_1 diag(w_1) | ... | B_T diag(w_T)], float64, shape (O, R), never whole."""

    def __init__(self, blocks: Sequence[Rows], weights: Sequence[Tensor]) -> None:
        self._blocks, self._weights = blocks, weights
        self._starts = list(accumulate((len(w) for w in weights), initial=0))
        self.shape = (blocks[0].shape[0], self._starts[-1])

    @property
    def is_double(self) -> bool:
        """Whether the blocks have more digits than stored ones, which are float32."""
        return any(block[:0].dtype == torch.float64 for block in self._blocks)

    def panels(self) -> Iterator[Tensor]:
        """Panels of rows, top to bottom."""
        for start in range(0, self.shape[0], PANEL_ROWS):
            rows = slice(start, start + PANEL_ROWS)
            parts = zip(self._blocks, self._weights, strict=True)
            yield torch.cat([block[rows].double() * weights for block, weights in parts], dim=1)

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        """Panels of columns, left to right, and their places."""
        for (start, stop), block, weights in zip(
            pairwise(self._starts), self._blocks, self._weights, strict=True
        ):
            if stop > start:
                yield slice(start, stop), block[:].double() * weights


class PolarProduct:
    """polar(left) diag(m) polar(right), with m given to `update`.

    Args:
        left: Stack of bases, (O, R).
        right_RI: Stacked coordinates, float64, (R, I).
        tolerance: See `polar_root`.
    """

    def __init__(self, left: Stack, right_RI: Tensor, tolerance: float = 1e-7) -> None:
        self._stack, self._right_RI = left, right_RI
        (num_outputs, num_columns), num_inputs = left.shape, right_RI.shape[1]
        self._tall, self._low = num_outputs >= num_columns, num_columns <= num_inputs
        self._middle = inner = min(num_columns, num_inputs)
        bases = left.panels if self._tall else self._turned_bases
        columns = inner if self._tall else num_outputs
        found = None
        # Bases in float64 are not stored ones: their products shall be as exact.
        if is_reduced(num_outputs, num_columns, columns) and self._tall and not left.is_double:
            found = factor_by_reflectors(left.panels, num_outputs, num_columns)
        self.left = found or polar_root(bases, min(left.shape), columns, tolerance)
        self.right = polar_root(self._coordinates, inner, inner, tolerance)

    def _turned_bases(self) -> Iterator[Tensor]:
        return (columns_OK.T for _, columns_OK in self._stack.columns())

    def _coordinates(self) -> Iterator[Tensor]:
        if self._low:
            return (columns.T for columns in self._right_RI.split(PANEL_ROWS, dim=1))
        return row_panels(self._right_RI)

    def update(self, middle_R: Tensor, dtype: torch.dtype) -> Tensor:
        """polar(left) diag(middle) polar(right), shape (O, I), computed in float64.

        The coordinates are given up on the way, so this can be called once.
        """
        right_RI, outer_RI = self._right_RI, None
        del self._right_RI
        num_outputs, num_inputs = self._stack.shape[0], right_RI.shape[1]
        # polar(right) is inner @ outer where R <= I, else inner alone. A root of a nearly singular
        # matrix is a product, and not symmetric: it belongs on the right of the tall matrix.
        root_SS = self.right.root(_identity(self._middle, right_RI))
        if self._low:
            inner_RS, outer_RI = root_SS.T.contiguous(), right_RI
        else:
            inner_RS = right_RI @ root_SS
        del right_RI, root_SS
        inner_RS.mul_(middle_R.unsqueeze(1))
        if self.left.is_factor:
            # What float32 multiplies has to be a polar factor: a root is as large as 1 / s_min.
            if outer_RI is not None:
                inner_RS, outer_RI = inner_RS @ outer_RI, None
            rows: Iterable[Tensor] = row_panels(self.left.root(inner_RS))
        elif self._tall:
            inner_RS = self.left.root(inner_RS)
            if outer_RI is not None and num_outputs > num_inputs:
                inner_RS, outer_RI = inner_RS @ outer_RI, None
            rows = (panel_MR @ inner_RS for panel_MR in self._stack.panels())
        else:
            root_OO = self.left.root(_identity(num_outputs, inner_RS))
            rows = row_panels(root_OO.T @ self._spread(inner_RS))
        result_OI = inner_RS.new_empty(num_outputs, num_inputs, dtype=dtype)
        start = 0
        for panel in rows:
            stop = start + len(panel)
            result_OI[start:stop] = panel if outer_RI is None else panel @ outer_RI
            start = stop
        return result_OI

    def _spread(self, inner_RS: Tensor) -> Tensor:
        """The stack times a matrix, (O, S)."""
        result_OS = inner_RS.new_zeros(self._stack.shape[0], inner_RS.shape[1])
        for place, columns_OK in self._stack.columns():
            result_OS.addmm_(columns_OK, inner_RS[place])
        return result_OS


def _identity(side: int, like: Tensor) -> Tensor:
    return torch.eye(side, dtype=torch.float64, device=like.device)
