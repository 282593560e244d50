"""The command line: what it refuses, in which words, with which exit code; what it prints."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from conftest import MakeZoo, merge_here
from models import (
    Zoo,
    change_tensors,
    make_zoo,
    save_image_processor,
    save_tokenizer,
    tensors_of,
    toml,
    write_manifest,
    write_texts,
)
from typer.testing import CliRunner

from esm_stream.store.lock import locked
from esm_stream_cli.app import app

Document = dict[str, Any]


def esm_stream(*arguments: object) -> Result:
    """Run a command in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def words(result: Result) -> str:
    """What was printed, on one line."""
    return re.sub(r"\s+", " ", result.output)


@pytest.fixture
def found(zoo: MakeZoo, tmp_path: Path) -> Zoo:
    """A model whose files may be spoilt."""
    return zoo("llama").copy(tmp_path / "zoo")


@dataclass(frozen=True)
class Mistake:
    """A change of manifest or files, and what has to come back."""

    change: Callable[[Document, Zoo], object]
    code: int
    says: tuple[str, ...]


def set_key(*path: str | int, to: object) -> Callable[[Document, Zoo], object]:
    """A change of one key of the manifest."""

    def change(document: Document, zoo: Zoo) -> None:
        del zoo
        here: Any = document
        for step in path[:-1]:
            here = here.setdefault(step, {}) if isinstance(here, dict) else here[step]
        here[path[-1]] = to

    return change


def drop_key(*path: str | int) -> Callable[[Document, Zoo], object]:
    def change(document: Document, zoo: Zoo) -> None:
        del zoo
        here: Any = document
        for step in path[:-1]:
            here = here[step]
        del here[path[-1]]

    return change


def rule(**keys: object) -> Callable[[Document, Zoo], object]:
    return set_key("merge", to={"rules": [keys]})


UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


def spoil_experts(document: Document, zoo: Zoo) -> None:
    """Three mistakes in two experts."""
    del document
    change_tensors(
        zoo.experts["expert0"],
        {UP: lambda v: torch.cat([v, v]), NORM: None},
    )
    change_tensors(zoo.experts["expert1"], {"lm_head.weight": lambda v: v[:-1]})


def not_a_number(name: str, model: str = "expert1") -> Callable[[Document, Zoo], object]:
    def change(document: Document, zoo: Zoo) -> None:
        del document
        path = zoo.base if model == "base" else zoo.experts[model]

        def spoil(value: torch.Tensor) -> torch.Tensor:
            value.view(-1)[: value.shape[-1] * 9] = float("nan")
            return value

        change_tensors(path, {name: spoil})

    return change


def cut_shard(document: Document, zoo: Zoo) -> None:
    del document
    path = zoo.experts["expert1"] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_safetensors(document: Document, zoo: Zoo) -> None:
    del document
    (zoo.experts["expert1"] / "model.safetensors").unlink()


def calibration(
    name: str, content: str | None, **keys: object
) -> Callable[[Document, Zoo], object]:
    """Calibration of expert1 in another file; None is a file that is not there."""

    def change(document: Document, zoo: Zoo) -> None:
        path = zoo.root / name
        save_tokenizer(zoo.base)
        if content is not None:
            path.write_text(content)
        document["experts"][1]["calibration"] = str(path)
        document["calibration"] = keys

    return change


def other_model_in_output(document: Document, zoo: Zoo) -> None:
    del zoo
    path = Path(document["output"]["path"])
    path.mkdir()
    (path / "thesis.txt").write_text("years of work")


def output_is_base(document: Document, zoo: Zoo) -> None:
    document["output"]["path"] = str(zoo.base)


def not_toml(document: Document, zoo: Zoo) -> None:
    del zoo
    document.clear()
    document["this is"] = {"not toml": 1}


