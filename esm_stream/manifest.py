"""The manifest: what to merge, how, and where to; read from TOML, checked once, then frozen.

From:  a manifest.toml written by a person.
To:    plan.py.

Every mistake is answered with its place, the rule and the value; all of them at once. Relative
paths are relative to the manifest. Size strings are checked here and kept as bytes.
"""

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    PrivateAttr,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic_core import ErrorDetails

from esm_stream.budget import parse_size
from esm_stream.checkpoints.names import Kind, compile_pattern
from esm_stream.errors import ManifestError


def _size(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a size is a number of bytes or a text such as '8GiB'")
    if not isinstance(value, str | int):
        return value
    try:
        return parse_size(value)
    except ManifestError as error:
        raise ValueError(str(error)) from error


def _pattern(value: object) -> object:
    if isinstance(value, str):
        try:
            compile_pattern(value)
        except ManifestError as error:
            raise ValueError(str(error)) from error
    return value


SIZE_SCHEMA: JsonDict = {
    "anyOf": [
        {"type": "integer", "exclusiveMinimum": 0},
        {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*[A-Za-z]*\s*$"},
    ]
}
Size = Annotated[int, BeforeValidator(_size), Field(gt=0), WithJsonSchema(SIZE_SCHEMA)]
Pattern = Annotated[str, BeforeValidator(_pattern), Field(min_length=1)]
FloatType = Literal["float32", "bfloat16", "float16"]
# One number, or anchors spread evenly from the first block to the last.
Graded = float | Annotated[tuple[float, ...], Field(min_length=1)]


class Section(BaseModel):
    """A frozen part of the manifest; keys it does not know are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Base(Section):
    """The model all experts were fine-tuned from."""

    model: Path = Field(description="Directory of the base model (config.json and safetensors).")
    skip: tuple[Pattern, ...] = Field(
        default=(),
        description="Tensors that are not merged and not compared with the experts: the merged "
        "model gets the base's. Globs, or 're:' and a regular expression.",
    )


class Expert(Section):
    """One fine-tuned model."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
        description="Short name, unique; letters, digits, '.', '_' and '-'.",
    )
    model: Path = Field(description="Directory of the expert (config.json and safetensors).")
    calibration: Path | None = Field(
        default=None,
        description="Unlabelled samples of the expert's task; the default is [calibration].data.",
    )
    fisher: Path | None = Field(
        default=None,
        description="Fisher information of the expert's weights, for method 'fisher': a "
        ".safetensors file or a directory of such.",
    )


class Calibration(Section):
    """Which inputs show what the experts' matrices see."""

    data: Path | None = Field(
        default=None, description="Samples for every expert that names none of its own."
    )
    samples: PositiveInt = Field(default=32, description="Samples drawn per expert.")
    min_samples: PositiveInt = Field(
        default=4,
        description="Fewest samples of an expert; between this and 'samples' all are used.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the draw.")
    max_length: PositiveInt = Field(
        default=512, description="Tokens kept of each text; longer texts are cut and reported."
    )
    max_seconds: float = Field(
        default=30.0, gt=0, description="Seconds kept of each sound; longer ones are cut."
    )
    text_key: str = Field(default="text", description="Key of the text in each line of a .jsonl.")
    messages_key: str = Field(
        default="messages", description="Key of a conversation in a line of a .jsonl."
    )
    prompt_key: str = Field(default="prompt", description="Key of a prompt in a line of a .jsonl.")
    response_key: str = Field(
        default="response", description="Key of the response to a prompt in a line of a .jsonl."
    )
    image_path_key: str = Field(
        default="image", description="Key of the image file, or of several, in a line of a .jsonl."
    )
    audio_path_key: str = Field(
        default="audio", description="Key of the sound file in a line of a .jsonl."
    )
    image_key: str = Field(
        default="images", description="Array of the images in an .npz that holds several."
    )
    dtype: Literal["base"] | FloatType = Field(
        default="base",
        description="Arithmetic of the forward pass: 'base' is the dtype of the base's weights.",
    )


class Rule(Section):
    """Another treatment for the tensors whose names, or parts in a block, match."""

    tensors: Pattern = Field(
        default="*", description="A glob, or 're:' and a regular expression matching whole names."
    )
    kinds: tuple[Kind, ...] = Field(
        default=(), description="Parts in a block that the rule is for; none means all tensors."
    )
    method: str | None = Field(
        default=None,
        description="A method, 'base' to copy the base's tensors, or 'expert' to copy those of "
        "the expert named by `expert`.",
    )
    expert: str | None = Field(
        default=None, description="The expert whose tensors method 'expert' copies."
    )
    alpha: Graded | None = Field(default=None, description="Coefficient of the merged update.")
    weights: dict[str, Graded] = Field(
        default_factory=dict, description="Weights of experts, instead of those of [merge]."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the method.")

    @property
    def place(self) -> str:
        """What the rule is for, as messages name it."""
        kinds = f" of kind {', '.join(self.kinds)}" if self.kinds else ""
        return f"rule '{self.tensors}'{kinds}"


class Split(Section):
    """A stored tensor that holds several matrices, each to be merged on its own."""

    tensors: Pattern = Field(description="Names of the tensors.")
    parts: tuple[PositiveInt, ...] = Field(
        min_length=2, description="Shares of the outputs, in their order: [4, 1, 1]."
    )
    groups: PositiveInt = Field(
        default=1,
        description="How often the parts take turns: the number of heads where q, k and v of each "
        "head lie together.",
    )


class Lines(Section):
    """LiNeS: a factor a + b * depth, from a in the first block to a + b in the last."""

    a: float | None = Field(
        default=None,
        ge=0,
        description="Factor of the first block and of what is outside the blocks; without it the "
        "one that gives the merged update the magnitude of the mean of the experts' updates.",
    )
    b: float = Field(default=0.5, description="What the factor gains up to the last block.")


class Post(Section):
    """What is done to merged updates afterwards, whatever method merged them."""

    svc: float | None = Field(
        default=None,
        gt=0,
        description="Singular value calibration of the matrices in the blocks: lower bound of the "
        "projections; 1 only scales down what experts have in common.",
    )
    layers: float | None = Field(
        default=None,
        gt=0,
        description="Layer scaling of the matrices in the blocks: (norm / mean norm of the "
        "matrices of one role)^layers.",
    )
    lines: Lines | None = Field(
        default=None, description="Scaling by depth; alpha is 1 where none is given."
    )
    alpha: float = Field(
        default=1.0, description="Coefficient of everything merged, averages included."
    )


class Merge(Section):
    """Method, its options, and exceptions by tensor."""

    method: str = Field(default="esm", description="Name of the merging method.")
    alpha: Graded | Literal["default"] = Field(
        default="default",
        description="Coefficient of the merged update, one number or anchors from the first block "
        "to the last; 'default' is the method's own choice.",
    )
    weights: dict[str, Graded] = Field(
        default_factory=dict,
        description="Weights of experts by name, numbers or anchors from the first block to the "
        "last; experts that are not named have 1.",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the method.")
    post: Post = Field(default=Post(), description="What is done to merged updates afterwards.")
    fuse: tuple[tuple[Pattern, ...], ...] = Field(
        default=(),
        description="Tensors of one module that form one matrix together: one pattern for each, "
        "in the order of the matrix's outputs.",
    )
    split: tuple[Split, ...] = Field(
        default=(), description="Tensors of which parts are matrices of their own."
    )
    rules: tuple[Rule, ...] = Field(default=(), description="Exceptions; the first match wins.")


class Output(Section):
    """The merged model."""

    path: Path = Field(description="Directory of the merged model; must not hold another model.")
    dtype: Literal["base"] | FloatType = Field(
        default="base", description="'base' keeps the dtype of each of the base's tensors."
    )
    layers: tuple[tuple[int, int], ...] = Field(
        default=(),
        description="Layers of the merged model, as ranges [first, end] of the inputs' layers, one "
        "after the other; none means all as they are.",
    )
    shard_size: Literal["base"] | Size = Field(
        default="base", description="'base' keeps the base's files; or the largest file, '2GiB'."
    )


class Run(Section):
    """How the machine is used; nothing here changes the merged numbers' definition."""

    work: Path | None = Field(
        default=None, description="Work directory; the default is the output path plus '.work'."
    )
    memory: Size = Field(
        default=8 << 30, description="Memory that the tasks in flight may use together."
    )
    device: str = Field(
        default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="'cpu', 'cuda' or 'cuda:N'."
    )
    forward: Literal["auto", "chain", "replay", "resident"] = Field(
        default="auto",
        description="How the forward is streamed; 'auto' is the first that fits the model.",
    )
    keep: Literal["all", "updates", "nothing"] = Field(
        default="all",
        description="What stays in the work directory when it has been used: 'all' for any other "
        "merge, 'updates' for another alpha, or 'nothing'.",
    )
    parallel: PositiveInt = Field(
        default=1, description="Tasks at once in one process; each gets its share of the cores."
    )
    threads: PositiveInt | None = Field(
        default=None,
        description="Threads of each task, instead of its share of the cores when the work "
        "directory was begun; then 'parallel' moves no bit.",
    )


class Manifest(Section):
    """One merge, from base and experts to the output directory."""

    base: Base
    experts: Annotated[tuple[Expert, ...], Field(min_length=2)]
    calibration: Calibration = Calibration()
    merge: Merge = Merge()
    output: Output
    run: Run = Run()
    _source: Path | None = PrivateAttr(default=None)

    @property
    def source(self) -> Path | None:
        """The file this manifest was read from."""
        return self._source

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [expert.name for expert in self.experts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"experts: two experts have the name {twice[0]!r}; names are unique")
        return self

    @property
    def work(self) -> Path:
        """Work directory of this merge."""
        return self.run.work or self.output.path.with_name(self.output.path.name + ".work")

    def calibration_of(self, expert: Expert) -> Path | None:
        """Samples of one expert: its own, or the shared ones."""
        return expert.calibration or self.calibration.data


def load_manifest(path: Path) -> Manifest:
    """Read and check a manifest; paths in the result are absolute.

    Raises:
        ManifestError: The file cannot be read or any value breaks a rule; one line per mistake.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ManifestError(f"{path}: there is no such manifest") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: cannot be read: {error}") from error
    except ValueError as error:  # also of numbers with thousands of digits
        raise ManifestError(f"{path}: not valid TOML: {error}") from error
    except RecursionError:
        raise ManifestError(f"{path}: not valid TOML: nested too deep") from None
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        lines = [f"{path}: {_explain(detail, document)}" for detail in _own_mistakes(error)]
        raise ManifestError("\n".join(lines)) from error
    resolved = _resolve(manifest, path.absolute().parent)
    resolved._source = path.absolute()
    return resolved


def manifest_schema() -> dict[str, Any]:
    """JSON schema of the manifest, with the options of every method under merge.options."""
    from esm_stream.methods import available, options_model

    document = Manifest.model_json_schema()
    models = {name: options_model(name).model_json_schema() for name in available()}
    for section in ("Merge", "Rule"):
        options = document["$defs"][section]["properties"]["options"]
        options["anyOf"] = [{"$ref": f"#/$defs/options_{name}"} for name in models]
        options.pop("additionalProperties", None)
        document["$defs"][section]["properties"]["options"] = options
    for name, model in models.items():
        document["$defs"] |= model.pop("$defs", {})
        document["$defs"][f"options_{name}"] = model
    return document


def _resolve(manifest: Manifest, root: Path) -> Manifest:
    """Make every path absolute, relative ones from the folder of the manifest."""

    def under(path: Path | None) -> Path | None:
        return None if path is None else Path(root, path.expanduser())

    experts = tuple(
        expert.model_copy(
            update={
                "model": under(expert.model),
                "calibration": under(expert.calibration),
                "fisher": under(expert.fisher),
            }
        )
        for expert in manifest.experts
    )
    return manifest.model_copy(
        update={
            "base": manifest.base.model_copy(update={"model": under(manifest.base.model)}),
            "experts": experts,
            "calibration": manifest.calibration.model_copy(
                update={"data": under(manifest.calibration.data)}
            ),
            "output": manifest.output.model_copy(update={"path": under(manifest.output.path)}),
            "run": manifest.run.model_copy(update={"work": under(manifest.run.work)}),
        }
    )


def _own_mistakes(error: ValidationError) -> list[ErrorDetails]:
    """Mistakes without those that only follow from another: an expert in error does not count."""
    details = error.errors()
    inside_experts = any(len(d["loc"]) > 1 and d["loc"][0] == "experts" for d in details)
    return [d for d in details if not (inside_experts and d["type"] == "too_short")]


def _explain(detail: ErrorDetails, document: dict[str, Any]) -> str:
    """One validation error as: place, rule, value, and a suggestion for a mistyped key."""
    place, found = _place(detail["loc"], document), detail.get("input")
    if detail["type"] == "extra_forbidden":
        key = str(detail["loc"][-1])
        known = _known_keys(detail["loc"][:-1])
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
        outer = _place(detail["loc"][:-1], document)
        return f"{outer + ': ' if outer else ''}unknown key '{key}' ({hint})"
    if detail["type"] == "missing":
        return f"{place}: missing; it is required"
    message = detail["msg"].removeprefix("Value error, ")
    if not place:
        return message
    shown = "" if isinstance(found, dict | list | tuple) else f", got {found!r}"
    return f"{place}: {message}{shown}"


# What pydantic calls the branches of a union in a location.
_UNION_BRANCHES = ("literal", "function", "constrained", "float", "int", "str")


def _place(loc: Sequence[int | str], document: dict[str, Any]) -> str:
    """A location as written in the manifest, experts by name: experts[1] "math": model."""
    text, here = "", document
    for step in loc:
        known = isinstance(here, dict) and step in here
        if text and not known and isinstance(step, str) and step.startswith(_UNION_BRANCHES):
            continue
        here = _step(here, step)
        if isinstance(step, int):
            name = here.get("name") if isinstance(here, dict) else None
            text += f"[{step}]" + (f' "{name}":' if isinstance(name, str) else "")
        else:
            text += ("" if not text else " " if text.endswith(":") else ".") + str(step)
    return text.removesuffix(":")


def _step(here: Any, step: int | str) -> Any:  # noqa: ANN401 - a parsed TOML value is any type
    if isinstance(here, dict):
        return here.get(step)
    if isinstance(here, list) and isinstance(step, int) and step < len(here):
        return here[step]
    return None


def _known_keys(loc: Sequence[int | str]) -> list[str]:
    """Keys of the section at a location."""
    sections: dict[str, type[Section]] = {
        "base": Base,
        "experts": Expert,
        "calibration": Calibration,
        "merge": Merge,
        "output": Output,
        "run": Run,
    }
    if not loc:
        return list(Manifest.model_fields)
    nested: dict[int | str, type[Section]] = {
        "rules": Rule,
        "split": Split,
        "lines": Lines,
        "post": Post,
    }
    section = next((nested[step] for step in loc if step in nested), sections[str(loc[0])])
    return list(section.model_fields)
