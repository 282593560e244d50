"""Which tensor is merged how: rules first, then the method's targets, then the rest.

From:  opening.py.
To:    tasks.py: `TensorPlan` for every tensor, `Matrix` for what is merged by factors.

In this order: [base] skip and integer tensors are copied; the first matching rule decides; tensors
that the profile says not to merge are copied; the method's own matrices go to it; other matrices to
`other_matrices`; everything else is averaged.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from esm_stream.calibration.steps import OUTSIDE
from esm_stream.checkpoints.header import TensorInfo, shortened
from esm_stream.checkpoints.names import (
    block_of,
    compile_pattern,
    fused_name,
    kind_of,
    matcher,
    role_of,
    stack_of,
)
from esm_stream.errors import InputError, ManifestError, UnsupportedModelError
from esm_stream.manifest import Graded, Rule
from esm_stream.methods import (
    at_depth,
    create,
    interpolated,
    is_factor_method,
    merges_matrices,
    needs_fisher,
    uses_moments,
)
from esm_stream.methods.contract import AnyMethod, ElementwiseMethod, Method, SumMethod
from esm_stream.methods.esm import Esm
from esm_stream.methods.profiles import Profile, default_alpha
from esm_stream.planning.opening import Opened
from esm_stream.planning.pieces import Piece, Pieces
from esm_stream.planning.plan import Matrix, MethodChoice, Part, TensorPlan, digest
from esm_stream.scaling import Variant
from esm_stream.scaling.lines import factor

_FUSED_KINDS = ("q", "k", "v")
UNOBSERVED = "no hook sees its input"
# A gated MLP has two up-projections: profiles that name "up" mean both.
IMPLIED_KINDS = {"gate": "up", "gate_up": "up"}


@dataclass(frozen=True, slots=True)
class _Choice:
    """How one tensor is to be merged, before matrices are formed.

    `beside`: by what stands in where the merge's method does not apply.
    """

    method: MethodChoice
    alpha: float
    why: str
    fuse: bool = False
    beside: bool = False


@dataclass(frozen=True, slots=True)
class _Unit:
    """A piece that is merged by factors, and how."""

    piece: Piece
    choice: _Choice


class Depths:
    """How deep in the model a tensor lies: 0 in the first block, 1 in the last."""

    def __init__(self, names: Iterable[str]) -> None:
        self._blocks: dict[str, int] = {}
        for name in names:
            block = block_of(name)
            if block is not None:
                stack = stack_of(name)
                self._blocks[stack] = max(block + 1, self._blocks.get(stack, 0))

    def of(self, name: str) -> float:
        """Depth of a tensor; 0 outside the blocks, 1 in a stack of one block."""
        block, blocks = block_of(name), self._blocks.get(stack_of(name), 0)
        if block is None:
            return 0.0
        return block / (blocks - 1) if blocks > 1 else 1.0


class Treatments:
    """All tensors and matrices of one merge."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self.pieces = Pieces(opened)
        self.tensors: dict[str, TensorPlan] = {}
        self.matrices: dict[str, Matrix] = {}
        self.populations: dict[str, MethodChoice] = {}
        self._num_experts = len(opened.experts)
        self._depths = Depths(opened.base.tensors)
        self._merge = opened.manifest.merge
        method = self._method(self._chosen(self._merge.method, self._merge.options, {}, 0.0))
        self.profile: Profile | None = method.profile if isinstance(method, Esm) else None
        self._copied = matcher(self.profile.copy_from_base if self.profile else ())
        self.layer_level = self._layer_level()
        lines = self._merge.post.lines
        self.lines_slope = lines.b if lines and lines.a is None else None
        self._fisher_problems: list[str] = []
        self._decide()
        if self._fisher_problems:
            raise InputError(shortened(self._fisher_problems, "Fisher information"))

    def _layer_level(self) -> tuple[float, Variant] | None:
        """Exponent and variant of layer scaling, asked for by [merge.post] or the profile.

        Raises:
            ManifestError: By both.
        """
        exponent, profile = self._merge.post.layers, self.profile
        if profile is None or "layer" not in profile.levels:
            return None if exponent is None else (exponent, "both")
        if exponent is not None:
            raise ManifestError(
                "merge.post.layers: the method's profile scales layers already; remove one of "
                'them, or leave "layer" out of levels in [merge.options]'
            )
        return profile.exponent_of("layer"), profile.variant

    def _method(self, choice: MethodChoice) -> AnyMethod:
        return create(choice.name, choice.options, choice.modality)

    def _chosen(
        self, name: str, options: Mapping[str, Any], weights: Mapping[str, Graded], depth: float
    ) -> MethodChoice:
        """A method with the options and weights that it has at one depth."""
        given = {**self._merge.weights, **weights}
        found = tuple(
            _number(interpolated(given.get(expert, 1.0), depth)) for expert in self.opened.experts
        )
        return MethodChoice(name, at_depth(name, options, depth), self.opened.modality, found)

    def _main(self, info: TensorInfo, rule: Rule | None) -> MethodChoice:
        """The merge's method for one tensor."""
        weights = rule.weights if rule else {}
        depth = self._depths.of(info.name)
        return self._chosen(self._merge.method, self._merge.options, weights, depth)

    def _alpha(self, name: str, alpha: Graded | str) -> float:
        """Coefficient of one tensor that the merge's method is for."""
        if not isinstance(alpha, str):
            return _number(interpolated(alpha, self._depths.of(name)))
        if self._merge.post.lines is not None:
            return 1.0
        if self.profile is None:
            method = self._method(self._chosen(self._merge.method, self._merge.options, {}, 0.0))
            if isinstance(method, Method):
                return method.alpha_for(self.opened.modality, self._num_experts)
            return 1.0
        return default_alpha(self.opened.modality, self._num_experts, self.profile.factor)

    def _decide(self) -> None:
        """Fill `tensors` and `matrices`."""
        skipped = matcher(self.opened.manifest.base.skip)
        waiting: list[_Unit] = []
        for name, info in self.opened.base.tensors.items():
            if skipped(name):
                self.tensors[name] = TensorPlan(name, "copy", why="[base] skip")
            elif not info.kind.is_float:
                self.tensors[name] = TensorPlan(
                    name, "equal", why=f"{info.dtype}: equal in all models"
                )
            else:
                choice = self._choose(info)
                if isinstance(choice, TensorPlan):
                    self.tensors[name] = choice
                    continue
                choice = replace(choice, alpha=choice.alpha * self._post_factor(name))
                plan = self._tensor(name, choice)
                if self._is_merged_whole(info, choice):
                    waiting += [_Unit(piece, choice) for piece in self.pieces.of(info)]
                    plan = replace(plan, treatment="factors")
                self.tensors[name] = plan
        for group in self._fused(waiting):
            matrix = self._matrix(group)
            self.matrices[matrix.name] = matrix
            for part in matrix.parts:
                plan = self.tensors[part.tensor]
                names = tuple(dict.fromkeys((*plan.matrices, matrix.name)))
                self.tensors[part.tensor] = replace(
                    plan, alpha=matrix.alpha, method=matrix.method, matrices=names
                )

    def _without_fisher(self, name: str) -> Iterator[str]:
        """What is wrong with the experts' Fisher information of a tensor."""
        shape = self.opened.base.tensors[name].shape
        for expert, fisher in self.opened.fishers.items():
            info = fisher.tensors.get(name)
            if info is None or info.shape != shape or not info.kind.is_float:
                found = f"has it as {info.dtype} {info.shape}" if info else "does not have it"
                yield (
                    f"tensor '{name}' has shape {shape} and is merged by its Fisher information; "
                    f'that of expert "{expert}" ({fisher.root}) {found}. Let a rule merge it by '
                    "another method, or save it with the others"
                )

    def _post_factor(self, name: str) -> float:
        """What [merge.post] multiplies a merged tensor by, as far as the manifest says it."""
        post = self._merge.post
        if post.lines is None or post.lines.a is None:
            return post.alpha
        return post.alpha * factor(post.lines.a, post.lines.b, self._depths.of(name))

    def _is_merged_whole(self, info: TensorInfo, choice: _Choice) -> bool:
        """Whether the merged update of a tensor's matrices is made, and stored, as a whole."""
        if merges_matrices(self._method(choice.method)):
            return True
        post = self._merge.post
        wanted = post.svc is not None or post.layers is not None
        in_block = block_of(info.name) is not None
        return wanted and in_block and not choice.beside and self._is_matrix(info)

    def _tensor(self, name: str, choice: _Choice) -> TensorPlan:
        """A tensor merged panel by panel, with the tensors it shares statistics with."""
        method = self._method(choice.method)
        population = ""
        if needs_fisher(method):
            self._fisher_problems += self._without_fisher(name)
        if isinstance(method, ElementwiseMethod) and method.sweeps and method.scope == "model":
            population = f"{choice.method.name}-{digest(asdict(choice.method))[:12]}"
            self.populations[population] = choice.method
        return TensorPlan(
            name,
            "elementwise",
            choice.alpha,
            choice.method,
            why=choice.why,
            population=population,
            depth=self._depths.of(name),
        )

    def _fused(self, waiting: list[_Unit]) -> Iterable[list[_Unit]]:
        """Pieces that form one matrix: by [merge] fuse, or q, k, v where the profile says so."""
        groups: dict[object, list[_Unit]] = {}
        patterns: dict[object, tuple[str, ...]] = {}
        for unit in waiting:
            piece, kind = unit.piece, kind_of(unit.piece.tensor)
            fuse = self._fuse_of(piece.tensor)
            key: object = piece.name
            if fuse is not None:
                key = (fuse, _parent(piece.tensor), piece.slice, piece.part)
                patterns[key] = fuse
            elif unit.choice.fuse and kind in _FUSED_KINDS:
                input_of = piece.seen.leader if piece.seen else _parent(piece.tensor)
                key = (block_of(piece.tensor), input_of)
            groups.setdefault(key, []).append(unit)
        for key, group in groups.items():
            if key in patterns:
                self._require_fusible(group, patterns[key])
            else:
                group.sort(key=lambda unit: "qkv".find(str(kind_of(unit.piece.tensor))))
                self._require_alike(group)
        return groups.values()

    def _fuse_of(self, name: str) -> tuple[str, ...] | None:
        """The patterns of [merge] fuse, of which one is for a tensor."""
        return next((f for f in self._merge.fuse if matcher(f)(name)), None)

    def _require_fusible(self, group: list[_Unit], patterns: tuple[str, ...]) -> None:
        """One tensor for each pattern, in their order, all treated alike, with one input.

        Raises:
            ManifestError: Otherwise.
        """
        group.sort(key=lambda unit: [matcher([p])(unit.piece.tensor) for p in patterns].index(True))
        names = ", ".join(unit.piece.name for unit in group)
        found = [
            compile_pattern(p).fullmatch(u.piece.tensor)
            for p, u in zip(patterns, group, strict=False)
        ]
        if len(group) != len(patterns) or not all(found):
            raise ManifestError(
                f"merge.fuse: of {', '.join(patterns)} one module has only {names} among what is "
                f"merged as matrices; there has to be one tensor for each pattern"
            )
        inputs = {(u.piece.inputs, u.piece.transposed, u.piece.seen) for u in group}
        if len(inputs) > 1:
            raise ManifestError(f"merge.fuse: {names} do not have the same input")
        if any(u.choice != group[0].choice for u in group):
            raise ManifestError(
                f"merge.fuse: rules treat {names} differently; let a rule match all or none of them"
            )

    def _require_alike(self, group: list[_Unit]) -> None:
        """Parts of one matrix get one treatment.

        Raises:
            ManifestError: A rule singles out a part of q, k, v that the profile merges as one.
        """
        name, choice = group[0].piece.tensor, group[0].choice
        if not choice.fuse or kind_of(name) not in _FUSED_KINDS:
            return
        names = {unit.piece.tensor for unit in group}
        siblings = [
            other
            for other in self.opened.base.tensors
            if kind_of(other) in _FUSED_KINDS
            and other.endswith(".weight")
            and block_of(other) == block_of(name)
            and _parent(other) == _parent(name)
        ]
        others = [other for other in siblings if other not in names]
        if others or len({unit.choice.alpha for unit in group}) > 1:
            raise ManifestError(
                f"a rule singles out a part of {', '.join(siblings)}, which the profile merges as "
                "one matrix; let its pattern match all of them, or set fuse_qkv = false in "
                "[merge.options]"
            )

    def unobserved(self) -> list[str]:
        """A note on matrices in blocks that would be merged from what they see, if any hook saw it.

        Empty for methods that need no data.
        """
        if self.profile is None or self.opened.skeleton is None:
            return []
        missed = {
            name: plan
            for name, plan in self.tensors.items()
            if plan.why == UNOBSERVED and not self._copied(name)
        }
        if not missed:
            return []
        methods = sorted({plan.method.name for plan in missed.values() if plan.method})
        return [f"no hook sees the inputs of {', '.join(missed)}; merged by {', '.join(methods)}"]

    def unused_patterns(self) -> list[str]:
        """Notes on patterns of the manifest that match no tensor."""
        manifest = self.opened.manifest
        names = {n for c in (self.opened.base, *self.opened.experts.values()) for n in c.tensors}
        patterns = [("[base] skip", pattern) for pattern in manifest.base.skip]
        patterns += [("merge.fuse", p) for fuse in manifest.merge.fuse for p in fuse]
        patterns += [("merge.split", split.tensors) for split in manifest.merge.split]
        notes = [
            f"{what} '{pattern}' matches no tensor"
            for what, pattern in patterns
            if not any(compile_pattern(pattern).fullmatch(name) for name in names)
        ]
        return notes + [
            f"{rule.place} matches no tensor"
            for rule in manifest.merge.rules
            if not any(rule_matches(rule, name) for name in names)
        ]

    def _choose(self, info: TensorInfo) -> _Choice | TensorPlan:
        """Method and alpha of one float tensor, or the plan of one that is copied."""
        rule = self._rule(info.name)
        if rule is not None and rule.method in ("base", "expert"):
            return TensorPlan(info.name, "copy", why=rule.place, source=rule.expert or "")
        if rule is not None and rule.method is not None:
            return self._by_rule(info, rule)
        if self._copied(info.name):
            return TensorPlan(info.name, "copy", why="the profile says base")
        choice = self._by_default(info, rule)
        if rule is not None and rule.alpha is not None:
            return replace(choice, alpha=self._alpha(info.name, rule.alpha))
        return choice

    def _rule(self, name: str) -> Rule | None:
        rules = self.opened.manifest.merge.rules
        return next((rule for rule in rules if rule_matches(rule, name)), None)

    def _by_rule(self, info: TensorInfo, rule: Rule) -> _Choice:
        depth = self._depths.of(info.name)
        choice = self._chosen(str(rule.method), rule.options, rule.weights, depth)
        method = self._method(choice)
        if merges_matrices(method):
            if not self._is_matrix(info) and info.name not in self.pieces:
                raise ManifestError(
                    f"{rule.place} asks for '{rule.method}' on tensor '{info.name}' of "
                    f"shape {info.shape}; this method merges matrices only"
                )
            if uses_moments(method) and info.name not in self.pieces:
                raise ManifestError(
                    f"{rule.place} asks for '{rule.method}' on tensor '{info.name}', "
                    'whose inputs cannot be observed; set options = { decomposition = "svd" }'
                )
        same = (rule.method, rule.options) == (self._merge.method, self._merge.options)
        alpha = rule.alpha if rule.alpha is not None else self._merge.alpha if same else 1.0
        return _Choice(choice, self._alpha(info.name, alpha), rule.place)

    def _by_default(self, info: TensorInfo, rule: Rule | None) -> _Choice:
        """The main method where it applies, else `other_matrices` or the average."""
        weights, depth = rule.weights if rule else {}, self._depths.of(info.name)
        main, alpha = self._main(info, rule), self._alpha(info.name, self._merge.alpha)
        average = self._chosen("average", {}, weights, depth)
        if self.profile is None:
            method = self._method(main)
            if self._merges(method, info):
                return _Choice(main, alpha, "the method")
            return _Choice(average, 1.0, self._why_other(info), beside=True)
        if self._is_target(info, self.profile):
            return _Choice(main, alpha, "target", fuse=self.profile.fuse_qkv)
        alpha = alpha if self.profile.alpha_on == "all" else 1.0
        if self._is_matrix(info) and self.profile.other_matrices == "tsv":
            tsv = {"mean_singular_factor": self.profile.other_mean_singular_factor}
            choice = self._chosen("tsv_m", tsv, weights, depth)
            return _Choice(choice, alpha, self._why_other(info), beside=True)
        return _Choice(average, alpha, self._why_other(info), beside=True)

    def _merges(self, method: AnyMethod, info: TensorInfo) -> bool:
        """Whether a main method without profile is for a tensor."""
        if not merges_matrices(method):
            return True
        if not self._is_matrix(info) or (uses_moments(method) and info.name not in self.pieces):
            return False
        in_block = block_of(info.name) is not None
        return in_block or not getattr(method, "blocks_only", False)

    def _is_target(self, info: TensorInfo, profile: Profile) -> bool:
        method = self._method(self._main(info, None))
        assert isinstance(method, Esm)
        if not self._is_matrix(info):
            return False
        in_block = (
            self.pieces.in_block(info.name)
            if method.uses_moments
            else block_of(info.name) is not None
        )
        if not in_block or profile.targets == "all":
            return in_block
        kind = kind_of(info.name)
        wanted = set(profile.targets)
        if profile.fuse_qkv and "qkv" in wanted:
            wanted |= {"q", "k", "v"}
        return kind in wanted or IMPLIED_KINDS.get(str(kind)) in wanted

    def _is_matrix(self, info: TensorInfo) -> bool:
        """Two dimensions, or a known stack, or a part of a block that is kept in more dimensions.

        Convolutions are not, a rule has to ask for them; nor are the biases of a stack.
        """
        if info.ndim == 2 or self.pieces.is_stack(info.name):
            return not info.name.endswith("bias")
        return info.name in self.pieces and kind_of(info.name) is not None

    def _why_other(self, info: TensorInfo) -> str:
        if not self._is_matrix(info):
            return "biases of a stack" if info.ndim == 2 else f"{info.ndim}-dimensional"
        if block_of(info.name) is None:
            return "outside the blocks"
        return "not a target" if info.name in self.pieces else UNOBSERVED

    def _matrix(self, group: list[_Unit]) -> Matrix:
        """One matrix of one or more pieces."""
        pieces, choice, first = [u.piece for u in group], group[0].choice, group[0].piece
        outputs = sum(piece.outputs for piece in pieces)
        method = self._method(choice.method)
        name = first.name if len(pieces) == 1 else fused_name(piece.name for piece in pieces)
        moment = leader = None
        summed = isinstance(method, SumMethod)
        if uses_moments(method):
            assert first.seen is not None
            leader = first.seen.leader
            # Routed inputs are few, and their updates many: what is kept are the inputs.
            shared = bool(first.seen.routed) or (first.seen.shared and len(pieces) == 1)
            needed = summed or (is_factor_method(method) and method.needs_inputs)
            by_inputs = shared or needed or first.inputs <= outputs
            moment = "input" if by_inputs else "shift"
        return Matrix(
            name=name,
            parts=tuple(
                Part(piece.tensor, stop - start, piece.slice, start)
                for piece in pieces
                for start, stop in piece.ranges
            ),
            outputs=outputs,
            inputs=first.inputs,
            transposed=first.transposed,
            role=role_of(name),
            block=block_of(name),
            method=choice.method,
            alpha=choice.alpha,
            rank=method.rank((outputs, first.inputs), self._num_experts)
            if is_factor_method(method)
            else 0,
            scaled=self.layer_level is not None,
            svc=self._merge.post.svc if block_of(name) is not None else None,
            moment=moment,  # type: ignore[arg-type]
            leader=leader,
            also=first.seen.also if first.seen else (),
            observed_in=first.seen.block if first.seen else OUTSIDE,
            routed=first.seen.routed if first.seen else 0.0,
            summed=summed,
            **self._walked(first, method),
        )

    def _walked(self, piece: Piece, method: AnyMethod) -> dict[str, Any]:
        """Whether and when a matrix is merged by its inputs in the merged model.

        Raises:
            UnsupportedModelError: Its block is not one of a row that can be merged one by one.
            ManifestError: [merge.post] would change merged updates whose outputs were looked at.
        """
        if not isinstance(method, SumMethod) or not method.inputs_of_merged:
            return {}
        post = self._merge.post
        if post.svc is not None or post.layers is not None or self.lines_slope is not None:
            raise ManifestError(
                "merge.post: svc, layers and lines without a are for merges that do not look at "
                'the merged model\'s inputs; give the method options = { inputs = "expert" }'
            )
        trace, seen = self.opened.trace, piece.seen
        assert trace is not None
        assert seen is not None
        why = ""
        if trace.mode == "resident":
            why = f"blocks do not come one after the other ({trace.why})"
        elif seen.block == OUTSIDE:
            why = "it lies outside the blocks"
        elif seen.also:
            why = "several blocks share it"
        if why:
            raise UnsupportedModelError(
                f"'{piece.name}' cannot be merged by its inputs in the merged model: {why}. Give "
                'it options = { inputs = "expert" }'
            )
        order = dict.fromkeys(_stack_of(m.leader) for m in trace.matrices[seen.block])
        return {"walked": True, "order": list(order).index(_stack_of(seen.leader))}


def rule_matches(rule: Rule, name: str) -> bool:
    """Whether a rule is for a tensor."""
    if rule.kinds and kind_of(name) not in rule.kinds:
        return False
    return compile_pattern(rule.tensors).fullmatch(name) is not None


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)


def _parent(name: str) -> str:
    """Name of the attention module that a projection's weight belongs to."""
    return name.rsplit(".", 2)[0]


def _stack_of(leader: str) -> str:
    """Name of what is observed together: all experts of a mixture come at the same time."""
    return leader.partition("#")[0]
