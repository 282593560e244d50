"""Scaling between input features: one factor for each column of the stacked coordinates.

Letters: R rows of all experts' coordinates together, I input features.
"""

import torch
from torch import Tensor


def column_factors(coordinates_RI: Tensor, exponent: float) -> Tensor:
    """Factor of each column, (norm / mean norm)^q (methods.md 1.1, step 6).

    Args:
        coordinates_RI: Stacked coordinates, after eigenvalue weights and task factors.
        exponent: Power q.

    Returns:
        Factors, shape (I,), dtype of the input; all 1 where every column is zero.
    """
    norms_I = torch.linalg.vector_norm(coordinates_RI, dim=0)
    mean = norms_I.mean()
    return (norms_I / mean) ** exponent if bool(mean > 0) else torch.ones_like(norms_I)