MISTAKES = {
    "mistyped key": Mistake(
        set_key("calibration", to={"sample": 3}),
        3,
        ("unknown key 'sample'", "did you mean 'samples'"),
    ),
    "mistyped key of an expert": Mistake(
        set_key("experts", 1, "calibrations", to="x"),
        3,
        ('experts[1] "expert1"', "unknown key 'calibrations'", "did you mean 'calibration'"),
    ),
    "mistyped section": Mistake(
        set_key("outputs", to={}), 3, ("unknown key 'outputs'", "did you mean 'output'")
    ),
    "wrong type": Mistake(
        set_key("calibration", to={"samples": "many"}), 3, ("calibration.samples", "'many'")
    ),
    "out of range": Mistake(
        set_key("calibration", to={"samples": 0}),
        3,
        ("calibration.samples", "greater than 0", "got 0"),
    ),
    "no output": Mistake(drop_key("output"), 3, ("output", "required")),
    "one expert": Mistake(
        lambda document, _: document["experts"].pop(), 3, ("experts", "at least 2")
    ),
    "two experts of one name": Mistake(
        set_key("experts", 1, "name", to="expert0"), 3, ("'expert0'", "unique")
    ),
    "name with a slash": Mistake(
        set_key("experts", 1, "name", to="a/b"), 3, ("experts[1]", "name", "a/b")
    ),
    "not a size": Mistake(
        set_key("run", "memory", to="8 bananas"), 3, ("run.memory", "8 bananas", "8GiB")
    ),
    "infinite alpha": Mistake(set_key("merge", to={"alpha": "much"}), 3, ("merge.alpha", "much")),
    "unknown method": Mistake(
        set_key("merge", to={"method": "esmm"}), 3, ("unknown method 'esmm'", "did you mean 'esm'")
    ),
    "unknown option": Mistake(
        set_key("merge", to={"options": {"profiles": "journal"}}),
        3,
        ("unknown option 'profiles'", "did you mean 'profile'"),
    ),
    "unknown profile": Mistake(
        set_key("merge", to={"options": {"profile": "diary"}}), 3, ("profile", "'diary'", "journal")
    ),
    "unknown method of a rule": Mistake(
        rule(tensors="*", method="averag"),
        3,
        ("merge.rules[0]", "'averag'", "did you mean 'average'"),
    ),
    "rule without effect": Mistake(
        rule(tensors="*"), 3, ("merge.rules[0]", "neither a method nor an alpha")
    ),
    "options without a method": Mistake(
        rule(tensors="*", alpha=1.0, options={"rank": 3}),
        3,
        ("merge.rules[0]", "options need a method"),
    ),
    "broken regex": Mistake(
        rule(tensors="re:(", method="base"),
        3,
        ("merge.rules[0].tensors", "not a regular expression"),
    ),
    "factor method for a vector": Mistake(
        rule(tensors="model.norm.weight", method="tsv_m"), 3, (NORM, "matrices only")
    ),
    "activations that cannot be seen": Mistake(
        rule(tensors="model.embed_tokens.weight", method="esm"),
        3,
        ("model.embed_tokens.weight", "cannot be observed", "svd"),
    ),
    "missing base": Mistake(
        set_key("base", "model", to="nowhere"), 4, ("nowhere", "no such directory")
    ),
    "mistakes of several experts": Mistake(
        spoil_experts,
        4,
        (
            "expert 'expert0'",
            UP,
            "(80, 16)",
            "(40, 16)",
            NORM,
            "is missing",
            "expert 'expert1'",
            "lm_head.weight",
            "(59, 16)",
        ),
    ),
    "corrupt shard": Mistake(cut_shard, 4, ("expert1/model.safetensors",)),
    "no shard": Mistake(no_safetensors, 4, ("expert1", "no model here")),
    "missing calibration": Mistake(
        calibration("none.jsonl", None), 4, ("none.jsonl", "no such calibration file")
    ),
    "calibration of an unknown kind": Mistake(
        calibration("x.csv", "a,b"), 4, ("x.csv", "unknown kind", ".jsonl")
    ),
    "empty calibration": Mistake(calibration("e.jsonl", "\n\n"), 4, ("e.jsonl", "no samples")),
    "calibration that is not JSON": Mistake(
        calibration("b.jsonl", '{"text": "w3"}\n{"text": \n'), 4, ("b.jsonl:2", "not JSON")
    ),
    "wrong text_key": Mistake(
        calibration("k.jsonl", '{"content": "w3 w4"}\n', text_key="body"),
        4,
        ('expert "expert1"', "k.jsonl:1", "'body'", "found: content", "text_key"),
    ),
    "too few samples": Mistake(
        calibration("f.jsonl", '{"text": "w3 w4"}\n' * 3),
        4,
        ('expert "expert1"', "f.jsonl", "holds 3 samples", "expected 4 or more", "min_samples"),
    ),
    "messages without a chat template": Mistake(
        calibration("m.jsonl", '{"messages": [{"role": "user", "content": "w3"}]}\n' * 4),
        4,
        ("m.jsonl:1", "chat template", "m.jsonl:4"),
    ),
    "output holds something else": Mistake(
        other_model_in_output, 4, ("thesis.txt", "choose another")
    ),
    "output is the base": Mistake(output_is_base, 4, ("is the base or an expert",)),
    "NaN in a target of an expert": Mistake(not_a_number(UP), 9, (UP, '"expert1"', "NaN or Inf")),
    "NaN in an averaged tensor of an expert": Mistake(
        not_a_number("lm_head.weight"), 9, ("lm_head.weight", '"expert1"', "NaN or Inf")
    ),
    "NaN in the embeddings of an expert": Mistake(
        not_a_number("model.embed_tokens.weight"),
        9,
        ("model.embed_tokens.weight", '"expert1"', "NaN or Inf"),
    ),
    "NaN in a norm inside a block": Mistake(
        not_a_number("model.layers.1.input_layernorm.weight"),
        9,
        ("model.layers.1.input_layernorm.weight", '"expert1"', "NaN or Inf"),
    ),
    "NaN in the base": Mistake(not_a_number(UP, "base"), 9, (UP, "the base", "NaN or Inf")),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_answered_with_its_place_and_what_to_do(
    what: str, found: Zoo, tmp_path: Path
) -> None:
    mistake = MISTAKES[what]
    output = tmp_path / "merged"
    document = found.document(output)
    mistake.change(document, found)
    before = set(output.iterdir()) if output.is_dir() else set()
    manifest = write_manifest(tmp_path / "manifest.toml", document)
    result = esm_stream("merge", manifest, "--scheduler", "sync")
    assert result.exit_code == mistake.code, result.output
    for part in mistake.says:
        assert part in words(result), (part, result.output)
    assert "Traceback" not in result.output
    # Nothing that could be taken for a model.
    after = set(output.iterdir()) if output.is_dir() else set()
    assert not {p.name for p in after - before if p.suffix != ".partial"}
    if mistake.code == 3:
        assert not (tmp_path / "merged.work").exists()


def test_a_manifest_that_cannot_be_read_is_an_error_with_its_path(tmp_path: Path) -> None:
    missing = esm_stream("merge", tmp_path / "none.toml")
    assert (missing.exit_code, "there is no such manifest" in words(missing)) == (3, True)
    broken = tmp_path / "broken.toml"
    broken.write_text("[base\n")
    result = esm_stream("plan", broken)
    assert result.exit_code == 3
    assert "not valid TOML" in words(result)


def test_all_mistakes_of_a_manifest_are_told_at_once(found: Zoo, tmp_path: Path) -> None:
    document = found.document(tmp_path / "merged", calibration={"sampls": 3, "seed": -1})
    document["run"]["device"] = "tpu"
    result = esm_stream("plan", write_manifest(tmp_path / "m.toml", document))
    assert result.exit_code == 3
    for part in ("'sampls'", "calibration.seed", "run.device"):
        assert part in words(result)


@pytest.fixture
def manifest(zoo: MakeZoo, tmp_path: Path) -> Path:
    """A manifest without mistakes."""
    document = zoo("llama").document(tmp_path / "merged", merge={"alpha": 1.5})
    return write_manifest(tmp_path / "manifest.toml", document)


def test_too_little_memory_is_refused_with_the_numbers(manifest: Path, tmp_path: Path) -> None:
    for command, code in (("merge", 6), ("plan", 0)):
        result = esm_stream(command, manifest, "--memory", "20MiB")
        assert result.exit_code == code
        assert "the budget is 20.0 MiB" in words(result)
        assert re.search(r"task '[^']+' needs \d[\d.]* [KMG]iB", words(result))
    assert not (tmp_path / "merged").exists()


def test_a_locked_work_directory_is_refused(manifest: Path, tmp_path: Path) -> None:
    import os

    with locked(tmp_path / "merged.work"):
        # Locks belong to open files: the second run may be this process too.
        result = esm_stream("merge", manifest, "--scheduler", "sync")
    assert result.exit_code == 7
    assert f"process {os.getpid()}" in words(result)
    assert "esm-stream status" in words(result)


def test_changed_options_are_refused_and_restart_accepts_them(
    manifest: Path, tmp_path: Path
) -> None:
    assert esm_stream("merge", manifest, "--scheduler", "sync").exit_code == 0
    manifest.write_text(manifest.read_text().replace("alpha = 1.5", "alpha = 0.5"))
    result = esm_stream("merge", manifest, "--scheduler", "sync")
    assert result.exit_code == 8
    assert "merge.alpha: 1.5 -> 0.5" in words(result)
    assert "--restart" in words(result)
    assert esm_stream("merge", manifest, "--scheduler", "sync", "--restart").exit_code == 0
    report = json.loads((tmp_path / "merged/report.json").read_bytes())
    assert report["alpha"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--scheduler", "slurm"), 3, "neither one of local, sync, threads"),
        (("--device", "tpu"), 3, "--device"),
        (("--device", "cuda:99"), 3, "usable CUDA devices; use --device cpu"),
        (("--memory", "lots"), 3, "'lots' is not a size"),
        (("--parallel", "0"), 2, "--parallel"),
        (("--bogus",), 2, "--bogus"),
    ],
)
def test_wrong_options_are_refused(
    arguments: tuple[str, ...], code: int, says: str, manifest: Path
) -> None:
    result = esm_stream("merge", manifest, *arguments)
    assert result.exit_code == code
    assert says in re.sub(r"\x1b\[[0-9;]*m", "", words(result))


