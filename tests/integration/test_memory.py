"""The plan's memory is a promise: anonymous memory of a whole process, watched from outside."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Zoo, make_zoo, write_manifest

from esm_stream.budget import MIB, format_size
from esm_stream.manifest import load_manifest
from esm_stream.planning.make import make_plan

pytestmark = pytest.mark.slow

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "num_key_value_heads": 4, "vocab_size": 8000},
    "vit": {**SIZES, "image_size": 64, "patch_size": 8},
}
# Everything that a merge imports and starts before its first task, and then waits for an answer.
IMPORT = """
import sys, torch, transformers, zarr, dask, distributed
from pathlib import Path
from esm_stream import engine, schedule
from esm_stream.manifest import load_manifest
from esm_stream.planning.make import make_plan
from esm_stream.stages import finish, forward, inputs, merge, scale, stem, write
plan = make_plan(load_manifest(Path(sys.argv[1])))
with schedule._local_client(plan.memory, 1):
    print("ready", flush=True)
    sys.stdin.readline()
"""
MERGE = "from esm_stream_cli.app import app; app()"
SAMPLE_SECONDS = 0.01


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process, 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def import_base(manifest: Path) -> int:
    """Anonymous memory of a process that has planned and could start its first task."""
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORT, str(manifest)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    size = anonymous_bytes(process.pid)
    process.communicate("\n")
    return size


def peak_of(command: list[str]) -> int:
    """Largest anonymous memory of a process while it runs."""
    process = subprocess.Popen(command)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(SAMPLE_SECONDS)
    assert process.returncode == 0
    return peak


@pytest.fixture(scope="module", params=MODELS)
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Three bf16 experts of 512 features and 4 blocks."""
    return make_zoo(
        tmp_path_factory.mktemp(request.param),
        request.param,
        experts=3,
        dtype=torch.bfloat16,
        shard="20MB",
        noise=0.05,
        **MODELS[request.param],
    )


@pytest.mark.parametrize(
    "merge",
    [
        {"method": "esm"},
        {"method": "esm", "options": {"profile": "vit-official"}},
        {"method": "owl"},
        {"method": "owl", "options": {"inputs": "none"}},
        {"method": "average"},
    ],
    ids=["esm", "official", "owl", "owl-none", "average"],
)
def test_a_merge_stays_within_its_largest_task(
    merge: dict[str, Any], large: Zoo, tmp_path: Path
) -> None:
    document = large.document(tmp_path / "merged", merge=merge)
    manifest = write_manifest(tmp_path / "manifest.toml", document)
    plan = make_plan(load_manifest(manifest))
    largest = max(plan.tasks.values(), key=lambda task: task.peak_bytes)
    base = import_base(manifest)
    peak = peak_of([sys.executable, "-c", MERGE, "merge", str(manifest), "--quiet"])
    used = peak - base
    print(
        f"base {format_size(base)}, used {format_size(used)}, promised "
        f"{format_size(largest.peak_bytes)} ({largest.key})"
    )
    assert used <= largest.peak_bytes, f"{format_size(used)} used, {largest.key}"
    # A promise so large that nothing could break it would be none.
    assert largest.peak_bytes < 1024 * MIB
