"""Exact order statistics of |x| over a tensor or a model that is seen in panels.

Two sweeps of histograms: the bits of a positive float32, read as an integer, are in the order of
the numbers. The first sweep counts the high 13 bits, which finds the bin of each wanted rank; the
second counts the low 18 bits inside those bins. Sums of counts are exact, so neither panels nor
their order change the result.

From:  methods that keep the largest or drop the largest (TIES, breadcrumbs, SCE).
Peak:  64 KiB per row in the first sweep, 2 MiB per row and rank in the second.

Letters: T rows counted apart (experts), N elements of a panel, R ranks wanted of each row.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from esm_stream.methods.contract import Sums

_LOW_BITS = 18
_HIGH_BINS = 1 << (31 - _LOW_BITS)
_LOW_BINS = 1 << _LOW_BITS
_LOW_MASK = _LOW_BINS - 1
_RUN = 512


def count_high(values_TN: Tensor, sums: Sums) -> None:
    """Add the high bits of |x| to the histogram sums["high"] of each row, int64, (T, bins)."""
    if "high" not in sums:
        sums["high"] = torch.zeros(len(values_TN), _HIGH_BINS, dtype=torch.int64)
    for row_N, counts_B in zip(values_TN, sums["high"], strict=True):
        counts_B.add_(torch.bincount(_bits(row_N) >> _LOW_BITS, minlength=_HIGH_BINS))


def bins_of(counts_TB: Tensor, ranks: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Where ranks lie: the bin of each, and its rank among the elements of that bin.

    Args:
        counts_TB: What `count_high` counted over everything.
        ranks: For each row, R ranks in ascending order of |x|, from 0.

    Returns:
        bins and ranks within them, both int64 of shape (T, R).
    """
    wanted_TR = torch.tensor([list(r) for r in ranks], dtype=torch.int64)
    return _find(counts_TB.unsqueeze(1).expand(-1, wanted_TR.shape[1], -1), wanted_TR)


def count_low(values_TN: Tensor, bins_TR: Tensor, sums: Sums) -> None:
    """Add the low bits of those |x| in the given bins to sums["low"], int64, (T, R, low bins)."""
    if "low" not in sums:
        # numpy's zeros take no memory where nothing is counted.
        sums["low"] = torch.from_numpy(np.zeros((*bins_TR.shape, _LOW_BINS), dtype=np.int64))
    for row_N, bins, into in zip(values_TN, bins_TR.tolist(), sums["low"].numpy(), strict=True):
        bits_N = _bits(row_N).numpy()
        high_N = bits_N >> _LOW_BITS
        for number, wanted in enumerate(bins):
            # Few elements lie in one bin: their places first, then their bits.
            inside = bits_N[np.flatnonzero(high_N == wanted)] & _LOW_MASK
            np.add.at(into[number], inside, 1)


def values_of(counts_TRB: Tensor, bins_TR: Tensor, ranks_TR: Tensor) -> Tensor:
    """The |x| of each rank, float32, shape (T, R), from what `count_low` counted."""
    # Sums of runs of bins first: a cumulated sum of them all costs more than a small tensor.
    counts_TRRB = counts_TRB.unflatten(2, (-1, _RUN))
    run_TR, inside_TR = _find(counts_TRRB.sum(3), ranks_TR)
    own_TRB = counts_TRRB.gather(2, run_TR[..., None, None].expand(-1, -1, 1, _RUN)).squeeze(2)
    low_TR = run_TR * _RUN + _find(own_TRB, inside_TR)[0]
    bits_TR = (bins_TR << _LOW_BITS) | low_TR
    return bits_TR.to(torch.int32).view(torch.float32)


def _find(counts_TRB: Tensor, ranks_TR: Tensor) -> tuple[Tensor, Tensor]:
    """The bin of each rank, and its rank in it, both (T, R)."""
    cumulated_TRB = counts_TRB.cumsum(2)
    found_TR1 = torch.searchsorted(cumulated_TRB, ranks_TR.unsqueeze(2), right=True)
    found_TR1.clamp_(max=counts_TRB.shape[2] - 1)
    before_TR1 = (cumulated_TRB - counts_TRB).gather(2, found_TR1)
    return found_TR1.squeeze(2), ranks_TR - before_TR1.squeeze(2)


def values_within_bins(counts_TB: Tensor, bins_TR: Tensor, ranks_TR: Tensor) -> Tensor:
    """Approximate |x| of each rank after the first sweep alone, linear within its bin."""
    inside_TR = counts_TB.gather(1, bins_TR).clamp(min=1)
    low_TR = (ranks_TR * _LOW_BINS) // inside_TR
    return (
        ((bins_TR << _LOW_BITS) | low_TR.clamp(max=_LOW_MASK)).to(torch.int32).view(torch.float32)
    )


def keep_at_least(row_N: Tensor, threshold: float) -> Tensor:
    """Set x to 0 in place where |x| < threshold, a float32 number."""
    if row_N.dtype == torch.float32:
        # hardshrink keeps |x| > limit, an order of magnitude faster than a mask.
        limit = float(np.nextafter(np.float32(threshold), np.float32(-1)))
        return row_N if threshold <= 0 else torch.hardshrink(row_N, limit, out=row_N)
    return row_N.mul_(row_N.abs().float() >= threshold)


def drop_above(row_N: Tensor, threshold: float) -> Tensor:
    """Keep x where |x| <= threshold, a float32 number, and 0 elsewhere."""
    if row_N.dtype == torch.float32:
        return row_N - torch.hardshrink(row_N, threshold)
    return row_N * (row_N.abs().float() <= threshold)


def _bits(row_N: Tensor) -> Tensor:
    """Bits of |x| in float32 as int32, in the order of |x|."""
    return row_N.abs().float().view(torch.int32)