def test_plan_as_json_is_what_merge_then_does(manifest: Path, tmp_path: Path) -> None:
    planned = esm_stream("plan", manifest, "--json")
    assert planned.exit_code == 0
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "merged.work").exists()
    plan = json.loads(planned.stdout)
    assert esm_stream("merge", manifest, "--scheduler", "sync").exit_code == 0
    merged = json.loads((tmp_path / "merged.work/plan.json").read_bytes())
    assert {"xxh3_128", *plan} == set(merged)
    # How many threads a task gets is fixed when the work directory is begun.
    assert merged["manifest"]["run"].pop("threads") >= 1
    assert plan["manifest"]["run"].pop("threads") is None
    assert plan == {key: merged[key] for key in plan}
    done = tmp_path / "merged.work/done"
    read = {}
    for path in done.rglob("*.json"):
        marker = json.loads(path.read_bytes())
        task = plan["tasks"][marker["key"]]
        assert marker["fingerprint"] == task["fingerprint"]
        read[marker["key"]] = marker["results"]["bytes_read"]
        inside = [o for o in marker["outputs"] if o["root"] == "work"]
        if task["stage"] == "merge":
            assert sum(o["size"] for o in inside) <= task["write_bytes"] + 64 * len(inside)
    assert read.keys() == plan["tasks"].keys()
    stages = {task["stage"] for task in plan["tasks"].values()}
    for stage in stages:
        keys = [k for k, t in plan["tasks"].items() if t["stage"] == stage]
        assert sum(read[k] for k in keys) == sum(plan["tasks"][k]["read_bytes"] for k in keys), (
            stage
        )


