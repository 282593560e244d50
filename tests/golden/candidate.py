"""The package's public functions in the shape that the golden cases ask for: numpy in and out.

Letters: N tokens, O output features, I input features, K rank.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from merging import merge

from esm_stream.methods import create
from esm_stream.methods.contract import FactorMethod, Moment
from esm_stream.scaling.layer import layer_scales
from esm_stream.subspace.basis import essential_basis

Arrays = Mapping[str, np.ndarray]


def esd(dW: np.ndarray, X: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    essential = essential_basis(torch.from_numpy(dW), _moment(X), k)
    # Stored eigenvalues are those of a sum over N - 1.
    eigenvalues = essential.eigenvalues[:k] * len(X) / (len(X) - 1)
    return eigenvalues.numpy(), essential.basis_OK.numpy()


def merge_vit(
    dW_by_task: Sequence[Arrays],
    X_by_task: Sequence[Arrays],
    hooked: Sequence[str],
    groups: Sequence[str],
    *,
    strict_official: bool = True,
) -> dict[str, np.ndarray]:
    options = {"profile": "vit-official", "strict_official": strict_official}
    merged = {}
    for key in dW_by_task[0]:
        updates = [task[key] for task in dW_by_task]
        if key not in hooked:
            merged[key] = _merge_other(updates, {})
        elif key.endswith(".proj"):
            transposed = [update.T for update in updates]
            merged[key] = _merge_target(options, transposed, _inputs(X_by_task, key)).T
        else:
            merged[key] = _merge_target(options, updates, _inputs(X_by_task, key))
    return _scale_layers(merged, groups)


def merge_roberta(
    base: Arrays,
    W_by_task: Sequence[Arrays],
    X_by_task: Sequence[Arrays],
    hooked: Sequence[str],
    groups: Sequence[str],
    *,
    strict_official: bool = True,
) -> dict[str, np.ndarray]:
    options = {"profile": "roberta-official", "strict_official": strict_official}
    # The authors' function averages biases too; leaving them out is up to its caller.
    merged = {}
    for key, weight in base.items():
        updates = [task[key].astype(np.float64) - weight for task in W_by_task]
        if key in hooked:
            merged[key] = _merge_target(options, updates, _inputs(X_by_task, key))
        else:
            merged[key] = _merge_other(updates, {"mean_singular_factor": True})
    return _scale_layers(merged, groups)


def merge_matrix_robust(dWs: Sequence[np.ndarray], Xs: Sequence[np.ndarray]) -> np.ndarray:
    return _merge_target({"profile": "vit-official"}, dWs, Xs)


def merge_owl(
    dWs: Sequence[np.ndarray], Xs: Sequence[np.ndarray], options: Mapping[str, object]
) -> np.ndarray:
    updates = [torch.from_numpy(dW) for dW in dWs]
    return merge("owl", updates, options=options, moments=[_moment(X) for X in Xs]).numpy()


def _merge_target(
    options: Mapping[str, object], updates: Sequence[np.ndarray], inputs: Iterable[np.ndarray]
) -> np.ndarray:
    method = create("esm", options, "vision")
    return _run(method, updates, [_moment(X) for X in inputs])


def _merge_other(updates: Sequence[np.ndarray], options: Mapping[str, object]) -> np.ndarray:
    if updates[0].ndim != 2:
        return merge("average", [torch.from_numpy(update) for update in updates]).numpy()
    return _run(create("tsv_m", options, "vision"), updates, [None] * len(updates))


def _run(
    method: FactorMethod, updates: Sequence[np.ndarray], moments: Sequence[Moment | None]
) -> np.ndarray:
    factors = [
        method.factor(torch.from_numpy(update.copy()), moment, len(updates))
        for update, moment in zip(updates, moments, strict=True)
    ]
    return method.combine(factors, updates[0].shape).update_OI.numpy()


def _scale_layers(merged: dict[str, np.ndarray], groups: Sequence[str]) -> dict[str, np.ndarray]:
    scaled = dict(merged)
    taken: set[str] = set()
    for group in groups:
        keys = [key for key in merged if group in key and key not in taken]
        taken.update(keys)
        scales = layer_scales({key: float(np.linalg.norm(merged[key])) for key in keys})
        scaled.update({key: scale * merged[key] for key, scale in scales.items()})
    return scaled


def _inputs(X_by_task: Sequence[Arrays], key: str) -> list[np.ndarray]:
    return [task[key] for task in X_by_task]


def _moment(X: np.ndarray) -> Moment:
    rows_NI = torch.from_numpy(X).double()
    return Moment("input", rows_NI.T @ rows_NI / len(rows_NI), len(rows_NI))
