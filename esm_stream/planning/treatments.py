"""Which tensor is merged how: rules first, then the method's targets, then the rest.

From:  opening.py.
To:    tasks.py: `TensorPlan` for every tensor, `Matrix` for what is merged by factors.

In this order: [base] skip and integer tensors are copied; the first matching rule decides; tensors
that the profile says not to merge are copied; the method's own matrices go to it; other matrices to
`other_matrices`; everything else is averaged.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from esm_stream.checkpoints.header import TensorInfo
from esm_stream.checkpoints.names import (
    block_of,
    compile_pattern,
    fused_name,
    kind_of,
    matcher,
    role_of,
)
from esm_stream.errors import ManifestError
from esm_stream.manifest import Rule
from esm_stream.methods import create, factor_method, is_factor_method
from esm_stream.methods.contract import ElementwiseMethod, FactorMethod
from esm_stream.methods.esm import Esm
from esm_stream.methods.profiles import Profile, default_alpha
from esm_stream.planning.opening import Opened
from esm_stream.planning.plan import Matrix, MethodChoice, Part, TensorPlan

_FUSED_KINDS = ("q", "k", "v")
# A gated MLP has two up-projections: profiles that name "up" mean both.
IMPLIED_KINDS = {"gate": "up", "gate_up": "up"}


@dataclass(frozen=True, slots=True)
class Seen:
    """A stored matrix whose input hooks observe: the module and the leader of its input."""

    module: str
    leader: str
    transposed: bool
    shared: bool


@dataclass(frozen=True, slots=True)
class _Choice:
    """How one tensor is to be merged, before matrices are formed."""

    method: MethodChoice
    alpha: float
    why: str
    fuse: bool = False


class Treatments:
    """All tensors and matrices of one merge."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self.observed = observed_tensors(opened)
        self.tensors: dict[str, TensorPlan] = {}
        self.matrices: dict[str, Matrix] = {}
        self._num_experts = len(opened.experts)
        merge = opened.manifest.merge
        self._main = MethodChoice(merge.method, merge.options, opened.modality)
        method = self._method(self._main)
        self.profile: Profile | None = method.profile if isinstance(method, Esm) else None
        self.alpha = self._alpha(merge.alpha)
        self._copied = matcher(self.profile.copy_from_base if self.profile else ())
        self._decide()

    def _method(self, choice: MethodChoice) -> ElementwiseMethod | FactorMethod:
        return create(choice.name, choice.options, choice.modality)

    def _alpha(self, alpha: float | str) -> float:
        if not isinstance(alpha, str):
            return float(alpha)
        if self.profile is None:
            return 1.0
        return default_alpha(self.opened.modality, self._num_experts, self.profile.factor)

    def _decide(self) -> None:
        """Fill `tensors` and `matrices`."""
        skipped = matcher(self.opened.manifest.base.skip)
        waiting: list[tuple[TensorInfo, _Choice]] = []
        for name, info in self.opened.base.tensors.items():
            if skipped(name):
                self.tensors[name] = TensorPlan(name, "copy", why="[base] skip")
            elif not info.kind.is_float:
                self.tensors[name] = TensorPlan(
                    name, "equal", why=f"{info.dtype}: equal in all models"
                )
            else:
                choice = self._choose(info)
                if choice is None:
                    self.tensors[name] = TensorPlan(
                        name, "copy", why="a rule or the profile says base"
                    )
                elif is_factor_method(self._method(choice.method)):
                    waiting.append((info, choice))
                    self.tensors[name] = TensorPlan(name, "factors", choice.alpha, why=choice.why)
                else:
                    self.tensors[name] = TensorPlan(
                        name, "elementwise", choice.alpha, choice.method, why=choice.why
                    )
        for group in _fused(waiting, self.observed):
            self._require_alike(group)
            matrix = self._matrix(group)
            self.matrices[matrix.name] = matrix
            for part in matrix.parts:
                plan = self.tensors[part.tensor]
                self.tensors[part.tensor] = TensorPlan(
                    part.tensor, "factors", matrix.alpha, matrix.method, matrix.name, plan.why
                )

    def _require_alike(self, group: list[tuple[TensorInfo, _Choice]]) -> None:
        """Parts of one matrix get one treatment.

        Raises:
            ManifestError: A rule singles out a part of q, k, v that the profile merges as one.
        """
        info, choice = group[0]
        if not choice.fuse or kind_of(info.name) not in _FUSED_KINDS:
            return
        names = {item.name for item, _ in group}
        siblings = [
            name
            for name in self.opened.base.tensors
            if kind_of(name) in _FUSED_KINDS
            and name.endswith(".weight")
            and block_of(name) == block_of(info.name)
            and _parent(name) == _parent(info.name)
        ]
        others = [name for name in siblings if name not in names]
        if others or len({item.alpha for _, item in group}) > 1:
            raise ManifestError(
                f"a rule singles out a part of {', '.join(siblings)}, which the profile merges as "
                "one matrix; let its pattern match all of them, or set fuse_qkv = false in "
                "[merge.options]"
            )

    def unused_patterns(self) -> list[str]:
        """Notes on patterns of the manifest that match no tensor."""
        manifest = self.opened.manifest
        names = {n for c in (self.opened.base, *self.opened.experts.values()) for n in c.tensors}
        patterns = [("[base] skip", pattern) for pattern in manifest.base.skip]
        patterns += [("rule", rule.tensors) for rule in manifest.merge.rules]
        return [
            f"{what} '{pattern}' matches no tensor"
            for what, pattern in patterns
            if not any(compile_pattern(pattern).fullmatch(name) for name in names)
        ]

    def _choose(self, info: TensorInfo) -> _Choice | None:
        """Method and alpha of one float tensor; None to copy the base's."""
        rule = self._rule(info.name)
        if rule is not None and rule.method is not None:
            return self._by_rule(info, rule)
        if self._copied(info.name):
            return None
        choice = self._by_default(info)
        if rule is not None and rule.alpha is not None:
            return _Choice(choice.method, rule.alpha, choice.why, choice.fuse)
        return choice

    def _rule(self, name: str) -> Rule | None:
        rules = self.opened.manifest.merge.rules
        return next((r for r in rules if compile_pattern(r.tensors).fullmatch(name)), None)

    def _by_rule(self, info: TensorInfo, rule: Rule) -> _Choice | None:
        if rule.method == "base":
            return None
        choice = MethodChoice(str(rule.method), rule.options, self.opened.modality)
        method = self._method(choice)
        if is_factor_method(method):
            if info.ndim != 2:
                raise ManifestError(
                    f"rule '{rule.tensors}' asks for '{rule.method}' on tensor '{info.name}' of "
                    f"shape {info.shape}; this method merges matrices only"
                )
            if method.uses_moments and info.name not in self.observed:
                raise ManifestError(
                    f"rule '{rule.tensors}' asks for '{rule.method}' on tensor '{info.name}', "
                    'whose inputs cannot be observed; set options = { decomposition = "svd" }'
                )
        alpha = self.alpha if choice == self._main else 1.0
        return _Choice(
            choice, alpha if rule.alpha is None else rule.alpha, f"rule '{rule.tensors}'"
        )

    def _by_default(self, info: TensorInfo) -> _Choice:
        """The main method where it applies, else `other_matrices` or the average."""
        average = MethodChoice("average", {}, self.opened.modality)
        if self.profile is None:
            main = self._method(self._main)
            if not is_factor_method(main) or info.ndim == 2:
                return _Choice(self._main, self.alpha, "the method")
            return _Choice(average, 1.0, f"{info.ndim}-dimensional")
        if self._is_target(info, self.profile):
            return _Choice(self._main, self.alpha, "target", fuse=self.profile.fuse_qkv)
        alpha = self.alpha if self.profile.alpha_on == "all" else 1.0
        if info.ndim == 2 and self.profile.other_matrices == "tsv":
            tsv = {"mean_singular_factor": self.profile.other_mean_singular_factor}
            choice = MethodChoice("tsv_m", tsv, self.opened.modality)
            return _Choice(choice, alpha, self._why_other(info))
        return _Choice(average, alpha, self._why_other(info))

    def _is_target(self, info: TensorInfo, profile: Profile) -> bool:
        method = self._method(self._main)
        assert isinstance(method, Esm)
        if info.ndim != 2:
            return False
        in_block = (
            info.name in self.observed if method.uses_moments else block_of(info.name) is not None
        )
        if not in_block or profile.targets == "all":
            return in_block
        kind = kind_of(info.name)
        wanted = set(profile.targets)
        if profile.fuse_qkv and "qkv" in wanted:
            wanted |= {"q", "k", "v"}
        return kind in wanted or IMPLIED_KINDS.get(str(kind)) in wanted

    def _why_other(self, info: TensorInfo) -> str:
        if info.ndim != 2:
            return f"{info.ndim}-dimensional"
        if block_of(info.name) is None:
            return "outside the blocks"
        return "not a target" if info.name in self.observed else "no hook sees its input"

    def _matrix(self, group: list[tuple[TensorInfo, _Choice]]) -> Matrix:
        """One matrix of one or more stored tensors."""
        infos, choice = [info for info, _ in group], group[0][1]
        seen = self.observed.get(infos[0].name)
        transposed = seen.transposed if seen else False
        shapes = [tuple(reversed(i.shape)) if transposed else i.shape for i in infos]
        outputs, inputs = sum(shape[0] for shape in shapes), shapes[0][1]
        method = factor_method(choice.method)
        name = infos[0].name if len(infos) == 1 else fused_name(i.name for i in infos)
        moment = leader = None
        if method.uses_moments:
            assert seen is not None
            leader = seen.leader
            shared = seen.shared and len(infos) == 1
            moment = "shift" if inputs > outputs and not shared else "input"
        return Matrix(
            name=name,
            parts=tuple(Part(i.name, s[0]) for i, s in zip(infos, shapes, strict=True)),
            outputs=outputs,
            inputs=inputs,
            transposed=transposed,
            role=role_of(name),
            block=block_of(name),
            method=choice.method,
            alpha=choice.alpha,
            rank=method.rank((outputs, inputs), self._num_experts),
            scaled=self.profile is not None and "layer" in self.profile.levels,
            moment=moment,  # type: ignore[arg-type]
            leader=leader,
        )


