"""Running second moments of what one layer sees or changes, micro-batch by micro-batch.

From:  hooks, on the device of the block.
To:    methods (Factors of one expert), once per matrix and expert, as float64.
Peak:  one float64 matrix of the kept side, and CHUNK_ROWS rows of inputs (and of shifts); before it
       is begun the tokens themselves in float32, as long as that is less.

Letters: N tokens of a micro-batch, O output features, I input features.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from esm_stream.methods.contract import Moment
from esm_stream.subspace.gram import add_gram, fill_upper

# Rows are multiplied this many at a time, whatever the batches they came in: where a batch ends
# moves no bit of a sum.
CHUNK_ROWS = 1024


class InputMoment:
    """G = sum of x^T x over tokens, divided by their number; inputs shared by several matrices.

    Products and sum are float64: inputs may have directions without energy (a normalised layer has
    one), which must not show at the 1e-7 of the largest eigenvalue that float32 leaves there. As
    long as there are fewer tokens than inputs the tokens are kept, which takes less than G: one
    expert of a mixture sees few. The sum is the same to the bit. Where moments are added up over
    experts and a ridge is added to them, float32 will do.
    """

    def __init__(
        self, inputs: int, device: torch.device, dtype: torch.dtype = torch.float64
    ) -> None:
        self._dtype = dtype
        self._rows = _Rows(inputs, dtype, device)
        self._waiting: list[Tensor] = []
        self._sum_II: Tensor | None = None
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        """Add the inputs of one forward, shape (..., I), any float dtype.

        The bits depend neither on where batches end nor on how x lies in memory.
        """
        rows_NI = x.reshape(-1, x.shape[-1])
        self._tokens += len(rows_NI)
        if self._tokens < self._rows.columns:
            self._waiting.append(rows_NI.to(torch.float32, copy=True))
        else:
            self._sum_up([*self._waiting, rows_NI])
            self._waiting = []

    def _sum_up(self, batches: list[Tensor]) -> Tensor:
        """Add rows to the sum, which begins with the first."""
        if self._sum_II is None:
            columns, device = self._rows.columns, self._rows.device
            self._sum_II = torch.zeros(columns, columns, dtype=self._dtype, device=device)
        for rows_NI in batches:
            for chunk_NI in self._rows.take(rows_NI):
                add_gram(self._sum_II, chunk_NI)
        return self._sum_II

    def result(self) -> Moment:
        """The mean over tokens, zero if there were none; nothing can be added afterwards."""
        sum_II, self._waiting = self._sum_up(self._waiting), []
        for chunk_NI in self._rows.rest():
            add_gram(sum_II, chunk_NI)
            sum_II /= self._tokens
        return Moment("input", fill_upper(sum_II), self._tokens)


class ShiftMoment:
    """S = sum of o^T o over tokens, divided by their number, for the shifts o = x D^T.

    Shifts are float32, their products and the sum float64. D may have low rank, and directions it
    does not touch must stay below 1e-10 of the largest eigenvalue (methods.md 1.3): rounding of
    the shifts has its square there, 1e-14; float32 products would leave 1e-8.
    """

    def __init__(self, update_OI: Tensor) -> None:
        outputs, inputs = update_OI.shape
        self._update_IO = update_OI.float().T
        self._rows = _Rows(inputs, torch.float32, update_OI.device)
        self._sum_OO = torch.zeros(outputs, outputs, dtype=torch.float64, device=update_OI.device)
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        """Add the inputs of one forward, shape (..., I), any float dtype."""
        rows_NI = x.reshape(-1, x.shape[-1])
        self._tokens += len(rows_NI)
        for chunk_NI in self._rows.take(rows_NI):
            self._add(chunk_NI)

    def _add(self, chunk_NI: Tensor) -> None:
        shift_NO = (chunk_NI @ self._update_IO).double()
        add_gram(self._sum_OO, shift_NO)

    def result(self) -> Moment:
        """The mean over tokens, zero if there were none; nothing can be added afterwards."""
        for chunk_NI in self._rows.rest():
            self._add(chunk_NI)
            self._sum_OO /= self._tokens
        return Moment("shift", fill_upper(self._sum_OO), self._tokens)


class _Rows:
    """Rows in the order they come, given back in chunks of CHUNK_ROWS."""

    def __init__(self, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self.columns, self.device, self._dtype = columns, device, dtype
        self._buffer_NI: Tensor | None = None
        self._filled = 0

    def take(self, rows_NI: Tensor) -> Iterator[Tensor]:
        """Keep rows; whole chunks, each valid until the next one is asked for."""
        if self._buffer_NI is None:
            shape = CHUNK_ROWS, self.columns
            self._buffer_NI = torch.empty(shape, dtype=self._dtype, device=self.device)
        while len(rows_NI):
            room_NI = self._buffer_NI[self._filled :][: len(rows_NI)]
            room_NI.copy_(rows_NI[: len(room_NI)])
            rows_NI = rows_NI[len(room_NI) :]
            self._filled += len(room_NI)
            if self._filled == CHUNK_ROWS:
                yield self._buffer_NI
                self._filled = 0

    def rest(self) -> Iterator[Tensor]:
        """The last chunk, which may be shorter or empty, once if there were rows at all."""
        if self._buffer_NI is not None:
            yield self._buffer_NI[: self._filled]
        self._buffer_NI = None