def test_plan_foresees_every_byte_that_is_read(manifest: Path, tmp_path: Path) -> None:
    plan = json.loads(esm_stream("plan", manifest, "--json").stdout)
    assert esm_stream("merge", manifest, "--scheduler", "sync").exit_code == 0
    markers = [json.loads(p.read_bytes()) for p in (tmp_path / "merged.work/done").rglob("*.json")]
    read = sum(marker["results"]["bytes_read"] for marker in markers)
    assert read <= sum(task["read_bytes"] for task in plan["tasks"].values())


def test_plan_for_people_says_what_it_costs(manifest: Path) -> None:
    result = esm_stream("plan", manifest)
    assert result.exit_code == 0
    text = words(result)
    for part in ("*.self_attn.q_proj.weight", "40 x 16", "peak memory", "esm of 2 experts"):
        assert part in text


def test_status_tells_how_far_a_merge_is_and_how_to_go_on(manifest: Path, tmp_path: Path) -> None:

    from esm_stream import stopping
    from esm_stream.errors import StopRequestedError
    from esm_stream.events import Event
    from esm_stream.manifest import load_manifest
    from esm_stream.planning.make import make_plan

    work = tmp_path / "merged.work"
    missing = esm_stream("status", work)
    assert missing.exit_code == 4
    assert "not a work directory" in words(missing)
    during = []

    def listen(event: Event) -> None:
        if event.stage == "stem":
            during.append(json.loads(esm_stream("status", work, "--json").stdout))
            stopping.request()

    with pytest.raises(StopRequestedError):
        merge_here(make_plan(load_manifest(manifest)), listen)
    assert during[0]["complete"] is False
    assert "process" in during[0]["running"]
    done = {stage["name"]: stage["done"] for stage in during[0]["stages"]}
    assert (done["inputs"], done["stem"], done["forward"]) == (2, 1, 0)
    stopped = words(esm_stream("status", work))
    assert "not running" in stopped
    assert f"esm-stream merge {manifest}" in stopped
    assert esm_stream("merge", manifest, "--scheduler", "sync").exit_code == 0
    after = json.loads(esm_stream("status", work, "--json").stdout)
    assert after["complete"] is True
    assert after["running"] is None
    assert all(s["done"] == s["tasks"] and s["bytes_left"] == 0 for s in after["stages"])
    assert "complete" in words(esm_stream("status", work))


