"""Running second moments of what one layer sees or changes, micro-batch by micro-batch.

From:  hooks, on the device of the block.
To:    methods (Factors of one expert), once per matrix and expert, as float64.
Peak:  one float64 matrix of the kept side, and one float32 product of the same size in flight; the
       tokens themselves in float32, as long as that is less.

Letters: N tokens of a micro-batch, O output features, I input features.
"""

import torch
from torch import Tensor

from esm_stream.methods.contract import Moment

# float32 products of at most this many rows, summed in float64: the eigenvalues we cut at span
# 1e10 (methods.md 1.5).
CHUNK_ROWS = 1024


class InputMoment:
    """G = sum of x^T x over tokens, divided by their number; inputs shared by several matrices.

    As long as there are fewer tokens than inputs the tokens are kept, which takes less than G: one
    expert of a mixture sees few. The sum is the same to the bit.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        self._inputs = inputs
        self._device = device
        self._waiting: list[Tensor] = []
        self._sum_II: Tensor | None = None
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        """Add the inputs of one forward, shape (..., I), any float dtype.

        The bits do not depend on the order in which x lies in memory.
        """
        rows_NI = x.reshape(-1, x.shape[-1]).float().contiguous()
        self._tokens += rows_NI.shape[0]
        if self._tokens < self._inputs:
            self._waiting.append(rows_NI.clone())
        else:
            self._sum([*self._waiting, rows_NI])
            self._waiting = []

    def _sum(self, batches: list[Tensor]) -> None:
        if self._sum_II is None:
            shape = self._inputs, self._inputs
            self._sum_II = torch.zeros(shape, dtype=torch.float64, device=self._device)
        for rows_NI in batches:
            for chunk_NI in rows_NI.split(CHUNK_ROWS):
                self._sum_II += chunk_NI.T @ chunk_NI

    def result(self) -> Moment:
        """The mean over tokens; zero if there were none."""
        self._sum(self._waiting)
        self._waiting = []
        assert self._sum_II is not None
        return Moment("input", self._sum_II / max(self._tokens, 1), self._tokens)


class ShiftMoment:
    """S = sum of o^T o over tokens, divided by their number, for the shifts o = x D^T.

    Both products are float64: D may have low rank, and directions it does not touch must stay
    below 1e-10 of the largest eigenvalue (methods.md 1.3).
    """

    def __init__(self, update_OI: Tensor) -> None:
        self._update_IO = update_OI.double().T
        outputs = update_OI.shape[0]
        self._sum_OO = torch.zeros(outputs, outputs, dtype=torch.float64, device=update_OI.device)
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        """Add the inputs of one forward, shape (..., I), any float dtype."""
        rows_NI = x.reshape(-1, x.shape[-1]).contiguous()
        for chunk_NI in rows_NI.split(CHUNK_ROWS):
            shift_NO = chunk_NI.double() @ self._update_IO
            self._sum_OO += shift_NO.T @ shift_NO
        self._tokens += rows_NI.shape[0]

    def result(self) -> Moment:
        """The mean over tokens; zero if there were none."""
        return Moment("shift", self._sum_OO / max(self._tokens, 1), self._tokens)
