"""The table of published variants, its overrides, and what a mistyped manifest is told."""

import json
import subprocess
import sys

import pytest
import torch

from esm_stream.errors import ManifestError
from esm_stream.methods import available, create, options_model
from esm_stream.methods.options import EsmOptions
from esm_stream.methods.profiles import PROFILES, Modality, ProfileName, default_alpha


@pytest.mark.parametrize(
    ("name", "modality", "exponent", "levels", "task_norm", "factor", "other", "alpha_on"),
    [
        ("journal", "vision", 0.15, "task dimension layer", "full", 1, "average", "targets"),
        ("journal", "language", 0.15, "", "full", 1, "average", "targets"),
        ("cvpr-paper", "vision", 0, "task dimension layer", "truncated", 1, "average", "targets"),
        ("vit-official", "vision", 0.15, "task dimension layer", "full", 2, "tsv", "targets"),
        ("roberta-official", "language", 0.15, "layer", "full", 1, "tsv", "all"),
    ],
)
def test_profiles_hold_the_published_values(
    *,
    name: ProfileName,
    modality: Modality,
    exponent: float,
    levels: str,
    task_norm: str,
    factor: float,
    other: str,
    alpha_on: str,
) -> None:
    profile = PROFILES[name][modality]
    assert profile.eigenvalue_exponent == exponent
    assert " ".join(profile.levels) == levels
    assert (profile.exponent, profile.task_norm, profile.factor) == (2.0, task_norm, factor)
    assert (profile.other_matrices, profile.alpha_on) == (other, alpha_on)


@pytest.mark.parametrize(
    ("name", "modality", "targets", "fuse_qkv"),
    [
        ("journal", "vision", ("q", "k", "v", "qkv", "up"), False),
        ("journal", "language", "all", False),
        ("cvpr-paper", "vision", ("qkv", "o", "up", "down"), True),
        ("vit-official", "vision", ("qkv", "up", "down"), True),
        ("roberta-official", "language", ("q", "k", "v", "o", "up", "down"), False),
    ],
)
def test_profiles_name_their_targets(
    name: ProfileName, modality: Modality, targets: object, fuse_qkv: bool
) -> None:
    profile = PROFILES[name][modality]
    assert (profile.targets, profile.fuse_qkv) == (targets, fuse_qkv)


def test_only_roberta_copies_tensors_and_multiplies_others_by_mean_singular_values() -> None:
    for name, variants in PROFILES.items():
        for profile in variants.values():
            assert profile.other_mean_singular_factor == (name == "roberta-official")
            assert bool(profile.copy_from_base) == (name == "roberta-official")
    copied = PROFILES["roberta-official"]["language"].copy_from_base
    assert copied == ("re:.*bias.*", "re:.*classifier.*")


def test_without_options_the_journal_profile_holds() -> None:
    assert EsmOptions().resolve("vision") is not None
    assert EsmOptions().resolve("vision") == PROFILES["journal"]["vision"]
    assert EsmOptions().resolve("language") == PROFILES["journal"]["language"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eigenvalue_exponent", 0.0),
        ("levels", ()),
        ("exponent", 1.5),
        ("task_exponent", 1.5),
        ("dimension_exponent", 0.0),
        ("layer_exponent", 3.0),
        ("task_norm", "truncated"),
        ("factor", 3.0),
        ("targets", ("o",)),
        ("targets", "all"),
        ("fuse_qkv", True),
        ("other_matrices", "tsv"),
        ("other_mean_singular_factor", True),
        ("alpha_on", "all"),
        ("copy", ("re:.*norm.*",)),
    ],
)
def test_every_field_of_a_profile_can_be_overridden(key: str, value: object) -> None:
    profile = EsmOptions.model_validate({key: value}).resolve("vision")
    changed = {
        field
        for field in profile.__dataclass_fields__
        if getattr(profile, field) != getattr(PROFILES["journal"]["vision"], field)
    }
    field = "copy_from_base" if key == "copy" else key
    assert changed == {field}
    assert getattr(profile, field) == value


def test_a_level_has_an_exponent_of_its_own_or_that_of_all() -> None:
    options = EsmOptions(exponent=1.5, task_exponent=0.0)
    profile = options.resolve("vision")
    assert [profile.exponent_of(level) for level in ("task", "dimension", "layer")] == [0, 1.5, 1.5]


def test_a_task_exponent_of_0_is_no_task_level() -> None:
    random = torch.Generator().manual_seed(0)
    shape = (6, 5)
    updates = [(1 + t) * torch.randn(shape, generator=random) for t in range(3)]
    with_level, without = (
        create("esm", {"decomposition": "svd", **options}, "vision")
        for options in ({"task_exponent": 0.0}, {"levels": ["dimension"]})
    )
    merged = [
        m.combine([m.factor(u, None, 3) for u in updates], shape).update_OI
        for m in (with_level, without)
    ]
    torch.testing.assert_close(*merged)


