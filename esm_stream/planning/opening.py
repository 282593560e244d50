"""Open everything a manifest names and hold it against each other, before any work.

From:  manifest.py.
To:    treatments.py and tasks.py; later the stages, which open the same checkpoints again.
Cost:  headers, config files and the model on the meta device; no tensor is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from esm_stream.checkpoints.adapter import AdaptedCheckpoint, is_adapter, open_expert
from esm_stream.checkpoints.checkpoint import (
    Checkpoint,
    compare,
    open_checkpoint,
    open_tensors,
)
from esm_stream.checkpoints.names import matcher
from esm_stream.checkpoints.restacked import block_order, restacked
from esm_stream.errors import InputError, ManifestError, UnsupportedModelError
from esm_stream.manifest import Expert, Graded, Manifest, Rule
from esm_stream.methods import at_depth, create, depths_of, needs_fisher, uses_moments

if TYPE_CHECKING:
    import torch

    from esm_stream.calibration.skeleton import Skeleton
    from esm_stream.calibration.trace import Trace

Modality = Literal["vision", "language"]
COMPUTE_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
VOLATILE_CONFIG = frozenset(
    {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}
)


@dataclass(frozen=True)
class Opened:
    """Everything a plan is made from."""

    manifest: Manifest
    base: Checkpoint
    experts: dict[str, Checkpoint]
    modality: Modality
    skeleton: "Skeleton | None"
    trace: "Trace | None"
    dtype: str
    notes: tuple[str, ...]
    sample: "Mapping[str, torch.Tensor]"
    fishers: Mapping[str, Checkpoint]
    block_order: tuple[int, ...] | None = None


def open_inputs(manifest: Manifest) -> Opened:
    """Open base and experts, compare them, and find out how the forward can be streamed.

    Raises:
        InputError: All mistakes of all inputs, one per line.
        ManifestError: Unknown method or option.
        UnsupportedModelError: A method needs activations and the forward cannot be streamed.
    """
    _check_methods(manifest)
    base, experts = _open_checkpoints(manifest)
    fishers = _open_fishers(manifest)
    order = _block_order(manifest, base, experts)
    base, experts, fishers = (
        restacked(base, order),
        {name: restacked(expert, order) for name, expert in experts.items()},
        {name: restacked(fisher, order) for name, fisher in fishers.items()},
    )
    dtype = compute_dtype(manifest, base)
    needs_data = _needs_data(manifest)
    notes = [*_config_notes(base, experts), *(generic_notes(manifest) if needs_data else ())]
    problems = _calibration_problems(manifest) if needs_data else []
    if problems:
        raise InputError(problems)
    if not needs_data:
        modality = _modality_of(base)
        return Opened(
            manifest, base, experts, modality, None, None, dtype, tuple(notes), {}, fishers, order
        )

    from esm_stream.calibration.skeleton import build_skeleton

    shapes = {name: info.shape for name, info in base.tensors.items()}
    try:
        skeleton = build_skeleton(base.root, shapes, torch_dtype(dtype))
        trace, sample = _trace(manifest, skeleton, dtype)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{base.root}: {error}. Methods that need no activations still work: "
            'method = "tsv_m" or "average", or for esm the option decomposition = "svd".'
        ) from error
    modality = "vision" if skeleton.modality() == "vision" else "language"
    return Opened(
        manifest, base, experts, modality, skeleton, trace, dtype, tuple(notes), sample, fishers
    )


def torch_dtype(name: str) -> "torch.dtype":
    """The torch dtype of a name such as "bfloat16"."""
    import torch

    found: torch.dtype = getattr(torch, name)
    return found


def compute_dtype(manifest: Manifest, base: Checkpoint) -> str:
    """Arithmetic of the forward: the manifest's, or the dtype most of the base is stored in."""
    if manifest.calibration.dtype != "base":
        return manifest.calibration.dtype
    sizes: dict[str, int] = {}
    for info in base.tensors.values():
        if info.kind.is_float:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.numel
    return COMPUTE_DTYPES[max(sizes, key=sizes.__getitem__)] if sizes else "float32"


def _check_methods(manifest: Manifest) -> None:
    """Refuse unknown methods and options of the merge and of every rule."""
    lines: list[str] = []
    experts = [expert.name for expert in manifest.experts]
    for place, name, options, weights in _chosen(manifest):
        try:
            for depth in depths_of(options):
                _check_method(name, at_depth(name, options, depth), experts)
            method = create(name, at_depth(name, options, 0.0), "language")
            if weights and uses_moments(method):
                raise ManifestError(f"method '{name}' has no weights; leave them out")
        except ManifestError as error:
            lines += [f"{place}: {line}" for line in str(error).splitlines()]
        lines += [
            f"{place}: weights: there is no expert '{expert}'"
            for expert in weights
            if expert not in experts
        ]
    for i, rule in enumerate(manifest.merge.rules):
        lines += [f"merge.rules[{i}]: {line}" for line in _rule_mistakes(rule, experts)]
    if lines:
        raise ManifestError("\n".join(lines))


