"""Householder reflectors of a panel, many at a time: what band.py and bidiagonal.py reduce with.

From:  panels of a matrix, float32 or float64.
To:    the same, I - V T V^T with V by rows: wide products are faster than tall ones.
Peak:  three panels.

Letters: M rows and P columns of the panel.
"""

import torch
from torch import Tensor


def reflect(panel_MP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reflectors that make a panel upper triangular: (I - V T V^T)^T panel = triangle.

    Returns:
        The triangle (C, P), V^T (C, M) and T (C, C), with C = min(M, P).
    """
    packed_MP, scales_C = torch.geqrf(panel_MP)
    count = len(scales_C)
    triangle_CP = packed_MP[:count].triu()
    reflectors_MC = packed_MP[:, :count].tril_(-1)
    reflectors_MC.diagonal().fill_(1.0)
    rows_CM = reflectors_MC.T.contiguous()
    return triangle_CP, rows_CM, _compact(rows_CM, scales_C)


def turn(columns_MQ: Tensor, rows_CM: Tensor, compact_CC: Tensor, *, back: bool) -> None:
    """(I - V T V^T)^T Y in place, or (I - V T V^T) Y to go `back`."""
    turned_CC = compact_CC if back else compact_CC.T
    columns_MQ.addmm_(rows_CM.T, turned_CC @ (rows_CM @ columns_MQ), alpha=-1)


def _compact(rows_CM: Tensor, scales_C: Tensor) -> Tensor:
    """T of the product of reflectors I - V T V^T: its inverse is the upper half of V^T V.

    A reflector of scale 0 does nothing, and gets an empty column of V.
    """
    rows_CM *= (scales_C != 0).unsqueeze(1)
    inverse_CC = (rows_CM @ rows_CM.T).triu_(1)
    inverse_CC.diagonal().copy_(torch.where(scales_C != 0, 1 / scales_C, 1.0))
    identity_CC = torch.eye(len(scales_C), dtype=scales_C.dtype, device=scales_C.device)
    result: Tensor = torch.linalg.solve_triangular(inverse_CC, identity_CC, upper=True)
    return result