def test_quiet_prints_nothing_and_json_one_event_per_line(manifest: Path, tmp_path: Path) -> None:
    quiet = esm_stream("merge", manifest, "--scheduler", "sync", "--quiet")
    assert (quiet.exit_code, quiet.output) == (0, "")
    (tmp_path / "merged.work/done/finish.json").unlink()
    spoken = esm_stream("merge", manifest, "--scheduler", "sync", "--json")
    events = [json.loads(line) for line in spoken.stdout.splitlines()]
    kinds = [event["kind"] for event in events]
    assert kinds == ["run_started", "task_finished", "run_finished"]
    assert len(events[0]["data"]["pending"]) == 1
    assert events[0]["data"]["reused"] > 1
    assert events[1]["task"] == "finish"
    assert spoken.stderr == ""


def test_plain_lines_where_there_is_no_terminal(manifest: Path, tmp_path: Path) -> None:
    result = esm_stream("merge", manifest, "--scheduler", "sync")
    assert "\x1b" not in result.output
    assert "tasks to run, 0 reused" in result.stderr
    assert f"{tmp_path / 'merged'}: complete" in words(result)
    assert esm_stream("merge", manifest, "--scheduler", "sync").output.count("0 tasks run") == 1


def schema() -> dict[str, Any]:
    result = esm_stream("schema")
    assert result.exit_code == 0
    found: dict[str, Any] = json.loads(result.stdout)
    return found


EXAMPLE = """
[base]
model = "models/base"
[[experts]]
name = "math"
model = "models/math"
calibration = "data/math.jsonl"
[[experts]]
name = "code"
model = "models/code"
[calibration]
data = "data/any.jsonl"
samples = 32
[merge]
method = "esm"
alpha = 1.0
options = { profile = "journal" }
[[merge.rules]]
tensors = "re:.*embed_tokens.*"
method = "average"
[output]
path = "merged"
dtype = "base"
shard_size = "base"
[run]
work = "merged.work"
memory = "8GiB"
device = "cpu"
"""


def test_schema_accepts_a_manifest_and_refuses_a_mistyped_key() -> None:
    import tomllib

    import jsonschema

    document, rules = tomllib.loads(EXAMPLE), schema()
    jsonschema.Draft202012Validator.check_schema(rules)
    jsonschema.validate(document, rules)
    jsonschema.validate({**document, "output": {"path": "x", "shard_size": "2GiB"}}, rules)
    for spoilt in (
        {**document, "calibration": {"sample": 3}},
        {**document, "merge": {"options": {"profiles": "journal"}}},
        {**document, "experts": document["experts"][:1]},
        {**document, "run": {"memory": []}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(spoilt, rules)


@pytest.mark.parametrize("command", [[], ["merge"], ["plan"], ["status"], ["demo"], ["schema"]])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_explains_itself(command: list[str], flag: str) -> None:
    result = esm_stream(*command, flag)
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_exit_codes_are_in_the_help() -> None:
    from esm_stream import errors

    text = words(esm_stream("--help"))
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and hasattr(k, "exit_code")]
    for code in {kind.exit_code for kind in kinds}:
        assert re.search(rf"\b{code} [a-z]", text, re.IGNORECASE), code


def test_texts_of_a_shared_file_serve_every_expert(found: Zoo, tmp_path: Path) -> None:
    save_tokenizer(found.base)
    write_texts(tmp_path / "any.jsonl", 4, seed=0, key="body")
    experts = [{"name": name, "model": str(path)} for name, path in found.experts.items()]
    document = found.document(
        tmp_path / "merged",
        experts=experts,
        calibration={"data": "any.jsonl", "text_key": "body"},
    )
    (tmp_path / "m.toml").write_text(toml(document))
    result = esm_stream("merge", tmp_path / "m.toml", "--scheduler", "sync")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "merged/tokenizer.json").is_file()
    assert tensors_of(tmp_path / "merged").keys() == tensors_of(found.base).keys()


