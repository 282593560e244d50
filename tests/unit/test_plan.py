"""The plan as data: order, fingerprints, changed keys, and a round trip through its file."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esm_stream.calibration.steps import Step
from esm_stream.planning.plan import (
    ForwardPlan,
    Matrix,
    MethodChoice,
    Part,
    Plan,
    Task,
    TensorPlan,
    changed_keys,
    digest,
    flatten,
    load_plan,
    save_plan,
    topological,
)
from esm_stream.store.files import sealed


def task(key: str, *after: str) -> Task:
    return Task(key, "merge", after, "f" + key)


@given(count=st.integers(1, 12), seed=st.integers(0, 2**16))
def test_tasks_come_after_those_they_depend_on(count: int, seed: int) -> None:
    generator = random.Random(seed)
    keys = [str(i) for i in range(count)]
    tasks = [
        task(k, *generator.sample(keys[:i], generator.randint(0, i))) for i, k in enumerate(keys)
    ]
    generator.shuffle(tasks)
    ordered = topological(tasks)
    assert set(ordered) == set(keys)
    place = {key: i for i, key in enumerate(ordered)}
    assert all(place[a] < place[k] for k, t in ordered.items() for a in t.after)


def test_independent_tasks_keep_their_order() -> None:
    assert list(topological([task("c"), task("a"), task("b", "c")])) == ["c", "a", "b"]


def test_a_circle_is_refused() -> None:
    with pytest.raises(ValueError, match="circle"):
        topological([task("a", "b"), task("b", "a"), task("c")])


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), JSON, max_size=5))
def test_a_fingerprint_does_not_depend_on_the_order_of_keys(document: dict[str, Any]) -> None:
    turned = dict(reversed(list(document.items())))
    assert digest("stage", document) == digest("stage", turned)
    assert digest("stage", document) != digest("other", document)
    assert digest("stage", document) != digest("stage", document, None)


def test_fingerprints_stay_the_same_between_versions() -> None:
    """A changed value makes every work directory in the world start anew: raise SCHEMA with it."""
    expected = "610cc31ca43bccae"
    found = digest("merge", {"a": 1, "b": [1.5, "x", None]}, ["parent"])
    assert len(found) == 64
    assert found == digest("merge", {"b": [1.5, "x", None], "a": 1}, ["parent"])
    assert found[:16] == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"a": "1"}),
        ({"a": 1}, {"b": 1}),
        ({"a": [1, 2]}, {"a": [2, 1]}),
        ({"a": [[1], 2]}, {"a": [1, [2]]}),
        ({"a": None}, {}),
        ({"a": 0.1}, {"a": 0.1 + 1e-17 + 2e-17}),
    ],
)
def test_different_values_have_different_fingerprints(one: object, other: object) -> None:
    assert digest(one) != digest(other)


def test_values_that_json_has_no_number_for_have_no_fingerprint() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        digest(float("nan"))


MANIFEST: dict[str, Any] = {
    "base": {"model": "/b", "skip": []},
    "experts": [{"name": "math", "model": "/m"}, {"name": "code", "model": "/c"}],
    "merge": {"alpha": 1.0, "options": {"levels": ["task"]}, "rules": []},
    "output": {"path": "/out", "dtype": "base"},
    "run": {"memory": 8, "device": "cpu"},
}


def changed(*path: str | int, to: object) -> list[str]:
    document = copy.deepcopy(MANIFEST)
    here: Any = document
    for step in path[:-1]:
        here = here[step]
    here[path[-1]] = to
    return changed_keys(MANIFEST, document)


def test_changed_keys_are_named_with_both_values() -> None:
    assert changed_keys(MANIFEST, copy.deepcopy(MANIFEST)) == []
    assert changed("merge", "alpha", to=0.8) == ["merge.alpha: 1.0 -> 0.8"]
    assert changed("experts", 1, "model", to="/d") == ["experts[code].model: '/c' -> '/d'"]
    assert changed("merge", "options", "levels", to=["layer"]) == [
        "merge.options.levels[0]: 'task' -> 'layer'"
    ]
    assert changed("merge", "options", "rank", to=3) == ["merge.options.rank: (absent) -> 3"]
    assert changed("experts", 0, "name", to="logic") == [
        "experts[logic].model: (absent) -> '/m'",
        "experts[logic].name: (absent) -> 'logic'",
        "experts[math].model: '/m' -> (absent)",
        "experts[math].name: 'math' -> (absent)",
    ]


def test_keys_of_where_and_how_bind_nothing() -> None:
    assert changed("run", "memory", to=1) == []
    assert changed("run", "device", to="cuda") == []
    assert changed("output", "path", to="/elsewhere") == []
    assert changed("output", "dtype", to="bfloat16") != []


def test_flatten_names_leaves_by_their_path() -> None:
    assert dict(flatten({"a": {"b": 1}, "c": [1, {"name": "x", "d": 2}], "e": [], "f": {}})) == {
        "a.b": 1,
        "c[0]": 1,
        "c[x].name": "x",
        "c[x].d": 2,
        "e": [],
    }


def test_a_plan_reads_back_as_it_was_written(tmp_path: Path) -> None:
    choice = MethodChoice("esm", {"rank": 3, "levels": ["task"]}, "language")
    matrix = Matrix(
        "m",
        (Part("t", 4), Part("u", 2)),
        6,
        5,
        True,
        "role",
        0,
        choice,
        1.5,
        3,
        True,
        "shift",
        "x.y",
    )
    plan = Plan(
        version="1",
        schema=1,
        source="/m.toml",
        manifest=MANIFEST,
        base=Path("/b"),
        experts={"math": Path("/m"), "code": Path("/c")},
        work=tmp_path,
        output=tmp_path / "out",
        output_dtype="base",
        shard_size=5,
        memory=7,
        modality="language",
        forward=ForwardPlan(
            "chain",
            "",
            (Step("layers.0"), Step("layers.1")),
            12,
            1024,
            "bfloat16",
            ("embed.weight",),
            (),
            ("pixel_values",),
            3072,
        ),
        matrices={"m": matrix},
        tensors={"t": TensorPlan("t", "factors", 1.5, choice, ("m",), "target")},
        tasks={
            "a": Task(
                "a",
                "forward",
                (),
                "f",
                reads=("t",),
                writes=("w",),
                read_bytes=1,
                write_bytes=2,
                kept_bytes=2,
                flops=3.5,
                peak_bytes=4,
                expert="math",
                block=0,
            ),
            "b": Task("b", "write", ("a",), "g", tensors=("t",), subject="s", write_bytes=9),
        },
        notes=("note",),
    )
    save_plan(plan)
    path = plan.directory.plan
    found = load_plan(path)
    assert found == plan
    assert found.dump() == plan.dump()
    assert list(found.experts) == ["math", "code"]
    assert (found.read_bytes, found.work_bytes, found.output_bytes, found.peak_bytes) == (
        1,
        2,
        9,
        4,
    )
    assert matrix.group == "role@6x5"
    content = path.read_bytes()
    assert json.loads(content)["work"] == str(plan.work)
    for place in range(0, len(content), 37):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(ValueError, match="not what was written"):
            load_plan(path)


def test_a_plan_that_changed_on_disk_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for content in (b"{}", b"[]", b"not json"):
        path.write_bytes(content if content == b"not json" else sealed(content))
        with pytest.raises(ValueError, match=r"Plan|JSON|not what was written"):
            load_plan(path)
