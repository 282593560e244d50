"""From a mergekit configuration to a manifest, or to the list of what a manifest cannot express.

From:  the YAML that `mergekit-yaml` reads (facts of version 0.1.5).
To:    TOML text for `esm-stream merge`.

A value of mergekit is a number, a list over depth, or a list of {filter, value}: filters are parts
of tensor names, and the first that occurs in a name decides. Lists over depth mean the same here;
filters become rules.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from esm_stream.errors import ManifestError

Parameters = Mapping[str, Any]
_TOP = {
    *("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template", "modules"),
}
_DTYPES = ("float32", "bfloat16", "float16")
_IGNORED = {"int8_mask"}
_BEFORE_LAYERS = "re:.*(embed|wte|wpe).*"


@dataclass(frozen=True)
class _Method:
    """How one method of mergekit is written here.

    Attributes:
        name: Our method.
        options: Options that give mergekit's definition.
        shared: Parameters of the whole merge, by their name there: our option and its default.
        by_expert: Parameters of each model: our option and its default.
        weighted: Whether models have weights.
        needs_base: Whether the base is not merged itself.
        alpha: The parameter that is our alpha.
    """

    name: str
    options: Parameters = field(default_factory=dict)
    shared: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    by_expert: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    weighted: bool = True
    needs_base: bool = True
    alpha: str = ""


def _sparse(
    name: str,
    options: Parameters,
    *,
    normalize: bool = False,
    rescale: bool = False,
    **by_expert: float,
) -> _Method:
    """Methods that make updates sparse and add them."""
    shared: dict[str, tuple[str, Any]] = {"normalize": ("normalize", normalize)}
    if rescale:
        shared["rescale"] = ("rescale", True)
    own = {"density": 1.0, **by_expert}
    return _Method(
        name, options, shared, {key: (key, value) for key, value in own.items()}, alpha="lambda"
    )


_ALL: Final = {"signs": "all"}
_ELECTED: Final = {"signs": "elected"}
_METHODS: dict[str, _Method] = {
    "linear": _Method("linear", shared={"normalize": ("normalize", True)}, needs_base=False),
    "task_arithmetic": _Method(
        "task_arithmetic", shared={"normalize": ("normalize", False)}, alpha="lambda"
    ),
    "ties": _sparse("ties", {"trim": "tensor"}, normalize=True),
    "dare_linear": _sparse("dare", _ALL, rescale=True),
    "dare_ties": _sparse("dare", _ELECTED, rescale=True),
    "breadcrumbs": _sparse("breadcrumbs", _ALL, gamma=0.01),
    "breadcrumbs_ties": _sparse("breadcrumbs", _ELECTED, gamma=0.01),
    "della": _sparse("della", _ELECTED, normalize=True, rescale=True, epsilon=0.15),
    "della_linear": _sparse("della", _ALL, rescale=True, epsilon=0.15),
    "sce": _Method("sce", shared={"select_topk": ("select_topk", 1.0)}, weighted=False),
    "ram": _Method("ram", shared={"epsilon": ("epsilon", 1e-5)}, weighted=False),
    "ramplus_tl": _Method(
        "ram",
        shared={"r": ("gain", 0.1), "alpha": ("gain_limit", 0.2), "epsilon": ("epsilon", 1e-5)},
        weighted=False,
    ),
    "model_stock": _Method(
        "model_stock", shared={"filter_wise": ("filter_wise", False)}, weighted=False
    ),
    "nuslerp": _Method("nuslerp"),
    "multislerp": _Method("multislerp", shared={"normalize_weights": ("normalize", True)}),
    "slerp": _Method("slerp", shared={"t": ("t", None)}, weighted=False, needs_base=False),
    "karcher": _Method(
        "karcher",
        shared={"max_iter": ("max_iter", 10), "tol": ("tolerance", 1e-5)},
        weighted=False,
        needs_base=False,
    ),
    "passthrough": _Method("passthrough", weighted=False, needs_base=False),
}


@dataclass(frozen=True)
class _Slice:
    """Layers of the output that are merged alike: their models and parameters, in order.

    `layers` are those of the models; `first` is the number of the first of them in the output.
    """

    models: tuple[tuple[str, Parameters], ...]
    parameters: Parameters
    layers: tuple[int, int] | None
    first: int = 0


def manifest_of(document: Mapping[str, Any], output: str = "merged") -> str:
    """The manifest that does what a mergekit configuration says, as TOML.

    Args:
        document: The configuration as YAML gives it.
        output: Directory of the merged model.

    Raises:
        ManifestError: Everything that a manifest cannot express, one item per line.
    """
    if not isinstance(document, Mapping):
        raise ManifestError("not a configuration of mergekit: expected keys and values")
    return _Import(document, output).text()


@dataclass(frozen=True)
class _Rule:
    """Tensors by pattern, and what a manifest says of them."""

    tensors: str
    treatment: Parameters


class _Import:
    """One conversion; `problems` collects what cannot be expressed."""

    def __init__(self, document: Mapping[str, Any], output: str) -> None:
        self.document = document
        self.output = output
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.base = str(document.get("base_model") or "")
        name = str(document.get("merge_method", ""))
        if name not in _METHODS:
            known = ", ".join(sorted(_METHODS))
            raise ManifestError(f"merge_method '{name}' has no counterpart; known: {known}")
        self.method = _METHODS[name]
        self.slices = self._slices()
        self._check_rest()
        self.experts = self._experts()

    def text(self) -> str:
        """The manifest, or the problems."""
        body = list(self._body()) if self.slices and self.experts else []
        if self.problems:
            lines = "\n  ".join(dict.fromkeys(self.problems))
            raise ManifestError(f"this configuration cannot be expressed:\n  {lines}")
        return "\n".join([*(f"# {note}" for note in self.notes), *body]) + "\n"

    # What there is ---------------------------------------------------------------------------

    def _slices(self) -> list[_Slice]:
        document = self.document
        if document.get("modules"):
            self.problems.append("modules: models of several parts")
            return []
        if document.get("models"):
            models = tuple(
                (str(entry["model"]), entry.get("parameters") or {}) for entry in document["models"]
            )
            return [_Slice(models, {}, None)]
        found: list[_Slice] = []
        first = 0
        for entry in document.get("slices") or ():
            sources = entry["sources"]
            ranges = [tuple(source["layer_range"]) for source in sources]
            if entry.get("base_model") not in (None, document.get("base_model")):
                self.problems.append("slices: a base_model of its own")
            if len(set(ranges)) > 1:
                self.problems.append(f"slices: layers {ranges} of different places as one")
            models = tuple((str(s["model"]), s.get("parameters") or {}) for s in sources)
            start, stop = ranges[0]
            found.append(_Slice(models, entry.get("parameters") or {}, (start, stop), first))
            first += stop - start
        if not found:
            self.problems.append("neither models nor slices")
        return found

    def _check_rest(self) -> None:
        document = self.document
        for key in sorted(set(document) - _TOP):
            self.problems.append(f"{key}: unknown key")
        if document.get("tokenizer_source") not in (None, "base"):
            self.problems.append("tokenizer_source: vocabularies are not changed, only 'base'")
        for key in ("tokenizer", "chat_template"):
            if document.get(key) is not None:
                self.problems.append(f"{key}: the base's tokenizer is copied as it is")
        for key in ("dtype", "out_dtype"):
            if document.get(key) not in (None, *_DTYPES):
                self.problems.append(f"{key}: '{document[key]}', expected {', '.join(_DTYPES)}")
        if document.get("dtype") in ("bfloat16", "float16"):
            self.notes.append(f"mergekit computes in {document['dtype']}; here it is float32")

    def _experts(self) -> dict[str, str]:
        """Path of every model that is merged -> a short unique name, base excluded if it is one."""
        paths = dict.fromkeys(path for s in self.slices for path, _ in s.models)
        if self.method.name == "slerp" and self.base in paths:
            # There the base is at t = 0; here the first expert is.
            paths = {self.base: None, **paths}
        elif self.method.needs_base:
            paths.pop(self.base, None)
        elif self.base and self.method.name != "passthrough":
            # A base that is named but not listed is merged there too.
            paths.setdefault(self.base)
        if self.method.needs_base and not self.base:
            self.problems.append("base_model: missing, and updates need one")
        names: dict[str, str] = {}
        for path in paths:
            model, _, adapter = path.partition("+")
            if adapter and (model != self.base or "+" in adapter):
                self.problems.append(
                    f"model '{path}': adapters of another model than base_model, or several; merge "
                    "them into their base first"
                )
            stem = re.sub(r"[^A-Za-z0-9._-]", "-", Path(adapter or model).name).lstrip("._-")
            stem = stem or "expert"
            name, number = stem, 2
            while name in names.values():
                name, number = f"{stem}-{number}", number + 1
            names[path] = name
        if len(names) < 2:
            self.problems.append(f"{len(names)} models to merge; a manifest has two or more")
        return names

    # What is written -------------------------------------------------------------------------

    def _body(self) -> Iterator[str]:
        base = self.base or next(iter(self.experts))
        yield f"[base]\nmodel = {_toml(base)}\n"
        for path, name in self.experts.items():
            model = path.rpartition("+")[2]
            yield f"[[experts]]\nname = {_toml(name)}\nmodel = {_toml(model)}\n"
        rules = [rule for part in self.slices for rule in self._rules(part)]
        if len(self.slices) > 1:
            # What precedes the layers follows the first slice, all the rest the last.
            first = rules[len(self._filters(self.slices[0]))]
            rules.insert(0, _Rule(_BEFORE_LAYERS, first.treatment))
            rules[-1] = _Rule("*", rules[-1].treatment)
        main: Parameters = {"method": "average"}
        if self.method.name != "passthrough":
            main = rules.pop().treatment
        yield "[merge]\n" + "\n".join(_lines(main))
        for rule in rules:
            lines = [f"tensors = {_toml(rule.tensors)}", *_lines(rule.treatment)]
            yield "\n[[merge.rules]]\n" + "\n".join(lines)
        yield f"\n[output]\npath = {_toml(self.output)}"
        ranges = [list(part.layers) for part in self.slices if part.layers]
        if ranges:
            yield f"layers = {_toml(ranges)}"
        dtype = self.document.get("out_dtype") or self.document.get("dtype")
        if dtype:
            yield f"dtype = {_toml(dtype)}"

    def _rules(self, part: _Slice) -> "list[_Rule]":
        """Treatments of the tensors of one slice, those of filters first, the general one last."""
        if self.method.name == "passthrough":
            return [self._copied(part)]
        return [
            _Rule(self._pattern(part, text), self._treat(part, text))
            for text in (*self._filters(part), "")
        ]

    def _copied(self, part: _Slice) -> "_Rule":
        """The rule that copies a slice from its one model."""
        if len(part.models) != 1:
            self.problems.append("passthrough: several models in one slice")
        if any(parameters.get("scale") is not None for _, parameters in part.models):
            self.problems.append("passthrough: scale")
        name = self.experts[part.models[0][0]]
        return _Rule(self._pattern(part, ""), {"method": "expert", "expert": name})

    def _filters(self, part: _Slice) -> tuple[str, ...]:
        """Filters of all parameters of a slice, which have to be the same for all that have any."""
        found: set[tuple[str, ...]] = set()
        for source in (*(p for _, p in part.models), part.parameters, self._shared()):
            for name, value in source.items():
                if name not in _IGNORED and _is_conditional(value):
                    texts = tuple(str(c.get("filter") or "*") for c in _conditions(value))
                    found.add(tuple(text for text in texts if text != "*"))
        if len(found) > 1:
            self.problems.append(
                "filters that differ between parameters: "
                + "; ".join(", ".join(texts) for texts in sorted(found))
            )
        return next(iter(found), ())

    def _shared(self) -> Parameters:
        shared: Parameters = self.document.get("parameters") or {}
        return shared

    def _pattern(self, part: _Slice, text: str) -> str:
        if part.layers is None or len(self.slices) == 1:
            return f"*{text}*" if text else "*"
        count = part.layers[1] - part.layers[0]
        layers = "|".join(map(str, range(part.first, part.first + count)))
        ahead = f"(?=.*{re.escape(text)})" if text else ""
        return rf"re:{ahead}([^0-9]*\.)?({layers})\..*"

    def _treat(self, part: _Slice, text: str) -> dict[str, Any]:
        """Method, options, weights and alpha of the tensors that a filter is for."""
        method = self.method
        options = dict(method.options)
        known = {*method.shared, *method.by_expert, *_IGNORED, method.alpha}
        known |= {"weight", "density"} if method.weighted else set()
        for name, (option, default) in method.shared.items():
            value = self._value(part, name, text, default)
            if value is None:
                self.problems.append(f"parameters: {name} is missing")
            options[option] = value
        if "rescale" in options:
            options["rescale"] = "l1" if options["rescale"] else "none"
        for name, (option, default) in method.by_expert.items():
            options[option] = self._by_expert(part, name, text, default)
        treatment: dict[str, Any] = {"method": method.name}
        alpha = self._value(part, method.alpha, text, 1.0) if method.alpha else 1.0
        treatment["alpha"] = alpha
        if method.weighted:
            treatment["weights"] = self._weights(part, text)
        treatment["options"] = options
        for source in (*(p for _, p in part.models), part.parameters, self._shared()):
            for name in sorted(set(source) - known):
                self.problems.append(f"parameters: '{name}' of {self.document['merge_method']}")
        return treatment

    def _weights(self, part: _Slice, text: str) -> dict[str, Any]:
        found = self._each(part, "weight", text, None)
        if any(value is None for value in found.values()):
            self.problems.append("parameters: weight is missing for a model")
        return found

    def _by_expert(self, part: _Slice, name: str, text: str, default: object) -> object:
        """One value if all experts have the same, else one by expert."""
        found = self._each(part, name, text, default)
        values = list(found.values())
        return values[0] if all(value == values[0] for value in values) else found

    def _each(self, part: _Slice, name: str, text: str, default: object) -> dict[str, Any]:
        """A parameter of every expert: its own, the slice's, the merge's, or the default."""
        own = dict(part.models)
        return {
            expert: self._value(part, name, text, default, own.get(path, {}))
            for path, expert in self.experts.items()
        }

    def _value(
        self,
        part: _Slice,
        name: str,
        text: str,
        default: object,
        own: Parameters | None = None,
    ) -> Any:  # noqa: ANN401
        for source in (own or {}, part.parameters, self._shared()):
            if name in source:
                found = _resolve(source[name], lambda condition: condition in (None, "*", text))
                if isinstance(found, list) and len(self.slices) > 1:
                    self.problems.append(
                        f"parameters: {name} over the depth of one of several slices"
                    )
                if found is not None:
                    return found
        return default


def _is_conditional(value: object) -> bool:
    return isinstance(value, Mapping) or (
        isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
    )


def _conditions(value: Any) -> Sequence[Mapping[str, Any]]:  # noqa: ANN401
    return [value] if isinstance(value, Mapping) else value


def _resolve(value: Any, holds: Callable[[Any], bool]) -> Any:  # noqa: ANN401
    """A parameter where the conditions are known: the first that holds decides."""
    if not _is_conditional(value):
        return value
    return next((c["value"] for c in _conditions(value) if holds(c.get("filter"))), None)


def _lines(treatment: Mapping[str, Any]) -> Iterator[str]:
    """Keys of [merge] or of a rule; empty tables are left out."""
    for key, value in treatment.items():
        if value not in ({}, None):
            yield f"{key} = {_toml(value)}"


def _toml(value: Any) -> str:  # noqa: ANN401
    """A value as TOML, tables inline."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_toml(str(key))} = {_toml(v)}" for key, v in value.items())
        return f"{{ {inner} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)
