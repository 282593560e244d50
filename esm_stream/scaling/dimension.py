"""Scaling between input features: one factor for each column of the stacked coordinates.

Letters: R rows of all experts' coordinates together, I input features.
"""

import torch
from torch import Tensor

from esm_stream.scaling import Variant, relative_powers


def column_factors(coordinates_RI: Tensor, exponent: float, variant: Variant = "both") -> Tensor:
    """Factor of each column, (norm / mean norm)^q (methods.md 1.1, step 6).

    Args:
        coordinates_RI: Stacked coordinates, after eigenvalue weights and task factors.
        exponent: Power q.
        variant: See `relative_powers`.

    Returns:
        Factors, shape (I,), dtype of the input; all 1 where every column is zero.
    """
    norms_I = torch.linalg.vector_norm(coordinates_RI, dim=0)
    factors: Tensor = norms_I.new_tensor(relative_powers(norms_I.tolist(), exponent, variant))
    return factors