def _chosen(manifest: Manifest) -> list[tuple[str, str, Mapping[str, Any], Mapping[str, Graded]]]:
    """Place, name, options and weights of the merge's method and of those of rules."""
    merge = manifest.merge
    found: list[tuple[str, str, Mapping[str, Any], Mapping[str, Graded]]] = [
        ("merge", merge.method, merge.options, merge.weights)
    ]
    for i, rule in enumerate(merge.rules):
        weights = {**merge.weights, **rule.weights}
        if rule.method is None and rule.weights:
            found.append((f"merge.rules[{i}]", merge.method, merge.options, weights))
        elif rule.method not in (None, "base", "expert"):
            found.append((f"merge.rules[{i}]", str(rule.method), rule.options, weights))
    return found


def _check_method(name: str, options: Mapping[str, Any], experts: Sequence[str]) -> None:
    """Refuse unknown options, values out of range, and values by expert that lack one.

    Raises:
        ManifestError: All mistakes, one per line.
    """
    method = create(name, options, "language")
    lines = [
        f"method '{name}': {key}: wants a value for each of {', '.join(experts)}, "
        f"got {', '.join(map(str, value))}"
        for key, value in options.items()
        if isinstance(value, dict) and set(value) != set(experts)
    ]
    most = getattr(method, "max_experts", None)
    if most is not None and len(experts) > most:
        lines.append(f"method '{name}' merges {most} experts, the manifest has {len(experts)}")
    if lines:
        raise ManifestError("\n".join(lines))


def _rule_mistakes(rule: Rule, experts: Sequence[str]) -> list[str]:
    """What a rule says that cannot be meant."""
    lines = []
    copies = rule.method in ("base", "expert")
    if rule.options and (rule.method is None or copies):
        lines.append("options need a method of the same rule")
    if rule.method is None and rule.alpha is None and not rule.weights:
        lines.append("gives neither a method nor an alpha nor weights")
    if copies and (rule.alpha is not None or rule.weights):
        lines.append(f"method '{rule.method}' copies; it has neither alpha nor weights")
    if (rule.method == "expert") != (rule.expert is not None):
        lines.append("method 'expert' and the key 'expert' go together")
    if rule.expert is not None and rule.expert not in experts:
        lines.append(f"there is no expert '{rule.expert}'; known: {', '.join(experts)}")
    return lines


def _needs_data(manifest: Manifest) -> bool:
    """Whether any method of the manifest looks at activations."""
    methods = [
        create(name, at_depth(name, options, 0.0), "language")
        for _, name, options, _ in _chosen(manifest)
    ]
    return any(uses_moments(method) for method in methods)


def _open_checkpoints(manifest: Manifest) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    problems: list[str] = []
    found: dict[str, Checkpoint] = {}
    named = [("", manifest.base.model), *((e.name, e.model) for e in manifest.experts)]
    for name, root in named:
        try:
            own = found.get("")
            if own is not None:
                found[name] = open_expert(root, own)
            elif not name or not is_adapter(root):
                found[name] = open_checkpoint(root)
        except InputError as error:
            problems += error.problems
    base = found.pop("", None)
    if base is not None:
        problems += compare(base, found, matcher(manifest.base.skip))
    if problems or base is None:
        raise InputError(problems)
    return base, found


def _block_order(
    manifest: Manifest, base: Checkpoint, experts: Mapping[str, Checkpoint]
) -> tuple[int, ...] | None:
    """What [output] layers asks for.

    Raises:
        ManifestError: It is not possible with these models or methods.
    """
    if not manifest.output.layers:
        return None
    order = block_order(base, manifest.output.layers)
    if order is not None and _needs_data(manifest):
        raise ManifestError(
            "output.layers: methods that look at samples run models with all their layers; merge "
            "by one that does not, or merge first and change the layers of the merged model"
        )
    adapters = [name for name, expert in experts.items() if isinstance(expert, AdaptedCheckpoint)]
    if order is not None and adapters:
        raise ManifestError(
            f"output.layers: {', '.join(adapters)} are adapters; merge them into their base first"
        )
    return order


def _open_fishers(manifest: Manifest) -> dict[str, Checkpoint]:
    """Fisher information of all experts, where a method of the manifest needs it.

    Raises:
        InputError: It is not named, or cannot be read.
    """
    methods = (create(n, at_depth(n, o, 0.0), "language") for _, n, o, _ in _chosen(manifest))
    if not any(map(needs_fisher, methods)):
        return {}
    found, problems = {}, []
    for expert in manifest.experts:
        if expert.fisher is None:
            problems.append(
                f"expert \"{expert.name}\" has no Fisher information, which method 'fisher' needs; "
                "give it `fisher`, a .safetensors file with the names and shapes of the base"
            )
            continue
        try:
            found[expert.name] = open_tensors(expert.fisher)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return found


