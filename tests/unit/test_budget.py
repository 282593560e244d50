"""Sizes as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esm_stream.budget import format_flops, format_size, parse_size
from esm_stream.errors import ManifestError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * 2**30),
        ("500MB", 500 * 10**6),
        ("500 mb", 500 * 10**6),
        ("1.5 KiB", 1536),
        ("1048576", 1048576),
        (1048576, 1048576),
        ("2TB", 2 * 10**12),
        (" 3 B ", 3),
    ],
)
def test_sizes_are_read_with_their_units(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "8 bananas", "-1GB", "0", "0.2 B", "1e9", "1,5GB", "8GiB8"]
)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ManifestError, match='is not a size; write for example "8GiB"'):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1536, "1.50 KiB"),
        (20 * 2**20, "20.0 MiB"),
        (8 * 2**30, "8.00 GiB"),
        (334 * 10**9, "311 GiB"),
        (5 * 2**40, "5.00 TiB"),
    ],
)
def test_sizes_are_shown_with_three_digits(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(1, 2**50))
def test_a_size_that_is_shown_reads_back_to_within_its_digits(size: int) -> None:
    assert parse_size(format_size(size)) == pytest.approx(size, rel=6e-3)


@pytest.mark.parametrize(
    ("flops", "text"),
    [(12, "12 FLOP"), (3.4e9, "3.4 GFLOP"), (2.5e15, "2.5 PFLOP"), (5e18, "5,000 PFLOP")],
)
def test_operations_are_shown_with_their_unit(flops: float, text: str) -> None:
    assert format_flops(flops) == text
