"""Changed files are taken or refused as what they are; never a crash, a hang or much memory.

tests/fuzz_parsers.py goes on for as long as one likes, guided by coverage.
"""

import random
import resource
import time
from pathlib import Path

import pytest
from parsers import TARGETS, feed, mutated

MIB = 1 << 20


def test_every_target_takes_a_document_of_its_own(tmp_path: Path) -> None:
    for name in ("header", "index", "config", "manifest", "marker", "marker with its hash"):
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        assert feed(name, folder, TARGETS[name].documents[0]), name


@pytest.mark.parametrize(
    "count", [150, pytest.param(10_000, marks=pytest.mark.slow)], ids=["few", "many"]
)
@pytest.mark.parametrize("name", TARGETS)
def test_changed_documents_are_taken_or_refused(name: str, count: int, tmp_path: Path) -> None:
    generator = random.Random(f"{name} {count}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for _ in range(count):
        data = mutated(generator.choice(TARGETS[name].documents), generator)
        started = time.process_time()
        feed(name, tmp_path, data)
        assert time.process_time() - started < 5, data[:200]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < 200 * MIB
