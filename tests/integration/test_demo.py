"""The demo on a miniature: files, reuse, refusal, evaluation. Accuracies are not the point here."""

import json
import shutil
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from esm_stream.demo import (
    DIGITS,
    TASKS,
    DemoFiles,
    DemoResult,
    DemoRow,
    Recipe,
    evaluate,
    prepare,
    run,
)
from esm_stream.errors import EsmStreamError, ManifestError
from esm_stream.manifest import load_manifest

pytest.importorskip("sklearn")

MINIATURE = Recipe(hidden=40, layers=1, attention_heads=2, base_steps=3, expert_steps=3, proxies=4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> DemoFiles:
    return prepare(tmp_path_factory.mktemp("demo") / "made", recipe=MINIATURE)


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def merge_to_base(manifest: Path) -> Path:
    """Stands for the engine: the first model of the manifest is the answer."""
    return load_manifest(manifest).base.model


def test_models_are_ordinary_directories_of_one_architecture(finished: DemoFiles) -> None:
    base = AutoModel.from_pretrained(finished.base, add_pooling_layer=False).state_dict()
    for task in TASKS:
        expert = AutoModel.from_pretrained(finished.expert(task), add_pooling_layer=False)
        weights = expert.state_dict()
        assert {name: w.shape for name, w in weights.items()} == {
            n: w.shape for n, w in base.items()
        }
        assert all(w.dtype == torch.float32 for w in weights.values())
        assert any(not torch.equal(weights[name], base[name]) for name in base)


@pytest.mark.parametrize("method", ["esm", "average"])
def test_manifests_are_valid_and_name_files_that_exist(finished: DemoFiles, method: str) -> None:
    manifest = load_manifest(finished.directory / f"{method}.toml")
    assert manifest.merge.method == method
    assert [expert.name for expert in manifest.experts] == list(TASKS)
    assert (manifest.base.model / "config.json").is_file()
    for expert in manifest.experts:
        assert (expert.model / "config.json").is_file()
        assert expert.calibration is not None
        assert expert.calibration.is_file()
    assert manifest.output.path == finished.directory / f"merged-{method}"
    assert manifest.calibration.samples == MINIATURE.proxies


def test_proxies_are_inputs_of_their_task_and_none_is_a_test_image(finished: DemoFiles) -> None:
    with np.load(finished.test) as test:
        for task in TASKS:
            proxies = load_file(finished.calibration(task))["pixel_values"]
            assert proxies.shape == (MINIATURE.proxies, 1, 8, 8)
            assert test[f"{task}_x"].shape == (MINIATURE.test_images, 1, 8, 8)
            tested = {image.tobytes() for image in test[f"{task}_x"]}
            assert not tested & {image.tobytes() for image in proxies.numpy()}


def test_heads_of_all_tasks_are_orthogonal(finished: DemoFiles) -> None:
    heads = load_file(finished.heads)
    stacked = torch.cat([heads[task] for task in TASKS]).double()
    assert stacked.shape == (DIGITS * len(TASKS), MINIATURE.hidden)
    assert torch.allclose(stacked @ stacked.T, torch.eye(len(stacked)).double(), atol=1e-5)


def test_the_same_seed_makes_the_same_bytes(finished: DemoFiles, tmp_path: Path) -> None:
    prepare(tmp_path / "again", recipe=MINIATURE)
    assert contents(tmp_path / "again") == contents(finished.directory)


def test_a_finished_demo_is_used_as_it_is(finished: DemoFiles) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.directory.rglob("*")}
    lines: list[str] = []
    assert prepare(finished.directory, report=lines.append, recipe=MINIATURE) == finished
    assert lines == [f"using the models in {finished.directory}"]
    assert before == {path: path.stat().st_mtime_ns for path in finished.directory.rglob("*")}


def test_an_unfinished_demo_is_made_anew(finished: DemoFiles, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(finished.directory, broken)
    marker = json.loads((broken / "demo.json").read_text())
    (broken / "demo.json").write_text(json.dumps(marker | {"finished": False}))
    shutil.rmtree(broken / "models" / "experts")
    prepare(broken, recipe=MINIATURE)
    assert contents(broken) == contents(finished.directory)


def test_an_interrupted_training_leaves_a_demo_that_can_be_made_anew(tmp_path: Path) -> None:
    def interrupt(line: str) -> None:
        if "expert" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "demo", report=interrupt, recipe=MINIATURE)
    assert not (tmp_path / "demo" / "esm.toml").exists()
    assert prepare(tmp_path / "demo", recipe=MINIATURE).esm.is_file()


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ManifestError, match="not empty"):
        prepare(tmp_path, recipe=MINIATURE)
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("")
    with pytest.raises(ManifestError, match="is a file"):
        prepare(tmp_path / "demo", recipe=MINIATURE)


@pytest.mark.parametrize("text", ["not json", "[]", "{}"])
def test_a_marker_of_somebody_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "demo.json").write_text(text)
    with pytest.raises(ManifestError, match="not written by the demo"):
        prepare(tmp_path, recipe=MINIATURE)


def test_a_demo_of_another_seed_is_refused(finished: DemoFiles) -> None:
    with pytest.raises(ManifestError, match="seed = 0"):
        prepare(finished.directory, seed=1, recipe=MINIATURE)


def test_without_scikit_learn_the_error_names_the_extra_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(EsmStreamError, match=r'pip install "esm-stream\[demo\]"'):
        prepare(tmp_path / "demo", recipe=MINIATURE)
    assert not (tmp_path / "demo").exists()


def test_accuracy_counts_the_answers_that_match(finished: DemoFiles) -> None:
    model = AutoModel.from_pretrained(finished.base, add_pooling_layer=False)
    head = load_file(finished.heads)["striped"]
    with np.load(finished.test) as test, torch.inference_mode():
        hidden = model(pixel_values=torch.from_numpy(test["striped_x"])).last_hidden_state
        answers = (hidden[:, 0] @ head.T).argmax(1).numpy()
        expected = 100 * np.mean(answers == test["striped_y"])
    assert evaluate(finished.directory, finished.base, ["striped"]) == {
        "striped": pytest.approx(expected)
    }


def test_run_merges_both_manifests_and_keeps_the_table(finished: DemoFiles, tmp_path: Path) -> None:
    directory = tmp_path / "demo"
    shutil.copytree(finished.directory, directory)
    merged: list[str] = []

    def merge(manifest: Path) -> Path:
        merged.append(tomllib.loads(manifest.read_text())["merge"]["method"])
        return merge_to_base(manifest)

    result = run(directory, merge, recipe=MINIATURE)
    assert merged == ["average", "esm"]
    assert [row.name for row in result.rows] == ["base", "experts", "average", "esm"]
    assert result.rows[0].accuracy == result.rows[3].accuracy
    assert all(set(row.accuracy) == set(TASKS) for row in result.rows)
    assert json.loads((directory / "results.json").read_text()) == json.loads(result.to_json())


def test_the_table_as_json_has_means_in_percent() -> None:
    result = DemoResult(("a", "b"), (DemoRow("base", {"a": 10.0, "b": 20.004}),))
    assert json.loads(result.to_json()) == {
        "tasks": ["a", "b"],
        "rows": [{"name": "base", "accuracy": {"a": 10.0, "b": 20.0}, "mean": 15.0}],
    }
