"""Joint directions of updates that come as factors, without the updates themselves.

From:  adapters, D_t = L_t R_t.
To:    knots.py, core_space.py.
Peak:  the factors of all experts together.

Letters: O output features, I input features, R rank of one expert, S ranks of all together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Pairs = Sequence[tuple[Tensor, Tensor]]


def joint_columns(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Left singular vectors (O, S) and singular values of [D_1 | ... | D_T].

    Args:
        pairs: Factors (O, R) and (R, I) of every update, float64.
    """
    # With R_t^T = Q K, D_t D_t^T = (L_t K^T) (L_t K^T)^T.
    halves = [left @ torch.linalg.qr(right.T, mode="r").R.T for left, right in pairs]
    vectors_OS, values_S, _ = torch.linalg.svd(torch.cat(halves, dim=1), full_matrices=False)
    return vectors_OS, values_S


def joint_rows(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Right singular vectors (I, S) and singular values of the updates below each other."""
    return joint_columns([(right.T, left.T) for left, right in pairs])
