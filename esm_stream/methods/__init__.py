"""The methods by name: registered once, made from a manifest's options."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Protocol, TypeGuard, get_args, get_origin

from pydantic import ValidationError

from esm_stream.errors import ManifestError
from esm_stream.methods.average import Average
from esm_stream.methods.breadcrumbs import Breadcrumbs
from esm_stream.methods.cart import Cart
from esm_stream.methods.consensus_ta import ConsensusTa
from esm_stream.methods.contract import ElementwiseMethod, SpectralMethod, SumMethod
from esm_stream.methods.core_space import CoreSpace
from esm_stream.methods.dare import Dare
from esm_stream.methods.dc_merge import DcMerge
from esm_stream.methods.della import Della
from esm_stream.methods.emr import Emr
from esm_stream.methods.esm import Esm
from esm_stream.methods.fisher import Fisher
from esm_stream.methods.iso_c import IsoC
from esm_stream.methods.iso_cts import IsoCts
from esm_stream.methods.karcher import Karcher
from esm_stream.methods.knots import Knots
from esm_stream.methods.linear import Linear
from esm_stream.methods.model_stock import ModelStock
from esm_stream.methods.multislerp import Multislerp
from esm_stream.methods.nuslerp import Nuslerp
from esm_stream.methods.owl import Owl
from esm_stream.methods.ram import Ram
from esm_stream.methods.regmean import RegMean
from esm_stream.methods.sce import Sce
from esm_stream.methods.slerp import Slerp
from esm_stream.methods.task_arithmetic import TaskArithmetic
from esm_stream.methods.ties import Ties
from esm_stream.methods.tsv_m import TsvM
from esm_stream.methods.wudi import Wudi, WudiClosed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

    from esm_stream.methods.contract import AnyMethod, FactorMethod, MethodOptions
    from esm_stream.methods.profiles import Modality

MethodClass = (
    type[ElementwiseMethod]
    | type[SpectralMethod]
    | type[SumMethod]
    | type[Esm]
    | type[RegMean]
    | type[TsvM]
)
METHODS: dict[str, MethodClass] = {
    method.name: method
    for method in (
        Average,
        Breadcrumbs,
        Cart,
        ConsensusTa,
        CoreSpace,
        Dare,
        DcMerge,
        Della,
        Emr,
        Esm,
        Fisher,
        IsoC,
        IsoCts,
        Karcher,
        Knots,
        Linear,
        ModelStock,
        Multislerp,
        Nuslerp,
        Owl,
        Ram,
        RegMean,
        Sce,
        Slerp,
        TaskArithmetic,
        Ties,
        TsvM,
        Wudi,
        WudiClosed,
    )
}


class Choice(Protocol):
    """A method by name with its options, as a plan keeps it."""

    @property
    def name(self) -> str:
        """One of `available()`."""

    @property
    def options(self) -> Mapping[str, object]:
        """Options as the manifest has them, lists over depth resolved."""

    @property
    def modality(self) -> Modality:
        """What the model reads."""


def available() -> tuple[str, ...]:
    """Names of all methods, in alphabetical order."""
    return tuple(sorted(METHODS))


def method_class(name: str) -> MethodClass:
    """The class of a method.

    Raises:
        ManifestError: There is no such method.
    """
    if name not in METHODS:
        raise ManifestError(f"unknown method '{name}'{_suggestion(name, available())}")
    return METHODS[name]


def options_model(name: str) -> type[MethodOptions]:
    """Model of the options of a method.

    Raises:
        ManifestError: There is no such method.
    """
    return method_class(name).Options


def create(name: str, options: Mapping[str, object], modality: Modality) -> AnyMethod:
    """A method, ready to merge.

    Args:
        name: One of `available()`.
        options: Options as the manifest has them, lists over depth resolved.
        modality: What the model reads; profiles differ by it.

    Raises:
        ManifestError: Unknown method or option, or a value out of range; all mistakes at once.
    """
    method = method_class(name)
    try:
        return method.create(method.Options.model_validate(dict(options)), modality)
    except ValidationError as error:
        lines = [_explain(name, method.Options, mistake) for mistake in error.errors()]
        raise ManifestError("\n".join(lines)) from error


def is_factor_method(method: AnyMethod) -> TypeGuard[FactorMethod]:
    """Whether a method merges one matrix at a time from thin factors."""
    return hasattr(method, "factor")


def merges_matrices(method: AnyMethod) -> bool:
    """Whether a method merges one matrix at a time, and nothing else."""
    return is_factor_method(method) or isinstance(method, SpectralMethod | SumMethod)


def uses_moments(method: AnyMethod) -> bool:
    """Whether a method looks at what the experts' layers see."""
    return (is_factor_method(method) or isinstance(method, SumMethod)) and method.uses_moments


