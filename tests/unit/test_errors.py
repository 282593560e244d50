"""Errors keep what they say on their way back from another process."""

import pickle

import pytest

from esm_stream import errors
from esm_stream.errors import EsmStreamError, InputError

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, EsmStreamError) and kind is not InputError
]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_pickling(kind: type[EsmStreamError]) -> None:
    again = pickle.loads(pickle.dumps(kind("what to do")))
    assert type(again) is kind
    assert str(again) == "what to do"


def test_input_errors_keep_their_list() -> None:
    again = pickle.loads(pickle.dumps(InputError(["one file", "another"])))
    assert again.problems == ("one file", "another")
    assert str(again) == "one file\nanother"


def test_every_kind_has_its_own_exit_code() -> None:
    codes = [kind.exit_code for kind in (*KINDS, InputError)]
    assert len(set(codes)) == len(codes)
