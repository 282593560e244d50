"""The methods by name: their options, and how to make one from a manifest.

Options and profiles are read without torch; a method's numerics are imported when one is made.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Protocol, TypeGuard, cast

from pydantic import BaseModel, ValidationError

from esm_stream.errors import ManifestError
from esm_stream.methods.options import AverageOptions, EsmOptions, TsvMOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from pydantic_core import ErrorDetails

    from esm_stream.methods.average import Average
    from esm_stream.methods.contract import ElementwiseMethod, FactorMethod
    from esm_stream.methods.esm import Esm
    from esm_stream.methods.profiles import Modality
    from esm_stream.methods.tsv_m import TsvM


def _esm(options: EsmOptions, modality: Modality) -> Esm:
    from esm_stream.methods.esm import Esm

    return Esm(options, options.resolve(modality))


def _tsv_m(options: TsvMOptions, modality: Modality) -> TsvM:  # noqa: ARG001
    from esm_stream.methods.tsv_m import TsvM

    return TsvM(options)


def _average(options: AverageOptions, modality: Modality) -> Average:  # noqa: ARG001
    from esm_stream.methods.average import Average

    return Average()


class Choice(Protocol):
    """A method by name with its options, as a plan keeps it."""

    @property
    def name(self) -> str:
        """One of `available()`."""

    @property
    def options(self) -> Mapping[str, object]:
        """Options as the manifest has them."""

    @property
    def modality(self) -> Modality:
        """What the model reads."""


_Entry = tuple[type[BaseModel], "Callable[..., ElementwiseMethod | FactorMethod]"]
_METHODS: dict[str, _Entry] = {
    "average": (AverageOptions, _average),
    "esm": (EsmOptions, _esm),
    "tsv_m": (TsvMOptions, _tsv_m),
}


def available() -> tuple[str, ...]:
    """Names of all methods, in alphabetical order."""
    return tuple(sorted(_METHODS))


def options_model(name: str) -> type[BaseModel]:
    """Model of the options of a method.

    Raises:
        ManifestError: There is no such method.
    """
    return _entry(name)[0]


def create(
    name: str, options: Mapping[str, object], modality: Modality
) -> ElementwiseMethod | FactorMethod:
    """A method, ready to merge.

    Args:
        name: One of `available()`.
        options: Options as the manifest has them.
        modality: What the model reads; profiles differ by it.

    Raises:
        ManifestError: Unknown method or option, or a value out of range; all mistakes at once.
    """
    model, build = _entry(name)
    try:
        return build(model.model_validate(dict(options)), modality)
    except ValidationError as error:
        lines = [_explain(name, model, mistake) for mistake in error.errors()]
        raise ManifestError("\n".join(lines)) from error


def is_factor_method(
    method: ElementwiseMethod | FactorMethod,
) -> TypeGuard[FactorMethod]:
    """Whether a method merges one matrix at a time from thin factors."""
    return hasattr(method, "factor")


def factor_method(choice: Choice) -> FactorMethod:
    """The method of a choice that the plan has found to be a factor method."""
    method = create(choice.name, choice.options, choice.modality)
    assert is_factor_method(method)
    return method


def elementwise_method(choice: Choice) -> ElementwiseMethod:
    """The method of a choice that the plan has found to be an elementwise method."""
    method = create(choice.name, choice.options, choice.modality)
    assert not is_factor_method(method)
    return cast("ElementwiseMethod", method)


def _entry(name: str) -> _Entry:
    if name not in _METHODS:
        raise ManifestError(f"unknown method '{name}'{_suggestion(name, available())}")
    return _METHODS[name]


def _explain(name: str, model: type[BaseModel], mistake: ErrorDetails) -> str:
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
