"""Folders are the stages of the data flow, and imports point one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "esm_stream"
ANYONE_MAY = {"errors", "__init__"}
MAY_IMPORT = {
    "subspace": set(),
    "scaling": set(),
    "budget": {"subspace"},
    "events": set(),
    "allocation": set(),
    "stopping": set(),
    "errors": set(),
    "demo": {"store"},
    "mergekit": set(),
    "checkpoints": set(),
    "methods": {"subspace", "scaling"},
    "store": {"checkpoints", "methods", "subspace"},
    "write": {"checkpoints", "store"},
    "calibration": {"methods", "store", "manifest", "subspace"},
    "manifest": {"budget", "checkpoints", "methods"},
    "planning": {
        *("allocation", "budget", "calibration", "checkpoints", "manifest", "methods", "store"),
        *("scaling", "write"),
    },
    "report": {"checkpoints", "methods", "planning", "store"},
    "stages": {
        *("budget", "calibration", "checkpoints", "manifest", "methods", "planning", "report"),
        *("scaling", "stopping", "store", "subspace", "write"),
    },
    "completion": {"planning", "stages", "store"},
    "clean": {"completion", "planning", "store"},
    "space": {"budget", "completion", "planning", "stages", "write"},
    "verify": {"checkpoints", "completion", "planning", "stages", "store", "write"},
    "same_inputs": {"checkpoints", "planning", "stages", "store"},
    "schedule": {"allocation", "completion", "planning", "space", "stages", "stopping"},
    "engine": {
        *("checkpoints", "completion", "events", "planning", "same_inputs", "schedule"),
        *("space", "stages", "stopping", "store", "verify", "write"),
    },
}


def part_of(path: Path) -> str:
    """Folder or file of the library that a module belongs to: "subspace", "engine"."""
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Parts of the library that a module imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            steps = name.split(".")
            if steps[0] == "esm_stream" and len(steps) > 1:
                found.add(steps[1])
            assert steps[0] not in ("esm_stream_cli", "tests"), f"{path} imports {name}"
    return {part for part in found if (LIBRARY / part).exists() or has_file(part)}


def has_file(part: str) -> bool:
    """Whether a name is a module of the library, and not something a module defines."""
    return (LIBRARY / f"{part}.py").is_file()


@pytest.mark.parametrize(
    "path", sorted(LIBRARY.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_point_down_the_way_of_the_data(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return
    extra = imported_parts(path) - MAY_IMPORT[part] - ANYONE_MAY - {part}
    assert not extra, f"{path.relative_to(ROOT)} may not import {sorted(extra)}"
