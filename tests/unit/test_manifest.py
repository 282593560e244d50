"""The manifest: what it takes, what it refuses with which words, and where its paths lead."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from esm_stream.errors import ManifestError
from esm_stream.manifest import Manifest, load_manifest, manifest_schema

SMALLEST = """
[base]
model = "base"
[[experts]]
name = "math"
model = "math"
[[experts]]
name = "code"
model = "/abs/code"
calibration = "code.jsonl"
[output]
path = "out/merged"
"""


def load(tmp_path: Path, text: str) -> Manifest:
    path = tmp_path / "manifest.toml"
    path.write_text(text, encoding="utf-8")
    return load_manifest(path)


def refusal(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(ManifestError) as error:
        load(tmp_path, text)
    lines = str(error.value).splitlines()
    start = f"{tmp_path / 'manifest.toml'}: "
    assert all(line.startswith(start) for line in lines)
    return [line.removeprefix(start) for line in lines]


def test_the_smallest_manifest_has_the_documented_defaults(tmp_path: Path) -> None:
    found = load(tmp_path, SMALLEST)
    assert (found.merge.method, found.merge.alpha, found.merge.rules) == ("esm", "default", ())
    assert (found.calibration.samples, found.calibration.seed) == (32, 0)
    assert (found.calibration.max_length, found.calibration.dtype) == (512, "base")
    assert (found.output.dtype, found.output.shard_size) == ("base", "base")
    assert (found.run.memory, found.run.device, found.run.parallel) == (8 << 30, "cpu", 1)


def test_relative_paths_lead_from_the_manifest_and_absolute_ones_stay(tmp_path: Path) -> None:
    found = load(tmp_path, SMALLEST + '[calibration]\ndata = "../any.jsonl"\n')
    assert found.base.model == tmp_path / "base"
    assert found.experts[0].model == tmp_path / "math"
    assert found.experts[1].model == Path("/abs/code")
    assert found.calibration_of(found.experts[0]) == tmp_path / "../any.jsonl"
    assert found.calibration_of(found.experts[1]) == tmp_path / "code.jsonl"
    assert found.output.path == tmp_path / "out/merged"
    assert found.work == tmp_path / "out/merged.work"
    assert found.source == tmp_path / "manifest.toml"
    named = load(tmp_path, SMALLEST + '[run]\nwork = "scratch"\n')
    assert named.work == tmp_path / "scratch"


def test_relative_manifests_give_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(tmp_path, SMALLEST)
    monkeypatch.chdir(tmp_path)
    assert load_manifest(Path("manifest.toml")).base.model == tmp_path / "base"


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    found = load(tmp_path, SMALLEST.replace('"base"', '"~/base"'))
    assert found.base.model == Path("/home/somebody/base")


@pytest.mark.parametrize(
    ("added", "line"),
    [
        (
            "[calibration]\nsample = 3",
            "calibration: unknown key 'sample' (did you mean 'samples'?)",
        ),
        (
            "[calibration]\nzzz = 3",
            "calibration: unknown key 'zzz' (known keys: data, samples, min_samples, seed, "
            "max_length, max_seconds, text_key, messages_key, prompt_key, response_key, "
            "image_path_key, audio_path_key, image_key, dtype)",
        ),
        ("[merges]\n", "unknown key 'merges' (did you mean 'merge'?)"),
        (
            "[calibration]\nsamples = 0",
            "calibration.samples: Input should be greater than 0, got 0",
        ),
        (
            "[[merge.rules]]\ntensors = '*'\nmethods = 'base'",
            "merge.rules[0]: unknown key 'methods' (did you mean 'method'?)",
        ),
        (
            "[[merge.rules]]\nmethod = 'base'\nkinds = ['queries']",
            "merge.rules[0].kinds[0]: Input should be 'q', 'k', 'v', ",
        ),
        ("[run]\ndevice = 'tpu'", "run.device: String should match pattern"),
        ("[run]\nmemory = true", "run.memory: "),
        ("[run]\nmemory = -5", "run.memory: "),
        ("[merge]\nalpha = inf", "merge.alpha: "),
    ],
)
def test_a_mistake_is_answered_with_place_rule_and_value(
    added: str, line: str, tmp_path: Path
) -> None:
    lines = refusal(tmp_path, SMALLEST + added + "\n")
    assert lines
    assert all(found.startswith(line) for found in lines) or lines[0].startswith(line)


def test_experts_are_named_in_their_mistakes(tmp_path: Path) -> None:
    text = SMALLEST.replace('name = "code"', 'name = "code"\nmodell = "x"')
    line = "experts[1] \"code\": unknown key 'modell' (did you mean 'model'?)"
    assert refusal(tmp_path, text)[0] == line


def test_one_mistake_in_an_expert_is_told_once(tmp_path: Path) -> None:
    text = SMALLEST.replace('name = "code"', 'name = "code"\nmodell = "x"')
    assert len(refusal(tmp_path, text)) == 1


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    text = SMALLEST + "[calibration]\nsamples = 0\nseed = -1\nbogus = 1\n[run]\nparallel = 0\n"
    assert len(refusal(tmp_path, text)) == 4


@pytest.mark.parametrize("name", ["", "a b", "a/b", "../x", ".hidden", "-flag", "x" * 101, "ä"])
def test_names_that_are_no_plain_file_names_are_refused(name: str, tmp_path: Path) -> None:
    text = SMALLEST.replace('name = "math"', f'name = "{name}"')
    assert "experts[0]" in refusal(tmp_path, text)[0]


def test_two_experts_of_one_name_are_refused(tmp_path: Path) -> None:
    lines = refusal(tmp_path, SMALLEST.replace('name = "code"', 'name = "math"'))
    assert lines == ["experts: two experts have the name 'math'; names are unique"]


@pytest.mark.parametrize("text", ["not toml", "[base]\n[base]\n", "base = "])
def test_what_is_not_toml_is_refused(text: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, text)[0].startswith("not valid TOML")


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such manifest"):
        load_manifest(tmp_path / "none.toml")
    with pytest.raises(ManifestError, match="cannot be read"):
        load_manifest(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ManifestError, match="cannot be read"):
        load_manifest(tmp_path / "latin.toml")


def test_a_manifest_is_frozen(tmp_path: Path) -> None:
    found = load(tmp_path, SMALLEST)
    with pytest.raises(ValidationError):
        found.merge.alpha = 2.0  # type: ignore[misc]


def test_a_manifest_survives_its_own_json(tmp_path: Path) -> None:
    found = load(tmp_path, SMALLEST + '[run]\nmemory = "3GiB"\n')
    document = found.model_dump(mode="json")
    assert Manifest.model_validate(document).model_dump(mode="json") == document
    assert document["run"]["memory"] == 3 << 30


def test_the_schema_knows_every_method_and_describes_every_key() -> None:
    schema = manifest_schema()
    names = {key for key in schema["$defs"] if key.startswith("options_")}
    assert {"options_esm", "options_average", "options_tsv_m"} <= names
    for section in ("Base", "Expert", "Calibration", "Merge", "Output", "Run", "Rule"):
        for key, value in schema["$defs"][section]["properties"].items():
            assert value.get("description"), (section, key)
