"""Every architecture's streamed forward is that of `from_pretrained`, bit for bit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from proof import prove
from table import PAGE, lines_of


def cases() -> list[Any]:
    """All architectures; those that are not in the fast subset are marked slow."""
    return [
        pytest.param(name, marks=[] if architecture.fast else [pytest.mark.slow])
        for name, architecture in ARCHITECTURES.items()
    ]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """One thread: bits depend on the number of threads, and tiny matrices gain from one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", cases())
def test_streamed_forward_is_the_plain_models(name: str, tmp_path: Path) -> None:
    row = prove(ARCHITECTURES[name], tmp_path)
    mode = lines_of(PAGE)[name].split(" | ")[2]
    assert row.mode == mode, "the docs say another mode: run tests/zoo/table.py"


def test_the_docs_list_exactly_these_architectures() -> None:
    assert list(lines_of(PAGE)) == list(ARCHITECTURES)
