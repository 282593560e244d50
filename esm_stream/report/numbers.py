"""report.json: what was merged how, from what, with which figures per matrix.

It holds nothing that differs between two runs of one merge, such as times: those are in the markers
of the work directory.

From:  the plan and the markers of all finished tasks.
To:    card.py, people and programs.
"""

import math
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from esm_stream.checkpoints.checkpoint import Checkpoint
from esm_stream.methods import create
from esm_stream.methods.esm import Esm
from esm_stream.planning.plan import Matrix, Plan, observed_results, update_results
from esm_stream.store.work import WorkDirectory

# Above this, small differences of the inputs decide directions of the result (methods.md 1.3).
CONDITION_LIMIT = 1e6
NAMES_SHOWN = 20
# Storage rounding of bf16 experts moves the merge by tens of percent below this |D| / |W|.
SMALL_UPDATE = 0.01


def build_report(plan: Plan, base: Checkpoint, experts: dict[str, Checkpoint]) -> dict[str, Any]:
    """The report as JSON-like values; every number finite or a string."""
    directory = plan.directory
    merge = plan.manifest["merge"]
    matrices = {m.name: _matrix(plan, directory, m) for m in plan.matrices.values()}
    report = {
        "versions": {"esm-stream": plan.version}
        | {n: version(n) for n in ("torch", "transformers")},
        "method": merge["method"],
        "alpha": merge["alpha"],
        "options": merge["options"],
        "choices": _choices(plan),
        "post": _post(plan, directory),
        "rules": merge["rules"],
        "base": _identity(base),
        "experts": {name: _identity(checkpoint) for name, checkpoint in experts.items()},
        "calibration": _calibration(plan, directory),
        "tensors": {
            name: {
                "treatment": t.treatment,
                "method": t.method.name if t.method else "base",
                "alpha": t.alpha,
                "why": t.why,
            }
            for name, t in plan.tensors.items()
        },
        "matrices": matrices,
        "warnings": [*_few_samples(plan, directory), *_warnings(matrices, experts)],
        "notes": list(plan.notes),
        "bytes_read": _bytes_read(plan, directory),
    }
    finite: dict[str, Any] = _finite(report)
    return finite


def _choices(plan: Plan) -> dict[str, Any]:
    """Every choice of the main method, given or from its profile; empty if it has no profile."""
    method = create(plan.method.name, plan.method.options, plan.method.modality)
    return asdict(method.profile) if isinstance(method, Esm) else {}


def _post(plan: Plan, directory: WorkDirectory) -> dict[str, Any]:
    """Steps after the merge; empty if there are none."""
    post = plan.manifest["merge"]["post"]
    given = {k: v for k, v in post.items() if v is not None and (k, v) != ("alpha", 1.0)}
    if plan.lines_slope is not None:
        given["lines"] = {"a": directory.results("lines")["first"], "b": plan.lines_slope}
    return given


def _identity(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "path": str(checkpoint.root),
        "files": {
            header.path.name: {"size": header.file_size, "header_sha256": header.sha256}
            for header in checkpoint.headers
        },
    }


def _calibration(plan: Plan, directory: WorkDirectory) -> dict[str, Any]:
    if plan.forward is None:
        return {}
    return {
        name: {
            **{k: v for k, v in directory.results(f"inputs/{name}").items() if "bytes" not in k},
            "tokens": _tokens(plan, name),
        }
        for name in plan.experts
    }


def _few_samples(plan: Plan, directory: WorkDirectory) -> list[str]:
    """Experts whose calibration data hold fewer samples than the manifest asks for."""
    wanted = plan.manifest["calibration"]["samples"]
    drawn = {name: len(c["samples"]) for name, c in _calibration(plan, directory).items()}
    return [
        f'expert "{name}": {count} samples of calibration data, {wanted} were asked for'
        for name, count in drawn.items()
        if count < wanted
    ]


def _tokens(plan: Plan, expert: str) -> int:
    """Positions that matrices have seen of an expert's samples; the most of any matrix."""
    matrices = [matrix for matrix in plan.matrices.values() if matrix.moment]
    found = (observed_results(plan, expert, matrix)["tokens"] for matrix in matrices)
    return max(found, default=0)


