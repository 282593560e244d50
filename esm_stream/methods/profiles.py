"""The published variants of ESM, as data (methods.md 1.2). Imports no torch.

A profile says which matrices ESM merges, with which weights and scalings, and what happens to
the rest. Options of the manifest override single fields (options.py).
"""

from dataclasses import dataclass
from typing import Literal

from esm_stream.scaling import Variant

Modality = Literal["vision", "language"]
ProfileName = Literal["journal", "cvpr-paper", "vit-official", "roberta-official"]
Level = Literal["task", "dimension", "layer"]
TaskNorm = Literal["full", "truncated"]
RankBudget = Literal["output", "min_side"]
MatrixKind = Literal["q", "k", "v", "qkv", "o", "gate", "up", "down"]
Targets = tuple[MatrixKind, ...] | Literal["all"]
OtherMatrices = Literal["average", "tsv"]
AlphaOn = Literal["targets", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One complete set of choices; the defaults are the journal's.

    Attributes:
        eigenvalue_exponent: Power p of the eigenvalue weights; 0 switches them off.
        levels: Levels of polarised scaling that are on.
        exponent: Power q of every level that has none of its own.
        task_exponent, dimension_exponent, layer_exponent: Power q of one level.
        variant: What the levels do with their factors (scaling/).
        task_norm: Norm behind the task level, of all coordinates or of the K kept.
        factor: Constant c in front of the merged update.
        targets: Kinds of matrices that ESM merges; "all" means every linear inside a block.
        fuse_qkv: Treat separately stored q, k, v of one block as one matrix.
        other_matrices: Method of the matrices that are not targets.
        other_mean_singular_factor: Multiply those, merged by "tsv", by both mean singular values.
        alpha_on: What the global coefficient multiplies.
        copy_from_base: Patterns of tensor names that are not merged at all.
    """

    eigenvalue_exponent: float = 0.15
    levels: tuple[Level, ...] = ("task", "dimension", "layer")
    exponent: float = 2.0
    task_exponent: float | None = None
    dimension_exponent: float | None = None
    layer_exponent: float | None = None
    variant: Variant = "both"
    task_norm: TaskNorm = "full"
    factor: float = 1.0
    targets: Targets
    fuse_qkv: bool = False
    other_matrices: OtherMatrices = "average"
    other_mean_singular_factor: bool = False
    alpha_on: AlphaOn = "targets"
    copy_from_base: tuple[str, ...] = ()

    def exponent_of(self, level: Level) -> float:
        """Power q of a level."""
        own = {
            "task": self.task_exponent,
            "dimension": self.dimension_exponent,
            "layer": self.layer_exponent,
        }[level]
        return self.exponent if own is None else own


_JOURNAL_VISION = Profile(targets=("q", "k", "v", "qkv", "up"))
_JOURNAL_LANGUAGE = Profile(targets="all", levels=())
_CVPR_PAPER = Profile(
    eigenvalue_exponent=0.0,
    task_norm="truncated",
    targets=("qkv", "o", "up", "down"),
    fuse_qkv=True,
)
_VIT_OFFICIAL = Profile(
    factor=2.0,
    targets=("qkv", "up", "down"),
    fuse_qkv=True,
    other_matrices="tsv",
)
_ROBERTA_OFFICIAL = Profile(
    levels=("layer",),
    targets=("q", "k", "v", "o", "up", "down"),
    other_matrices="tsv",
    other_mean_singular_factor=True,
    alpha_on="all",
    copy_from_base=("re:.*bias.*", "re:.*classifier.*"),
)

PROFILES: dict[ProfileName, dict[Modality, Profile]] = {
    "journal": {"vision": _JOURNAL_VISION, "language": _JOURNAL_LANGUAGE},
    "cvpr-paper": {"vision": _CVPR_PAPER, "language": _CVPR_PAPER},
    "vit-official": {"vision": _VIT_OFFICIAL, "language": _VIT_OFFICIAL},
    "roberta-official": {"vision": _ROBERTA_OFFICIAL, "language": _ROBERTA_OFFICIAL},
}


def default_alpha(modality: Modality, num_experts: int, factor: float) -> float:
    """Global coefficient without validation data (methods.md 1.2), with alpha * c held constant.

    Vision with c = 2: 0.75 up to 8 experts, 0.65 from 14, linear between; language with c = 1: 2.
    """
    if modality == "language":
        return 2.0 / factor
    towards_many = min(max((num_experts - 8) / (14 - 8), 0.0), 1.0)
    return (0.75 - 0.10 * towards_many) * 2.0 / factor
