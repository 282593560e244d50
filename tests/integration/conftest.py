"""Zoos are made once per session; tests that spoil one take a copy."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Zoo, make_zoo, write_manifest

from esm_stream import stopping
from esm_stream.engine import Outcome, merge
from esm_stream.events import Listener
from esm_stream.manifest import load_manifest
from esm_stream.planning.make import make_plan
from esm_stream.planning.plan import Plan

MakeZoo = Callable[..., Zoo]
PlanOf = Callable[..., Plan]
Run = Callable[..., Path]


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> MakeZoo:
    """A function (architecture, **options of make_zoo) -> Zoo; equal calls share the files."""
    made: dict[str, Zoo] = {}

    def make(name: str, **options: Any) -> Zoo:  # noqa: ANN401
        key = f"{name} {json.dumps(options, sort_keys=True, default=str)}"
        if key not in made:
            made[key] = make_zoo(tmp_path_factory.mktemp(name), name, **options)
        return made[key]

    return make


@pytest.fixture
def plan_of(tmp_path: Path) -> PlanOf:
    """A function (zoo, output name, **sections) -> Plan of a manifest written in tmp_path."""

    def make(zoo: Zoo, name: str = "merged", /, **sections: Any) -> Plan:  # noqa: ANN401
        document = zoo.document(tmp_path / name, **sections)
        path = write_manifest(tmp_path / f"{name}.toml", document)
        return make_plan(load_manifest(path))

    return make


@pytest.fixture
def run(plan_of: PlanOf) -> Run:
    """A function that plans and merges without Dask's threads; returns the output directory."""

    def call(zoo: Zoo, name: str = "merged", /, **sections: Any) -> Path:  # noqa: ANN401
        return merge_here(plan_of(zoo, name, **sections)).output

    return call


def merge_here(plan: Plan, listener: Listener = lambda _: None, **options: Any) -> Outcome:  # noqa: ANN401
    """Merge in this thread, task after task."""
    return merge(plan, **{"scheduler": "sync", "listener": listener, **options})


@pytest.fixture(autouse=True)
def _no_wish_to_stop_is_left() -> Iterator[None]:
    stopping.clear()
    yield
    stopping.clear()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Bitwise comparisons need one number of threads everywhere; tiny matrices gain from one."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