def observed_tensors(opened: Opened) -> dict[str, Seen]:
    """Stored matrices whose inputs hooks see, by tensor name."""
    if opened.chain is None or opened.skeleton is None:
        return {}
    found = {}
    for index, block in enumerate(opened.chain.matrices):
        prefix = f"{opened.chain.prefix}.{index}"
        users = [matrix.leader for matrix in block]
        for matrix in block:
            tensor = opened.skeleton.stored.get(f"{prefix}.{matrix.module}.weight")
            if tensor is not None:
                found[tensor] = Seen(
                    f"{prefix}.{matrix.module}",
                    f"{prefix}.{matrix.leader}",
                    matrix.layout.transposed,
                    users.count(matrix.leader) > 1,
                )
    return found


def _fused(
    waiting: list[tuple[TensorInfo, _Choice]], observed: dict[str, Seen]
) -> Iterable[list[tuple[TensorInfo, _Choice]]]:
    """Group q, k, v of one block where their choice says so; every other tensor is alone."""
    groups: dict[object, list[tuple[TensorInfo, _Choice]]] = {}
    for info, choice in waiting:
        kind = kind_of(info.name)
        fuse = choice.fuse and kind in _FUSED_KINDS
        seen = observed.get(info.name)
        sibling = (block_of(info.name), seen.leader if seen else _parent(info.name))
        groups.setdefault(sibling if fuse else info.name, []).append((info, choice))
    return [
        sorted(group, key=lambda item: "qkv".find(str(kind_of(item[0].name))))
        for group in groups.values()
    ]


def _parent(name: str) -> str:
    """Name of the attention module that a projection's weight belongs to."""
    return name.rsplit(".", 2)[0]
