"""Markers and files against a dictionary: what was left is known, all else is not."""

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from esm_stream.store.work import WorkDirectory

KEYS = st.sampled_from(["inputs/a", "forward/a/0000", "merge/x.{q,k}", "write/model-1/0000"])
CONTENTS = st.binary(min_size=1, max_size=20)


class MarkersAndFiles(RuleBasedStateMachine):
    """Tasks finish, are forgotten, run again, and are damaged, in any order, over restarts."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.open_again()
        self.fingerprints: dict[str, str] = {}
        self.written: dict[str, bytes] = {}
        self.there: dict[str, bytes] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def path(self, key: str) -> Path:
        return self.directory.root / "hidden" / key.replace("/", "-")

    @rule()
    def open_again(self) -> None:
        """Another process: nothing is known but what is on the disk."""
        self.directory = WorkDirectory(self.folder / "work", self.folder / "out")
        self.directory.root.mkdir(exist_ok=True)
        self.directory.output.mkdir(exist_ok=True)
        self.directory.sweep()

    @rule(key=KEYS, content=CONTENTS, fingerprint=st.sampled_from("fg"))
    def finish(self, key: str, content: bytes, fingerprint: str) -> None:
        path = self.path(key)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        self.directory.finish(key, fingerprint, [self.directory.record(path)], {"n": 1}, 0.5)
        self.fingerprints[key] = fingerprint
        self.written[key] = self.there[key] = content

    @rule(key=KEYS, content=CONTENTS)
    def is_killed_before_its_marker(self, key: str, content: bytes) -> None:
        """What a run does before it writes anything of a task: its marker goes first."""
        self.directory.forget([key])
        self.fingerprints.pop(key, None)
        path = self.path(key)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        path.with_name("esm-0123456789abcdef.tmp").write_bytes(content)
        self.there[key] = content

    @rule(keys=st.lists(KEYS, unique=True))
    def forget(self, keys: list[str]) -> None:
        self.directory.forget(keys)
        for key in keys:
            self.fingerprints.pop(key, None)

    @rule(key=KEYS, content=CONTENTS)
    def damage_file(self, key: str, content: bytes) -> None:
        if key in self.there:
            self.path(key).write_bytes(content)
            self.there[key] = content

    @rule(key=KEYS)
    def lose_file(self, key: str) -> None:
        if key in self.there:
            self.path(key).unlink()
            del self.there[key]

    @rule(key=KEYS, place=st.integers(0, 10**6), bit=st.integers(0, 7))
    def damage_marker(self, key: str, place: int, bit: int) -> None:
        path = self.directory.marker(key)
        if key in self.fingerprints:
            content = bytearray(path.read_bytes())
            content[place % len(content)] ^= 1 << bit
            path.write_bytes(bytes(content))
            del self.fingerprints[key]

    @invariant()
    def what_is_said_of_a_task_is_what_it_left(self) -> None:
        for key in ("inputs/a", "forward/a/0000", "merge/x.{q,k}", "write/model-1/0000"):
            marker = self.directory.read(key)
            if key not in self.fingerprints:
                assert marker is None
                continue
            assert marker is not None
            assert (marker.fingerprint, marker.results) == (self.fingerprints[key], {"n": 1})
            found = self.there.get(key)
            whole = self.directory.damage(marker.outputs[0]) is None
            assert whole == (found == self.written[key])
            same_size = found is not None and len(found) == len(self.written[key])
            assert self.directory.all_exist(marker.products) == same_size


TestMarkersAndFiles = MarkersAndFiles.TestCase
TestMarkersAndFiles.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
