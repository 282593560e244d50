"""Core space: merge in the joint column and row space of all updates (methods.md 3.1).

From:  the engine, the experts' updates of one matrix, twice; or their factors.
To:    the engine, the merged update.
Peak:  float64: eigenproblems of both sides (none with factors); the cores of all experts, T R^2.

Letters: T experts, O output features, I input features, R directions of all updates together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from esm_stream.methods.contract import About, Merged, MethodOptions, SpectralMethod, Updates, zeros
from esm_stream.methods.iso_c import IsoC, IsoCOptions
from esm_stream.methods.iso_cts import IsoCts, IsoCtsOptions
from esm_stream.methods.knots import Knots, KnotsOptions
from esm_stream.methods.low_rank import joint_columns, joint_rows
from esm_stream.methods.options import TsvMOptions
from esm_stream.methods.tsv_m import TsvM


class CoreSpaceOptions(MethodOptions):
    """Options of core space."""

    inner: Literal["iso_c", "iso_cts", "tsv_m", "knots"] = Field(
        "iso_c", description="Method that merges the cores, with its default options."
    )
    tolerance: PositiveFloat = Field(
        1e-6,
        lt=1,
        description="Directions up to this fraction of the strongest of all updates are dropped.",
    )


class CoreSpace(SpectralMethod):
    """With U and V the joint left and right directions of all D_t: cores M_t = U^T D_t V.

    D = U M V^T, with M the merge of the M_t by `inner`. Nothing is lost, because every D_t lies in
    both spaces. For adapters of rank r the cores have at most T r rows and columns.
    """

    name: ClassVar[str] = "core_space"
    Options = CoreSpaceOptions
    about: ClassVar[About] = About(
        summary="An SVD method in the small space that all updates lie in.",
        source="Panariello et al. 2025, arXiv 2509.17786",
        data="none",
        passes="2",
        memory="squares of both sides and cores of all experts",
        when="experts tuned by LoRA",
    )

    def merge(self, updates: Updates, shape: tuple[int, int]) -> Merged:
        """Joint spaces, cores, the inner method, and back."""
        pairs = updates.low_rank()
        if pairs is None:
            left_OR, right_IR = self._spaces(updates, shape)
        else:
            left_OR = self._kept(*joint_columns(pairs))
            right_IR = self._kept(*joint_rows(pairs))
        size = (left_OR.shape[1], right_IR.shape[1])
        if not min(size):
            return Merged(zeros(updates, *shape), {"ranks": size})
        if pairs is None:
            cores = [left_OR.T @ update_OI.double() @ right_IR for update_OI in updates]
        else:
            cores = [(left_OR.T @ left) @ (right @ right_IR) for left, right in pairs]
        merged = self._inner(_Cores(cores), size)
        return Merged(left_OR @ merged.double() @ right_IR.T, {"ranks": size})

    def _spaces(self, updates: Updates, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Joint left and right directions, from the sums of D_t D_t^T and D_t^T D_t."""
        left_OO = zeros(updates, shape[0], shape[0])
        right_II = zeros(updates, shape[1], shape[1])
        for update_OI in updates:
            wide_OI = update_OI.double()
            left_OO.addmm_(wide_OI, wide_OI.T)
            right_II.addmm_(wide_OI.T, wide_OI)
        return self._directions(left_OO), self._directions(right_II)

    def _directions(self, gram: Tensor) -> Tensor:
        """Eigenvectors of all directions that are not dropped, strongest first."""
        values, vectors = torch.linalg.eigh(gram)
        return self._kept(vectors.flip(1), values.flip(0).clamp(min=0).sqrt())

    def _kept(self, vectors_NR: Tensor, values_R: Tensor) -> Tensor:
        """Directions that are not dropped, of those given strongest first."""
        strongest = float(values_R[0]) if len(values_R) else 0.0
        return vectors_NR[:, values_R > self.options.tolerance * max(strongest, 1e-150)]

    def _inner(self, cores: "_Cores", size: tuple[int, int]) -> Tensor:
        if self.options.inner == "tsv_m":
            method = TsvM(TsvMOptions())
            factors = [method.factor(core, None, len(cores)) for core in cores]
            return method.combine(factors, size).update_OI
        spectral: dict[str, SpectralMethod] = {
            "iso_c": IsoC(IsoCOptions()),
            "iso_cts": IsoCts(IsoCtsOptions()),
            "knots": Knots(KnotsOptions()),
        }
        return spectral[self.options.inner].merge(cores, size).update_OI

    def peak_numbers(self, shape: tuple[int, int], num_experts: int) -> int:
        """Both eigenproblems, then cores of full rank, which is the most there can be."""
        cores = (num_experts + 9) * shape[0] * shape[1]
        return cores + 6 * (shape[0] ** 2 + shape[1] ** 2)

    def low_rank_numbers(self, shape: tuple[int, int], num_experts: int, rank: int) -> int:
        """Joint spaces, cores, and the merged update."""
        return 8 * rank * sum(shape) + (num_experts + 9) * rank**2 + 2 * shape[0] * shape[1]

    def decompositions(self, num_experts: int) -> int:
        """Two eigenproblems and the inner method."""
        return 3 + num_experts


@dataclass(frozen=True)
class _Cores:
    """Cores of all experts, as the updates that an inner method reads."""

    cores: Sequence[Tensor]

    @property
    def device(self) -> torch.device:
        """Where the cores are."""
        return self.cores[0].device

    def __iter__(self) -> Iterator[Tensor]:
        for core in self.cores:
            yield core.clone()

    def __len__(self) -> int:
        return len(self.cores)

    def low_rank(self) -> None:
        """Cores are small as they are."""
