"""`esm-stream methods`: the merging methods, or one of them in full."""

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from esm_stream_cli.failing import clear_errors
from esm_stream_cli.plan import console

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

FACTS = {
    "source": "source",
    "data": "data besides the models",
    "passes": "passes over the experts",
    "memory": "holds at a time",
    "when": "when to use it",
}


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One method.", show_default=False)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what is known of the methods as JSON.")
    ] = False,
) -> None:
    """List the merging methods (data, passes, memory, when to use), or explain one."""
    with clear_errors():
        from esm_stream.methods import available, method_class

        names = available() if name is None else (name,)
        found = {each: method_class(each) for each in names}
        if as_json:
            import json

            typer.echo(json.dumps({each: _facts(of) for each, of in found.items()}, indent=2))
        elif name is None:
            _print_table(found)
        else:
            _print_method(name, found[name])


def _facts(method: Any) -> dict[str, Any]:  # noqa: ANN401 - a method's class
    from dataclasses import asdict

    return {
        **asdict(method.about),
        "definition": inspect.cleandoc(method.__doc__),
        "options": method.Options.model_json_schema().get("properties", {}),
    }


def _print_table(found: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(expand=False)
    for title in ("method", "what it does", "data", "passes", "memory", "when to use"):
        table.add_column(title, no_wrap=title == "method")
    for name, method in found.items():
        about = method.about
        table.add_row(name, about.summary, about.data, about.passes, about.memory, about.when)
    console().print(table)


def _print_method(name: str, method: Any) -> None:  # noqa: ANN401 - a method's class
    lines = [f"{name}: {method.about.summary}", "", inspect.cleandoc(method.__doc__), ""]
    lines += [f"{title}: {getattr(method.about, key)}" for key, title in FACTS.items()]
    fields = method.Options.model_fields
    lines += ["", "options:" if fields else "no options"]
    for key, field in fields.items():
        lines.append(f"  {field.alias or key} = {_default(field)}")
        lines.append(f"      {field.description}")
    typer.echo("\n".join(lines))


def _default(field: "FieldInfo") -> str:
    """A default as the manifest would have it."""
    import json

    value = field.get_default(call_default_factory=True)
    return "(none)" if value is None else json.dumps(value)