def needs_fisher(method: AnyMethod) -> bool:
    """Whether a method weighs elements by Fisher information."""
    return isinstance(method, ElementwiseMethod) and method.needs_fisher


def method_of(choice: Choice) -> AnyMethod:
    """The method of a choice."""
    return create(choice.name, choice.options, choice.modality)


def factor_method(choice: Choice) -> FactorMethod:
    """The method of a choice that the plan has found to be a factor method."""
    method = create(choice.name, choice.options, choice.modality)
    assert is_factor_method(method)
    return method


def elementwise_method(choice: Choice) -> ElementwiseMethod:
    """The method of a choice that the plan has found to be an elementwise method."""
    method = create(choice.name, choice.options, choice.modality)
    assert isinstance(method, ElementwiseMethod)
    return method


def at_depth(name: str, options: Mapping[str, object], depth: float) -> dict[str, object]:
    """Options of one tensor: lists given for numbers are interpolated at its depth.

    Args:
        name: One of `available()`.
        options: Options as the manifest has them.
        depth: 0 in the first block, 1 in the last.
    """
    fields = options_model(name).model_fields
    numbers = {f.alias or key for key, f in fields.items() if _is_number(f)}
    return {
        key: interpolated(value, depth) if key in numbers else value
        for key, value in options.items()
    }


def interpolated(value: object, depth: float) -> object:
    """A list of numbers as anchors spread evenly over the depth; by expert in a dictionary."""
    if isinstance(value, dict):
        return {key: interpolated(inner, depth) for key, inner in value.items()}
    if not isinstance(value, list | tuple) or not value:
        return value
    if not all(isinstance(n, int | float) and not isinstance(n, bool) for n in value):
        return value
    position = depth * (len(value) - 1)
    low = min(int(position), len(value) - 1)
    high = min(low + 1, len(value) - 1)
    return value[low] + (position - low) * (value[high] - value[low])


def depths_of(options: Mapping[str, object]) -> list[float]:
    """Depths at which options over depth have an anchor: values between them lie between."""
    values = [v for o in options.values() for v in (o.values() if isinstance(o, dict) else [o])]
    counts = {len(value) for value in values if isinstance(value, list | tuple)}
    return sorted({0.0} | {i / (n - 1) for n in counts for i in range(n) if n > 1})


def _is_number(field: FieldInfo) -> bool:
    """Whether an option is a number, for all experts or by expert."""
    return _mentions(field.annotation, (int, float))


def _mentions(annotation: object, types: tuple[type, ...]) -> bool:
    if get_origin(annotation) in (tuple, list):
        return False
    inner = get_args(annotation)
    return annotation in types or any(_mentions(part, types) for part in inner)


def _explain(name: str, model: type[MethodOptions], mistake: ErrorDetails) -> str:
    """One line: the place, the rule and the value, or the key that was probably meant."""
    place = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        keys = [field.alias or key for key, field in model.model_fields.items()]
        return f"method '{name}': unknown option '{place}'{_suggestion(place, keys)}"
    rule = mistake["msg"][0].lower() + mistake["msg"][1:]
    return f"method '{name}': {place}: {rule}, got {mistake['input']!r}"


def _suggestion(word: str, known: Iterable[str]) -> str:
    """The closest known word, or all of them where none is close."""
    close = get_close_matches(word, list(known), n=1)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f"; known: {', '.join(sorted(known))}"