def _calibration_problems(manifest: Manifest) -> list[str]:
    """Calibration data that are not named or not there."""
    from esm_stream.calibration.proxies import no_generic_texts
    from esm_stream.calibration.sources import kind_of_source

    without = [e.name for e in manifest.experts if manifest.calibration_of(e) is None]
    reason = no_generic_texts(manifest.base.model) if without else None
    problems = [
        f'expert "{name}" has no calibration data; give it `calibration`, or set [calibration] '
        f"data for all experts. The generic texts of esm-stream do not do here: {reason}"
        for name in without
        if reason
    ]
    for source in filter(None, map(manifest.calibration_of, manifest.experts)):
        try:
            kind_of_source(source)
        except InputError as error:
            problems += error.problems
    return list(dict.fromkeys(problems))


def _config_notes(base: Checkpoint, experts: Mapping[str, Checkpoint]) -> list[str]:
    """Differences between an expert's configuration and the base's, as notes."""
    notes = []
    for name, expert in experts.items():
        if not expert.config:
            continue
        keys = {*base.config, *expert.config} - VOLATILE_CONFIG
        other = sorted(k for k in keys if base.config.get(k) != expert.config.get(k))
        if other:
            notes.append(
                f'config.json of expert "{name}" differs from the base\'s in: {", ".join(other)}; '
                "its forward uses its own, the merged model gets the base's"
            )
    return notes


def _modality_of(base: Checkpoint) -> Modality:
    """Modality without building the model: vision models have an image size or patches."""
    return "vision" if {"image_size", "patch_size"} & set(base.config) else "language"


def _trace(
    manifest: Manifest, skeleton: "Skeleton", dtype: str
) -> "tuple[Trace, dict[str, torch.Tensor]]":
    """How the forward can be streamed, tried with a few tokens of a sample, then with all of it.

    Returns:
        trace: In the mode that fits, or that the manifest asks for.
        sample: The sample.

    Raises:
        UnsupportedModelError: It fails on both, or the manifest asks for another mode.
    """
    from esm_stream.calibration.trace import DUMMY_TOKENS, dummy_inputs, force_mode, trace_model

    found = _dummy_sample(manifest, dtype, DUMMY_TOKENS)
    few = dummy_inputs(skeleton.model) if found is None else found
    try:
        trace = trace_model(skeleton, few)
    except UnsupportedModelError:
        whole = None if found is None else _dummy_sample(manifest, dtype, None)
        if whole is None or _shapes(whole) == _shapes(few):
            raise
        trace = trace_model(skeleton, whole)
    mode, routes = manifest.run.forward, _routes(manifest)
    if mode != "auto":
        return force_mode(trace, mode), few
    if len(routes) > 1 and trace.mode != "resident":
        why = f"samples of several kinds ({', '.join(sorted(routes))}) take different ways"
        return replace(trace, mode="resident", why=why), few
    return trace, few


def _routes(manifest: Manifest) -> set[str]:
    """Ways that samples take through the model, as far as they can be told."""
    from esm_stream.calibration.proxies import routes_of

    sources = {source_of(manifest, expert) for expert in manifest.experts}
    return {route for path in sources for route in routes_of(path, manifest.calibration)}


def _shapes(sample: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Size]":
    return {name: value.shape for name, value in sample.items()}


def _dummy_sample(
    manifest: Manifest, dtype: str, most_tokens: int | None
) -> "dict[str, torch.Tensor] | None":
    """Inputs of the first expert's sample that is not text; None where all have texts alone."""
    from esm_stream.calibration.proxies import example_inputs

    sources = dict.fromkeys(source_of(manifest, expert) for expert in manifest.experts)
    made = (
        example_inputs(path, manifest.calibration, manifest.base.model, most_tokens)
        for path in sources
    )
    found = next((sample for sample in made if sample is not None), None)
    if found is None:
        return None
    floats = torch_dtype(dtype)
    return {k: v.to(floats) if v.is_floating_point() else v for k, v in found.items()}


def source_of(manifest: Manifest, expert: Expert) -> Path:
    """Calibration data of one expert: its own, the shared ones, or the generic texts."""
    from esm_stream.calibration.sources import GENERIC

    return manifest.calibration_of(expert) or GENERIC


def longest_sample(manifest: Manifest) -> int:
    """Most token ids that a sample of any expert can have; 0 if none has any."""
    from esm_stream.calibration.proxies import most_tokens

    sources = {source_of(manifest, expert) for expert in manifest.experts}
    return max(most_tokens(source, manifest.calibration) for source in sources)


def generic_notes(manifest: Manifest) -> list[str]:
    """Says which experts run on the texts that come with esm-stream."""
    without = [e.name for e in manifest.experts if manifest.calibration_of(e) is None]
    if not without:
        return []
    return [
        f"no calibration data are named for {', '.join(without)}: the generic texts that come "
        "with esm-stream are used"
    ]
