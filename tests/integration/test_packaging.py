"""What `pip install` puts on a machine, and what `esm-stream --help` costs."""

import importlib.util
import json
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "dask", "distributed", "zarr", "numpy")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    """The wheel of this checkout."""
    target = tmp_path_factory.mktemp("wheel")
    # Where the build backend is installed, nothing has to be fetched for the build.
    isolation = [] if importlib.util.find_spec("hatchling") is None else ["--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *isolation]
    done = subprocess.run(
        [*command, "--wheel-dir", str(target), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (path,) = target.glob("*.whl")
    return zipfile.Path(path)


def test_wheel_has_two_packages_and_nothing_else(wheel: zipfile.Path) -> None:
    names = {entry.name for entry in wheel.iterdir()}
    (information,) = [name for name in names if name.endswith(".dist-info")]

    assert names == {"esm_stream", "esm_stream_cli", information}


def test_wheel_has_every_module(wheel: zipfile.Path) -> None:
    packed = {name for name in wheel.root.namelist() if name.endswith(".py")}
    library = {path.relative_to(ROOT).as_posix() for path in (ROOT / "esm_stream").rglob("*.py")}
    cli = ROOT / "cli"
    commands = {path.relative_to(cli).as_posix() for path in cli.rglob("*.py")}

    assert packed == library | commands


def test_wheel_is_typed_and_licensed(wheel: zipfile.Path) -> None:
    names = wheel.root.namelist()

    assert "esm_stream/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_gives_one_command(wheel: zipfile.Path) -> None:
    (information,) = [e for e in wheel.iterdir() if e.name.endswith(".dist-info")]
    points = ConfigParser()
    points.read_string((information / "entry_points.txt").read_text())

    assert {section: dict(points[section]) for section in points.sections()} == {
        "console_scripts": {"esm-stream": "esm_stream_cli.app:app"}
    }


def test_wheel_holds_no_tests_or_docs(wheel: zipfile.Path) -> None:
    parts = {part for name in wheel.root.namelist() for part in Path(name).parts}

    assert not parts & {"tests", "docs", "cli", ".ci", "constraints.txt"}


@pytest.mark.parametrize("command", [[], ["merge"], ["plan"], ["status"], ["demo"], ["schema"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    program = (
        "import json, sys\n"
        "from esm_stream_cli.app import app\n"
        f"app({[*command, '--help']!r}, standalone_mode=False)\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    imported = set(json.loads(done.stderr.splitlines()[-1]))

    assert "Usage:" in done.stdout
    assert imported.isdisjoint(HEAVY)


def test_constraints_hold_every_installed_package_of_the_project() -> None:
    """Each requirement of the project and of what it requires, all extras, has an exact pin."""
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines if "==" in line}
    waiting, seen = [("esm-stream", frozenset({"demo", "images", "audio", "docs", "test"}))], set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            needed = [Requirement(line) for line in requires(name) or ()]
        except PackageNotFoundError:
            continue
        for requirement in needed:
            markers = [{"extra": extra} for extra in extras] or [{"extra": ""}]
            if requirement.marker is None or any(map(requirement.marker.evaluate, markers)):
                required = canonicalize_name(requirement.name)
                waiting.append((required, frozenset(requirement.extras)))

    # torch brings the parts of its CUDA build, which it pins itself.
    own = ("nvidia-", "cuda-", "triton")
    names = {name for name, _ in seen} - {"esm-stream"}
    assert {name for name in names - pinned if not name.startswith(own)} == set()


def test_constraints_hold_exact_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()

    assert [line for line in lines if line.count("==") != 1] == []
