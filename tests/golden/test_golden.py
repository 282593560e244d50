"""The authors' released functions, recorded: golden/README.md says what is in the files.

The folder is `$ESM_GOLDEN`, or `shared/golden` beside the repository. Whatever cases it holds run.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from candidate import esd, merge_matrix_robust, merge_owl, merge_roberta, merge_vit
from safetensors import safe_open

REPOSITORY = Path(__file__).parents[2]
GOLDEN = Path(os.environ.get("ESM_GOLDEN", REPOSITORY.parent / "shared" / "golden"))

pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"no golden files: {GOLDEN} is not a folder (set ESM_GOLDEN)"
)


def files(pattern: str) -> list[Path]:
    return sorted(GOLDEN.glob(pattern))


def name(path: Path) -> str:
    return path.stem


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safe_open(path, "np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def under(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }


def per_task(
    tensors: dict[str, np.ndarray], kind: str, meta: dict[str, str]
) -> list[dict[str, np.ndarray]]:
    return [under(tensors, f"task{t}/{kind}/") for t in range(int(meta["T"]))]


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative Frobenius distance."""
    return float(np.linalg.norm(found - wanted) / max(float(np.linalg.norm(wanted)), 1e-300))


def too_far(
    found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], single: dict[str, np.ndarray]
) -> dict[str, tuple[float, float]]:
    """Keys whose error exceeds the tolerance: four times what float32 costs the authors."""
    errors = {key: distance(found[key], wanted[key]) for key in wanted}
    tolerances = {key: max(1e-5, 4 * distance(single[key], wanted[key])) for key in wanted}
    worst = max(errors, key=lambda key: errors[key])
    print(f"worst error {errors[worst]:.2e} (tolerance {tolerances[worst]:.1e}) at {worst}")
    return {
        key: (error, tolerances[key])
        for key, error in errors.items()
        if not error <= tolerances[key]
    }


def has_all_directions(updates: list[dict[str, np.ndarray]], key: str, hooked: list[str]) -> bool:
    """Whether k = O / T does not ask for more directions than a matrix of this shape has."""
    outputs, inputs = updates[0][key].shape[:2] if updates[0][key].ndim == 2 else (1, 1)
    if key.endswith(".proj"):
        outputs, inputs = inputs, outputs
    return key not in hooked or outputs // len(updates) <= inputs


@pytest.mark.parametrize("path", files("esd*.safetensors"), ids=name)
def test_essential_bases_are_those_of_the_authors(path: Path) -> None:
    tensors, _ = load(path)
    cases = sorted(key.removesuffix(".dW") for key in tensors if key.endswith(".dW"))
    assert cases
    for case in cases:
        update_OI, rows_NI = tensors[f"{case}.dW"], tensors[f"{case}.X"]
        wanted = tensors[f"{case}.eigenvalues_f64"]
        for num_experts in (3, 8):
            rank = min(update_OI.shape[0] // num_experts, *update_OI.shape)
            eigenvalues, basis_OK = esd(update_OI, rows_NI, rank)
            np.testing.assert_allclose(eigenvalues, wanted[:rank], rtol=1e-5, err_msg=case)
            projector_OO = tensors.get(f"{case}.T{num_experts}.projector_f64")
            if projector_OO is not None:
                off_OO = basis_OK @ basis_OK.T - projector_OO
                assert np.linalg.norm(off_OO, 2) <= 1e-4, (case, num_experts)


@pytest.mark.parametrize("strict_official", [True, False], ids=["strict", "default"])
@pytest.mark.parametrize("path", files("vit_*.safetensors"), ids=name)
def test_vit_official_gives_the_merged_update_of_the_authors(
    path: Path, strict_official: bool
) -> None:
    tensors, meta = load(path)
    hooked, updates = meta["hooked"].split("|"), per_task(tensors, "dW", meta)
    inputs = per_task(tensors, "X", meta)
    groups = meta["groups"].split("|")
    found = merge_vit(updates, inputs, hooked, groups, strict_official=strict_official)
    wanted = under(tensors, "official_f64/")
    if not strict_official:
        # Where directions are missing the default differs on purpose (methods.md 1.3, rule 2).
        wanted = {
            key: value for key, value in wanted.items() if has_all_directions(updates, key, hooked)
        }
    assert too_far(found, wanted, under(tensors, "official_f32/")) == {}


@pytest.mark.parametrize("strict_official", [True, False], ids=["strict", "default"])
@pytest.mark.parametrize("path", files("roberta_*.safetensors"), ids=name)
def test_roberta_official_gives_the_merged_update_of_the_authors(
    path: Path, strict_official: bool
) -> None:
    tensors, meta = load(path)
    hooked, weights = meta["hooked"].split("|"), per_task(tensors, "W", meta)
    found = merge_roberta(
        under(tensors, "base/"),
        weights,
        per_task(tensors, "X", meta),
        hooked,
        meta["groups"].split("|"),
        strict_official=strict_official,
    )
    wanted = under(tensors, "official_delta_f64/")
    if not strict_official:
        wanted = {
            key: value for key, value in wanted.items() if has_all_directions(weights, key, hooked)
        }
    assert too_far(found, wanted, under(tensors, "official_delta_f32/")) == {}


@pytest.mark.parametrize("path", files("degenerate*.safetensors"), ids=name)
def test_missing_directions_are_treated_as_specified(path: Path) -> None:
    tensors, meta = load(path)
    suffix = "/merged_recommended_f64"
    cases = sorted(key.removesuffix(suffix) for key in tensors if key.endswith(suffix))
    assert cases
    for case in cases:
        tasks = [f"{case}/task{t}" for t in range(int(meta["T"]))]
        found = merge_matrix_robust(
            [tensors[f"{task}/dW"] for task in tasks], [tensors[f"{task}/X"] for task in tasks]
        )
        assert distance(found, tensors[case + suffix]) <= 1e-5, case


OWL_SETTINGS: dict[str, dict[str, object]] = {
    "default": {"m": 0.4, "p": 0.6},
    "datafree": {"inputs": "none", "p": 0.6},
    "p0": {"m": 0.4, "p": 0.0},
    "m.7p.3": {"m": 0.7, "p": 0.3},
}


@pytest.mark.parametrize("path", files("owl*.safetensors"), ids=name)
def test_owl_gives_the_reference_of_its_definition(path: Path) -> None:
    tensors, _ = load(path)
    cases = sorted({key.split("/")[0] for key in tensors})
    assert cases
    for case in cases:
        of_case = under(tensors, f"{case}/")
        count = sum(key.startswith("dW") for key in of_case)
        updates = [of_case[f"dW{t}"] for t in range(count)]
        inputs = [of_case[f"X{t}"] for t in range(count)]
        settings = sorted(key.removesuffix("/M") for key in of_case if key.endswith("/M"))
        assert settings
        for setting in settings:
            options = OWL_SETTINGS[setting]
            found = merge_owl(updates, inputs, options)
            assert distance(found, of_case[f"{setting}/M"]) <= 1e-9, (case, setting)
            fit = merge_owl(updates, inputs, {**options, "p": 0.0})
            assert distance(fit, of_case[f"{setting}/R"]) <= 1e-9, (case, setting)
