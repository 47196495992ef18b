"""Sizes as users write them."""

from __future__ import annotations

import pytest

from reapc.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("written", "count"),
    [
        ("24GB", 24_000_000_000), ("24GiB", 25_769_803_776), ("24gib", 25_769_803_776), (" 24 GB ", 24_000_000_000),
        ("+24GB", 24_000_000_000), ("24123MiB", 25_294_798_848), ("25294798848B", 25_294_798_848), ("7b", 7),
        ("1.5TB", 1_500_000_000_000), ("0.5KiB", 512), ("498216.21MB", 498_216_210_000), ("0GB", 0),
        ("79.15GiB", 84_986_665_370), ("3KB", 3000), ("0.1TB", 100_000_000_000),
        ("123456789012345678B", 123456789012345678),
    ],
)  # fmt: skip
def test_a_size_with_its_unit(written: str, count: int) -> None:
    assert parse_bytes(written) == count


@pytest.mark.parametrize("written", ["24", 24, " 24 "])
def test_a_number_alone_is_refused_and_both_readings_are_named(written: object) -> None:
    with pytest.raises(ValueError, match=r"24 has no unit: write .*24GB \(24e9 bytes\) or 24GiB \(24 \* 2\*\*30\)"):
        parse_bytes(written)


def test_other_numbers_without_a_unit() -> None:
    with pytest.raises(ValueError, match=r"24\.5 has no unit: .*24\.5GB"):
        parse_bytes(24.5)
    with pytest.raises(ValueError, match="25294798848 has no unit: write the size as 25294798848B"):
        parse_bytes(25294798848)


@pytest.mark.parametrize("written", ["-24GB", "-1", -1, -0.5])
def test_negative_sizes_say_so(written: object) -> None:
    with pytest.raises(ValueError, match=f"{written}'? is negative"):
        parse_bytes(written)


@pytest.mark.parametrize(
    "written",
    [
        "24 gigs", "GB", "", "24GB extra", "1e9", "24e9B", "24,5GB", "24_000MB", "nan", "infGB", "0x18GB", "٢٤GB",
        "2.GB", ".5GB", "24 GB GB", True, False, None, [1], {"gb": 1}, float("nan"), "24PB", "7.5B",
    ],
)  # fmt: skip
def test_nonsense_is_named(written: object) -> None:
    with pytest.raises(ValueError, match="size") as caught:
        parse_bytes(written)
    assert str(written) in str(caught.value)


@pytest.mark.parametrize("written", ["24G", "24Gi", "24g"])
def test_half_a_unit(written: str) -> None:
    with pytest.raises(ValueError, match="write 24GB or 24GiB"):
        parse_bytes(written)


def test_zero_where_it_makes_no_sense() -> None:
    assert parse_bytes("0GB") == 0
    for written in ("0GB", "0B", "0.0001KB"):
        with pytest.raises(ValueError, match="no memory"):
            parse_bytes(written, zero=False)


def test_more_than_any_machine_has() -> None:
    assert parse_bytes("1000000TB") == 10**18
    for written in ("1000001TB", "9" * 500 + "GB"):
        with pytest.raises(ValueError, match="more than"):
            parse_bytes(written)


def test_output_is_in_binary_units() -> None:
    assert format_bytes(25_294_798_848) == "23.6 GiB"
    assert format_bytes(0) == "0 B"
