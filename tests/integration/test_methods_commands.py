"""`esm-stream methods` and `esm-stream import`, as the shell sees them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from esm_stream.methods import available
from esm_stream_cli.app import app

RUNNER = CliRunner()


def test_methods_lists_all_and_explains_one() -> None:
    table = RUNNER.invoke(app, ["methods"], env={"COLUMNS": "200"})
    assert table.exit_code == 0
    assert [name for name in available() if name not in table.output] == []
    one = RUNNER.invoke(app, ["methods", "ties"])
    assert "elect the sign of the sum" in one.output
    assert 'trim = "global"' in one.output


def test_methods_as_json() -> None:
    found = json.loads(RUNNER.invoke(app, ["methods", "--json"]).output)
    assert set(found) == set(available())
    assert found["ties"]["options"]["density"]["default"] == 0.2


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    result = RUNNER.invoke(app, ["methods", "tie"])
    assert result.exit_code == 3
    assert "did you mean 'ties'" in result.stderr


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}", 0, ""),
        ("merge_method: nearswap", 3, "nearswap"),
        ("a: [", 3, "not valid YAML"),
    ],
)
def test_import_prints_a_manifest_or_says_why_not(
    tmp_path: Path, text: str, code: int, said: str
) -> None:
    config = tmp_path / "merge.yml"
    config.write_text(text)
    result = RUNNER.invoke(app, ["import", str(config), "--output", "mixed"])
    assert result.exit_code == code
    assert said in result.stderr
    assert ('path = "mixed"' in result.stdout) == (code == 0)
    assert RUNNER.invoke(app, ["import", str(tmp_path / "none.yml")]).exit_code == 3