def test_every_option_is_described() -> None:
    for name in available():
        for key, field in options_model(name).model_fields.items():
            assert field.description, (name, key)
    assert "copy" in EsmOptions.model_json_schema()["properties"]


@pytest.mark.parametrize(
    ("modality", "num_experts", "factor", "alpha"),
    [
        ("vision", 2, 2.0, 0.75),
        ("vision", 8, 2.0, 0.75),
        ("vision", 11, 2.0, 0.70),
        ("vision", 14, 2.0, 0.65),
        ("vision", 20, 2.0, 0.65),
        ("vision", 8, 1.0, 1.5),
        ("language", 3, 1.0, 2.0),
        ("language", 20, 1.0, 2.0),
        ("language", 3, 2.0, 1.0),
    ],
)
def test_default_alpha(modality: Modality, num_experts: int, factor: float, alpha: float) -> None:
    assert default_alpha(modality, num_experts, factor) == pytest.approx(alpha)


def test_the_registry_makes_what_was_asked_for() -> None:
    assert {"average", "esm", "tsv_m"} <= set(available())
    assert [create(name, {}, "vision").name for name in available()] == list(available())
    assert create("esm", {}, "language").uses_moments
    assert not create("esm", {"decomposition": "svd"}, "language").uses_moments
    assert create("esm", {"profile": "vit-official"}, "vision").profile.factor == 2.0


@pytest.mark.parametrize(
    ("name", "key", "value", "steps"),
    [
        ("esm", "rank", 3, {"factor"}),
        ("esm", "rank_factor", 2.0, {"factor"}),
        ("esm", "rank_tolerance", 1e-6, {"factor"}),
        ("esm", "decomposition", "svd", {"factor"}),
        ("esm", "strict_official", True, {"factor", "combine"}),
        ("esm", "eigenvalue_exponent", 0.3, {"combine"}),
        ("esm", "levels", ["dimension", "layer"], {"combine"}),
        ("esm", "levels", ["dimension", "task"], set()),
        ("esm", "exponent", 1.0, {"combine"}),
        ("esm", "dimension_exponent", 1.0, {"combine"}),
        ("esm", "dimension_exponent", 2.0, set()),
        ("esm", "layer_exponent", 1.0, set()),
        ("esm", "task_norm", "truncated", {"combine"}),
        ("esm", "factor", 2.0, {"combine"}),
        ("esm", "drop_tolerance", 1e-9, {"combine"}),
        ("esm", "targets", "all", set()),
        ("esm", "other_matrices", "tsv", set()),
        ("tsv_m", "rank", 3, {"factor"}),
        ("tsv_m", "rank_factor", 2.0, {"factor"}),
        ("tsv_m", "rank_tolerance", 1e-6, {"factor"}),
        ("tsv_m", "mean_singular_factor", True, {"combine"}),
    ],
)
def test_an_option_is_part_of_the_identity_of_the_steps_whose_numbers_it_decides(
    name: str, key: str, value: object, steps: set[str]
) -> None:
    plain, changed = create(name, {}, "vision"), create(name, {key: value}, "vision")
    differing = {s for s in ("factor", "combine") if plain.identity(s) != changed.identity(s)}
    assert differing == steps
    assert json.loads(json.dumps(plain.identity("combine"))) == plain.identity("combine")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("esn", {}, r"unknown method 'esn' \(did you mean 'esm'\?\)"),
        ("zzz", {}, "unknown method 'zzz'; known: average, "),
        ("esm", {"rank_facto": 1}, r"'esm': unknown option 'rank_facto' \(did you mean 'rank_f"),
        ("esm", {"copi": []}, r"unknown option 'copi' \(did you mean 'copy'\?\)"),
        ("esm", {"rank": 0}, "'esm': rank: input should be greater than 0, got 0"),
        ("esm", {"profile": "jurnal"}, "profile: input should be 'journal', .*got 'jurnal'"),
        ("esm", {"levels": ["tasks"]}, r"levels\.0: input should be 'task'"),
        ("tsv_m", {"profile": "journal"}, "'tsv_m': unknown option 'profile'; known: mean_"),
        ("average", {"x": 1}, "'average': unknown option 'x'"),
        ("esm", {"factor": float("nan")}, "factor: input should be a finite number"),
    ],
)
def test_a_mistake_is_answered_with_place_and_rule(
    name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ManifestError, match=message):
        create(name, options, "vision")


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(ManifestError) as caught:
        create("esm", {"rank": -1, "factr": 2, "drop_tolerance": 1.0}, "vision")
    assert len(str(caught.value).splitlines()) == 3


def test_manifests_are_read_without_torch() -> None:
    program = (
        "import sys, esm_stream.manifest, esm_stream.scaling.layer;sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
