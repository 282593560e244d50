"""README.md of the merged model: a model card with what a reader needs to repeat the merge."""

import json
from typing import Any

from esm_stream.planning.plan import Plan


def model_card(plan: Plan, report: dict[str, Any]) -> str:
    """The card as Markdown, with the metadata block that model hubs read."""
    lines = [
        "---",
        "tags:",
        "- merge",
        "- esm-stream",
        "---",
        f"# {plan.output.name}",
        "",
        f"Merged by esm-stream from {len(plan.experts)} experts of one base model.",
        "",
        "| | |",
        "|---|---|",
        f"| method | {report['method']} |",
        f"| options | `{json.dumps(report['options'], sort_keys=True)}` |",
        *([f"| all choices | `{json.dumps(report['choices'])}` |"] if report["choices"] else []),
        f"| alpha | {_alphas(plan)} |",
        *([f"| afterwards | `{json.dumps(report['post'])}` |"] if report["post"] else []),
        f"| versions | {', '.join(f'{n} {v}' for n, v in report['versions'].items())} |",
        f"| base | `{plan.base}` |",
        *(f"| expert {name} | `{root}` |" for name, root in plan.experts.items()),
        "",
        "## How the tensors were merged",
        "",
        "| treatment | tensors | alpha |",
        "|---|---|---|",
        *_treatments(report),
        "",
        *_calibration(report),
        "## Inputs",
        "",
        "| model | file | bytes | sha256 of the header |",
        "|---|---|---|---|",
        *_files("base", report["base"]),
        *(line for name, model in report["experts"].items() for line in _files(name, model)),
        "",
        "`report.json` has the figures of every matrix; `complete.json` the hash of every tensor.",
    ]
    if report["warnings"]:
        lines += ["", "## Warnings", "", *(f"- {line}" for line in report["warnings"])]
    return "\n".join(lines) + "\n"


def _alphas(plan: Plan) -> str:
    main = plan.manifest["merge"]["method"]
    tensors = plan.tensors.values()
    found = sorted({t.alpha for t in tensors if t.method is not None and t.method.name == main})
    return ", ".join(f"{alpha:g}" for alpha in found) or "-"


def _treatments(report: dict[str, Any]) -> list[str]:
    counts: dict[tuple[str, str], int] = {}
    for tensor in report["tensors"].values():
        alpha = "-" if tensor["treatment"] == "copy" else f"{tensor['alpha']:g}"
        key = (f"{tensor['method']} ({tensor['why']})", alpha)
        counts[key] = counts.get(key, 0) + 1
    return [f"| {what} | {count} | {alpha} |" for (what, alpha), count in counts.items()]


def _calibration(report: dict[str, Any]) -> list[str]:
    if not report["calibration"]:
        return []
    rows = [
        f"| {name} | `{c['source']}` | {len(c['samples'])} of {c['available']} | {c['tokens']} | "
        f"{len(c['truncated'])} |"
        for name, c in report["calibration"].items()
    ]
    return [
        "## Calibration",
        "",
        "| expert | data | samples | tokens | truncated |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]


def _files(name: str, model: dict[str, Any]) -> list[str]:
    return [
        f"| {name} | {file} | {entry['size']} | `{entry['header_sha256'][:16]}` |"
        for file, entry in model["files"].items()
    ]