def _matrix(plan: Plan, directory: WorkDirectory, matrix: Matrix) -> dict[str, Any]:
    merged = update_results(plan, matrix)
    scale = 1.0
    if matrix.scaled:
        scale = directory.results(f"scale/{matrix.group}")["scales"][matrix.name]
    found: dict[str, Any] = {
        "role": matrix.role,
        "shape": [matrix.outputs, matrix.inputs],
        "tensors": list(dict.fromkeys(part.tensor for part in matrix.parts)),
        "method": matrix.method.name,
        "alpha": matrix.alpha,
        "layer_scale": scale,
        **{k: v for k, v in merged.items() if not k.startswith("bytes_read")},
    }
    if matrix.moment:
        per_expert = {name: observed_results(plan, name, matrix) for name in plan.experts}
        found["update_norms"] = {name: v["norm"] for name, v in per_expert.items()}
        found["relative_updates"] = {
            name: v["norm"] / v["base_norm"] if v["base_norm"] else 0.0
            for name, v in per_expert.items()
        }
        found["tokens"] = {name: v["tokens"] for name, v in per_expert.items()}
        found["without_samples"] = [name for name, v in per_expert.items() if v["too_few"]]
    return found


def _warnings(matrices: dict[str, dict[str, Any]], experts: dict[str, Checkpoint]) -> list[str]:
    """What a careful user should know before trusting the result."""
    lines = []
    for name, numbers in matrices.items():
        for side in ("bases", "coordinates"):
            condition, dropped = (
                numbers.get(f"condition_{side}", 1.0),
                numbers.get(f"dropped_{side}", 0),
            )
            if dropped or condition > CONDITION_LIMIT:
                lines.append(
                    f"{name}: stacked {side} have condition {condition:.1e}, {dropped} directions "
                    "dropped"
                )
    lines += _too_few_tokens(matrices, experts)
    lines += _small_updates(matrices, experts)
    return lines


def _too_few_tokens(
    matrices: dict[str, dict[str, Any]], experts: dict[str, Checkpoint]
) -> list[str]:
    """Matrices that saw too little of an expert's samples for a basis made from them."""
    lines = []
    for expert in experts:
        names = [n for n, found in matrices.items() if expert in found.get("without_samples", ())]
        if names:
            shown = ", ".join(f"{n} ({matrices[n]['tokens'][expert]})" for n in names[:NAMES_SHOWN])
            more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
            lines.append(
                f'expert "{expert}": {len(names)} matrices saw no token, or, as experts of a '
                "mixture, fewer than the directions kept; their bases are those of their updates "
                f"alone (tokens in brackets): {shown}{more}"
            )
    return lines


def _small_updates(
    matrices: dict[str, dict[str, Any]], experts: dict[str, Checkpoint]
) -> list[str]:
    """Experts whose updates drown in the rounding of 16-bit storage."""
    lines = []
    for expert, checkpoint in experts.items():
        tensors = checkpoint.tensors
        small = [
            name
            for name, numbers in matrices.items()
            if 0 < numbers.get("relative_updates", {}).get(expert, 0) < SMALL_UPDATE
            and tensors[numbers["tensors"][0]].dtype == "BF16"
            and checkpoint.rank(numbers["tensors"][0]) is None
        ]
        if small:
            lines.append(
                f'expert "{expert}": {len(small)} matrices differ from the base by less than 1 % '
                "and are stored in bfloat16, whose rounding then moves the merge by tens of "
                "percent; merge from weights of higher precision if you have them"
            )
    return lines


def _bytes_read(plan: Plan, directory: WorkDirectory) -> dict[str, int]:
    """Bytes of tensors read from the base and from all experts together."""
    markers = [marker for key in plan.tasks if (marker := directory.read(key)) is not None]
    total = sum(marker.results["bytes_read"] for marker in markers)
    experts = sum(marker.results["bytes_read_experts"] for marker in markers)
    return {"base": total - experts, "experts": experts}


def _finite(value: Any) -> Any:  # noqa: ANN401 - JSON-like values
    """Infinities and NaN as strings, which JSON has no numbers for."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
