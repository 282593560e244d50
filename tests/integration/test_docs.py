"""The documentation says what the program does: commands run, keys, flags and codes are complete.

In docs/tutorial.md an HTML comment before a fenced block says what the test does with it:
`<!-- file: NAME -->` writes it, `<!-- run -->` runs it in bash and expects exit code 0, and
`<!-- run: exit N -->` expects N. Blocks run in order, in one directory with tiny models.
"""

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from models import (
    FAMILIES,
    build,
    save,
    save_image_processor,
    save_tokenizer,
    tuned,
    write_images,
    write_texts,
)
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from esm_stream import errors
from esm_stream.budget import parse_size
from esm_stream.manifest import (
    Base,
    Calibration,
    Expert,
    Lines,
    Merge,
    Output,
    Post,
    Rule,
    Run,
    Split,
    load_manifest,
)
from esm_stream.methods import available, options_model
from esm_stream.methods.profiles import PROFILES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
EXAMPLES = sorted((DOCS / "examples").glob("*.toml"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
SECTIONS: dict[str, type[BaseModel]] = {
    "[base]": Base,
    "[[experts]]": Expert,
    "[calibration]": Calibration,
    "[merge]": Merge,
    "[merge.post]": Post,
    "[merge.post.lines]": Lines,
    "[[merge.split]]": Split,
    "[[merge.rules]]": Rule,
    "[output]": Output,
    "[run]": Run,
}
BLOCK = re.compile(
    r"^<!-- (?P<what>file|run)(?:: (?P<detail>[^>]*?))? -->\n```\w*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One marked block of a page."""

    what: str
    detail: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    return [
        Block(match["what"], match["detail"] or "", match["text"])
        for match in BLOCK.finditer(page.read_text(encoding="utf-8"))
    ]


def section_of(page: Path, heading: str) -> str:
    """Text under a heading of level 2, up to the next one."""
    parts = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = [part for part in parts if part.partition("\n")[0].strip() == heading]
    assert len(found) == 1, f"{page.name} has {len(found)} sections named '{heading}'"
    return found[0]


def rows_of(text: str) -> Iterator[list[str]]:
    """Cells of the body rows of all tables."""
    lines = text.splitlines()
    for number, line in enumerate(lines):
        is_row = line.startswith("|") and not line.startswith("|---")
        is_head = number + 1 < len(lines) and lines[number + 1].startswith("|---")
        if is_row and not is_head:
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def key_table(text: str) -> dict[str, str]:
    """Defaults by key, of the table whose head is key, default, meaning."""
    table = text.partition("| key | default | meaning |\n")[2].partition("\n\n")[0]
    return {cells[0].strip("` "): cells[1] for cells in rows_of(table)}


def defaults_of(model: type[BaseModel]) -> dict[str, object]:
    return {
        f.alias or name: f.get_default(call_default_factory=True)
        for name, f in model.model_fields.items()
        if not isinstance(f.default, BaseModel)
    }


def same_default(cell: str, default: object, of_profile: bool) -> bool:
    """Whether a cell of the default column says what the model has."""
    if default is PydanticUndefined:
        return cell == "required"
    if default is None:
        return cell == ("profile" if of_profile else "none")
    if isinstance(default, tuple | dict):
        return cell == ("`[]`" if isinstance(default, tuple) else "`{}`") and not default
    value = tomllib.loads(f"x = {cell.strip('`')}")["x"]
    if isinstance(value, str) and isinstance(default, int):
        value = parse_size(value)
    return type(value) is type(default) and value == default


@pytest.mark.parametrize("section", SECTIONS)
def test_manifest_page_has_every_key_with_its_default(section: str) -> None:
    documented = key_table(section_of(DOCS / "manifest.md", section))
    expected = defaults_of(SECTIONS[section])

    assert set(documented) == set(expected) - {"experts"}
    wrong = {
        key: (cell, expected[key])
        for key, cell in documented.items()
        if not same_default(cell, expected[key], of_profile=False)
    }
    assert not wrong


@pytest.mark.parametrize("method", available())
def test_method_page_has_every_option_with_its_default(method: str) -> None:
    page = DOCS / "methods" / f"{method}.md"
    expected = defaults_of(options_model(method))
    documented = key_table(section_of(page, "Options")) if expected else {}
    of_profile = set(PROFILES["journal"]["vision"].__dataclass_fields__) | {"copy"}

    assert set(documented) == set(expected)
    wrong = {
        key: (cell, expected[key])
        for key, cell in documented.items()
        if not same_default(cell, expected[key], of_profile=key in of_profile)
    }
    assert not wrong


def test_esm_page_names_every_profile() -> None:
    text = section_of(DOCS / "methods" / "esm.md", "Profiles")

    assert [name for name in PROFILES if f"`{name}`" not in text] == []


def test_commands_page_has_every_command_and_flag_and_no_other() -> None:
    import typer.main

    from esm_stream_cli.app import app

    group = typer.main.get_command(app)
    root = group.make_context("esm-stream", [], resilient_parsing=True)
    commands = {"esm-stream": (group, root)}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        context = command.make_context(name, [], parent=root, resilient_parsing=True)
        commands[f"esm-stream {name}"] = (command, context)
    for name, (command, context) in commands.items():
        expected = {
            flag
            for parameter in command.get_params(context)
            for flag in (*parameter.opts, *parameter.secondary_opts)
            if flag.startswith("-")
        }
        flags = [cells[0] for cells in rows_of(section_of(DOCS / "cli.md", name))]
        documented = {flag for cell in flags for flag in re.findall(r"`(--?[\w-]+)`", cell)}
        assert documented == expected, name


@pytest.mark.parametrize(
    "page", [DOCS / "cli.md", ROOT / "README.md"], ids=["commands page", "README"]
)
def test_every_exit_code_is_documented(page: Path) -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and hasattr(c, "exit_code")]
    text = page.read_text(encoding="utf-8")
    documented = {int(cells[0]) for cells in rows_of(text) if cells[0].isdigit()}

    assert documented == {0, 2, *(c.exit_code for c in classes)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    broken = []
    for link in local:
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)

    assert broken == []


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


def test_troubleshooting_quotes_messages_that_exist() -> None:
    library = [*(ROOT / "esm_stream").rglob("*.py"), *(ROOT / "cli").rglob("*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in library)
    # Adjacent literals are one message.
    source = re.sub(r"[\"']\s*\n?\s*f?[\"']", "", source).replace("\\'", "'")
    rows = list(rows_of((DOCS / "troubleshooting.md").read_text(encoding="utf-8")))
    quoted = [message for cells in rows for message in re.findall(r"`([^`]+)`", cells[0])]
    # Names, numbers and sizes differ from case to case; the words between them do not.
    pieces = [
        piece.strip(" ,;:()'")
        for message in quoted
        for piece in re.split(r"'[^']*'|\.\.\.|\[[\d, ]+\]|\S*\d\S*(?: GiB)?|\S*[*]\S*", message)
    ]
    missing = [piece for piece in pieces if len(piece) > 3 and piece not in source]

    assert len(quoted) > 50
    # transformers says this one.
    assert missing == ["does not recognize this architecture"]


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    named = set(re.findall(r"[\w./-]+\.md", navigation))
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}

    assert {p for p in pages if not p.startswith("benchmarks/")} <= named <= pages


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directories that tutorial and examples speak of, with tiny models in them."""
    root = tmp_path_factory.mktemp("docs")
    (root / "data").mkdir()
    for folder, family, names in (
        ("models", "llama", ("base", "math", "code")),
        ("vit", "vit", ("base", "digits", "letters")),
    ):
        model = build(FAMILIES[family], seed=1)
        for seed, name in enumerate(names):
            save(model if name == "base" else tuned(model, seed, 0.02), root / folder / name)
    save_tokenizer(root / "models" / "base")
    save_image_processor(root / "vit" / "base")
    for seed, name in enumerate(("math", "code")):
        write_texts(root / "data" / f"{name}.jsonl", 40, seed)
    for seed, name in enumerate(("digits", "letters")):
        write_images(root / "vit" / f"{name}.npz", 40, seed)
    return root


def test_tutorial_works_as_written(workplace: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    blocks = blocks_of(DOCS / "tutorial.md")
    for block in blocks:
        if block.what == "file":
            (workplace / block.detail).write_text(block.text, encoding="utf-8")
            continue
        code = int(block.detail.removeprefix("exit ")) if block.detail else 0
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=workplace,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == code, f"{block.text}{done.stdout}{done.stderr}"

    assert sum(block.what == "run" for block in blocks) >= 5
    assert (workplace / "merged" / "complete.json").is_file()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_can_be_planned(example: Path, workplace: Path) -> None:
    from esm_stream.planning.make import make_plan

    copy = workplace / example.name
    copy.write_text(example.read_text(encoding="utf-8"), encoding="utf-8")
    plan = make_plan(load_manifest(copy))

    assert plan.tasks["finish"]
    assert plan.notes == ()


def test_examples_page_lists_every_example() -> None:
    listed = re.findall(r"\]\(([\w-]+\.toml)\)", (DOCS / "examples" / "README.md").read_text())

    assert sorted(listed) == [example.name for example in EXAMPLES]


def test_manifest_in_readme_is_valid(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "manifest.toml").write_text(re.findall(r"```toml\n(.*?)```", text, re.DOTALL)[0])
    manifest = load_manifest(tmp_path / "manifest.toml")

    assert [expert.name for expert in manifest.experts] == ["math", "code"]
    assert manifest.merge.rules[0].method in available()


def test_readme_has_one_line_for_the_demo_and_one_for_the_tests() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for marker, last in (("main-command", "esm-stream demo"), ("test-command", "pytest")):
        found = re.findall(rf"<!-- {marker} -->\n```sh\n(.*)\n```", text)
        assert len(found) == 1
        assert found[0].endswith(last)
        assert "-c constraints.txt" in found[0]
