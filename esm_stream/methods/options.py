"""Options of the factor methods and the average, checked where the manifest is read.

A field left out of `EsmOptions` takes the value of the profile. The descriptions go into the JSON
schema and the reference page.
"""

from dataclasses import replace
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from esm_stream.methods.contract import MethodOptions
from esm_stream.methods.profiles import (
    PROFILES,
    AlphaOn,
    Level,
    MatrixKind,
    Modality,
    OtherMatrices,
    Profile,
    ProfileName,
    RankBudget,
    TaskNorm,
)
from esm_stream.scaling import Variant

_OVERRIDES = set(Profile.__dataclass_fields__)


class AverageOptions(MethodOptions):
    """The plain average has nothing to choose."""


class TsvMOptions(MethodOptions):
    """Options of TSV-M."""

    rank: PositiveInt | None = Field(
        None,
        description="Singular triples kept of each expert's update, instead of min(O, I) / T.",
    )
    rank_factor: PositiveFloat = Field(1.0, description="Multiplies the rank min(O, I) / T.")
    rank_tolerance: NonNegativeFloat = Field(
        1e-7,
        lt=1,
        description="Singular values up to this fraction of an expert's largest are dropped.",
    )
    mean_singular_factor: bool = Field(
        False,
        description="Multiply by the mean singular values of both stacks, as ESM-RoBERTa does.",
    )


class EsmOptions(MethodOptions):
    """Options of essential subspace merging; what is left out comes from the profile."""

    profile: ProfileName = Field("journal", description="Published variant to start from.")
    eigenvalue_exponent: NonNegativeFloat | None = Field(
        None, description="Power p of the eigenvalue weights; 0 switches them off."
    )
    levels: tuple[Level, ...] | None = Field(
        None, description="Levels of polarised scaling that are on; an empty list means none."
    )
    exponent: NonNegativeFloat | None = Field(
        None, description="Power q of every level of polarised scaling."
    )
    task_exponent: NonNegativeFloat | None = Field(
        None, description="Power q of the task level, instead of that of every level."
    )
    dimension_exponent: NonNegativeFloat | None = Field(
        None, description="Power q of the dimension level, instead of that of every level."
    )
    layer_exponent: NonNegativeFloat | None = Field(
        None, description="Power q of the layer level, instead of that of every level."
    )
    variant: Variant | None = Field(
        None,
        description='Factors of the levels as they are ("both"), their inverses ("reverse"), those '
        'below 1 ("noise") or those above 1 ("signal").',
    )
    task_norm: TaskNorm | None = Field(
        None, description="Norm of the task level: of all coordinates, or of those kept."
    )
    factor: PositiveFloat | None = Field(
        None, description="Constant c in front of the merged update."
    )
    targets: tuple[MatrixKind, ...] | Literal["all"] | None = Field(
        None, description='Kinds of matrices that ESM merges, or "all" linears of the blocks.'
    )
    fuse_qkv: bool | None = Field(
        None, description="Treat separately stored q, k, v of one block as one matrix."
    )
    other_matrices: OtherMatrices | None = Field(
        None, description="Method of the matrices that are not targets."
    )
    other_mean_singular_factor: bool | None = Field(
        None, description='Multiply matrices merged by "tsv" by both mean singular values.'
    )
    alpha_on: AlphaOn | None = Field(
        None, description="What alpha multiplies: the targets, or everything merged."
    )
    copy_from_base: tuple[str, ...] | None = Field(
        None, alias="copy", description="Patterns of tensor names that stay as in the base model."
    )
    rank: PositiveInt | None = Field(
        None, description="Columns kept of each expert's basis, instead of O / T."
    )
    rank_factor: PositiveFloat = Field(1.0, description="Multiplies the rank O / T.")
    rank_budget: RankBudget = Field(
        "output",
        description='Side that the experts share: O / T columns each ("output"), or min(O, I) / T.',
    )
    rank_tolerance: NonNegativeFloat = Field(
        1e-10, lt=1, description="Eigenvalues up to this fraction of the largest count as zero."
    )
    drop_tolerance: NonNegativeFloat = Field(
        1e-7,
        lt=1,
        description="Directions of the stacked factors up to this fraction of the largest "
        "singular value are dropped.",
    )
    strict_official: bool = Field(
        False,
        description="Drop no direction, as the authors' code; arbitrary where experts lack rank.",
    )
    decomposition: Literal["esd", "svd"] = Field(
        "esd",
        description="Basis from activation shifts (esd), or from the update alone (svd).",
    )

    def resolve(self, modality: Modality) -> Profile:
        """The profile of this modality with every field given here in its place."""
        overrides = self.model_dump(include=_OVERRIDES, exclude_none=True)
        return replace(PROFILES[self.profile][modality], **overrides)