def test_mistakes_in_the_samples_of_every_expert_are_told_at_once(
    found: Zoo, tmp_path: Path
) -> None:
    save_tokenizer(found.base)
    experts = []
    for number, (name, path) in enumerate(found.experts.items()):
        samples = tmp_path / f"{name}.jsonl"
        samples.write_text('{"%s": "a b"}\n' % ("body" if number else "text") * 4)
        experts.append({"name": name, "model": str(path), "calibration": str(samples)})
    document = found.document(tmp_path / "merged", experts=experts)
    (tmp_path / "m.toml").write_text(toml(document))
    result = esm_stream("merge", tmp_path / "m.toml", "--scheduler", "sync")
    assert result.exit_code == 4
    for number, name in enumerate(found.experts):
        assert (f"{name}.jsonl" in words(result)) == (number > 0), result.output
    assert not list((tmp_path / "merged").glob("*.safetensors"))


def test_language_models_without_data_run_on_the_generic_texts(found: Zoo, tmp_path: Path) -> None:
    save_tokenizer(found.base)
    experts = [{"name": name, "model": str(path)} for name, path in found.experts.items()]
    settings = {"samples": 5, "max_length": 16}
    document = found.document(tmp_path / "merged", experts=experts, calibration=settings)
    path = write_manifest(tmp_path / "m.toml", document)
    assert "generic texts that come with esm-stream" in words(esm_stream("plan", path))
    result = esm_stream("merge", path, "--scheduler", "sync")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "merged" / "report.json").read_text())
    for data in report["calibration"].values():
        assert data["source"] == "generic texts of esm-stream"
        assert len(data["samples"]) == 5
        assert data["available"] > 200
        assert data["tokens"] == sum(data["tokens_per_sample"]) <= 5 * 16
        assert data["truncated"]
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "generic texts of esm-stream" in card


def test_models_of_images_have_no_generic_data(zoo: MakeZoo, tmp_path: Path) -> None:
    vision = zoo("vit")
    experts = [{"name": name, "model": str(path)} for name, path in vision.experts.items()]
    document = vision.document(tmp_path / "merged", experts=experts)
    result = esm_stream("plan", write_manifest(tmp_path / "m.toml", document))
    assert result.exit_code == 4
    for name in vision.experts:
        assert f'expert "{name}" has no calibration data' in words(result)
    assert "ViTModel takes pixel_values" in words(result)


def test_fewer_samples_than_asked_for_are_used_and_told(found: Zoo, tmp_path: Path) -> None:
    save_tokenizer(found.base)
    write_texts(tmp_path / "few.jsonl", 6, seed=0)
    write_texts(tmp_path / "many.jsonl", 60, seed=0)
    experts = [
        {"name": name, "model": str(path), "calibration": source}
        for (name, path), source in zip(
            found.experts.items(), ("few.jsonl", "many.jsonl"), strict=True
        )
    ]
    document = found.document(tmp_path / "merged", experts=experts)
    path = write_manifest(tmp_path / "m.toml", document)
    assert esm_stream("merge", path, "--scheduler", "sync").exit_code == 0
    report = json.loads((tmp_path / "merged" / "report.json").read_text())
    told = [line for line in report["warnings"] if "samples" in line]
    assert told == ['expert "expert0": 6 samples of calibration data, 32 were asked for']


def test_grey_images_become_what_the_model_takes(tmp_path: Path) -> None:
    vision = make_zoo(tmp_path / "zoo", "vit", num_channels=3)
    save_image_processor(vision.base)
    grey = np.random.default_rng(0).integers(0, 255, (5, 20, 24), dtype=np.uint8)
    np.savez(tmp_path / "grey.npz", images=grey)
    experts = [{"name": name, "model": str(path)} for name, path in vision.experts.items()]
    document = vision.document(
        tmp_path / "merged", experts=experts, calibration={"data": "grey.npz"}
    )
    (tmp_path / "m.toml").write_text(toml(document))
    result = esm_stream("merge", tmp_path / "m.toml", "--scheduler", "sync")
    assert result.exit_code == 0, result.output
