"""One run at a time per work directory."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from esm_stream.errors import LockedError
from esm_stream.store.lock import is_locked, locked


def test_a_held_lock_is_refused_with_its_holder(tmp_path: Path) -> None:
    with locked(tmp_path):
        with pytest.raises(LockedError) as error, locked(tmp_path):
            pytest.fail("two hold one lock")
        assert f"process {os.getpid()} on {socket.gethostname()}" in str(error.value)
        assert "esm-stream status" in str(error.value)
        assert f"process {os.getpid()}" in str(is_locked(tmp_path))
    assert is_locked(tmp_path) is None


def test_a_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), locked(tmp_path):
        raise RuntimeError
    with locked(tmp_path):
        pass


def test_a_lock_file_left_behind_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text('{"pid": 1, "host": "elsewhere", "since": "2020"}')
    assert is_locked(tmp_path) is None
    with locked(tmp_path):
        assert f"process {os.getpid()}" in str(is_locked(tmp_path))


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from esm_stream.store.lock import locked\n"
        "with locked(Path(sys.argv[1])): os._exit(9)"
    )
    assert (
        subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode == 9
    )
    assert (tmp_path / "lock").is_file()
    with locked(tmp_path):
        pass


def test_an_unreadable_holder_is_still_a_holder(tmp_path: Path) -> None:
    with locked(tmp_path):
        (tmp_path / "lock").write_bytes(b"\xff")
        assert is_locked(tmp_path) == "another process"


def test_asking_for_the_holder_makes_no_files(tmp_path: Path) -> None:
    assert is_locked(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()
    assert is_locked(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
