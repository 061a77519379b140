"""Quantities: exact reading, honest printing, and an error with examples for everything else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cahfp_cli.device.quantities import (
    Count,
    Share,
    format_bytes,
    format_count,
    format_limit,
    format_seconds,
    parse_bytes,
    parse_limit,
    parse_seconds,
    parse_share,
)
from cahfp_cli.errors import UsageError

pytestmark = pytest.mark.quick

NO_PERCENTAGES = ("0%", "101%", "100.0001%", "5 0%", "nan%", "inf%", "%", "-50%", "50%%", "50%M", "50M%", "1e30%")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5ms", 0.005), ("1.5s", 1.5), ("200us", 200e-6), ("200µs", 200e-6), ("7ns", 7e-9), (" 2 s ", 2.0), ("3", 3.0)],
)
def test_times_are_read_in_seconds(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64MB", 64 * 10**6),
        ("2MiB", 2 * 2**20),
        ("512KB", 512_000),
        ("512kB", 512_000),
        ("1.5GiB", 3 * 2**29),
        ("0.1MB", 100_000),
        ("1e3KB", 10**6),
        ("4096", 4096),
        ("1.9B", 1),
    ],
)
def test_sizes_are_exact_and_never_rounded_up(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("0.5", Share(0.5)),
        ("1", Share(1.0)),
        ("30M", Count(30_000_000)),
        ("1.2G", Count(1_200_000_000)),
        ("0.5M", Count(500_000)),
        ("250", Count(250)),
        ("1K", Count(1000)),
    ],
)
def test_limits_up_to_one_are_shares_and_above_it_counts(text: str, limit: Share | Count) -> None:
    assert parse_limit(text) == limit


@pytest.mark.parametrize(
    ("percentage", "share"),
    [("50%", "0.5"), ("100%", "1"), ("33.3%", "0.333"), ("0.1%", "0.001"), (" 7 % ", "0.07"), ("1e1%", "0.1")],
)
def test_a_percentage_is_the_very_share_wherever_shares_are_taken(percentage: str, share: str) -> None:
    assert parse_share(percentage) == parse_share(share)
    assert parse_limit(percentage) == parse_limit(share)


@pytest.mark.parametrize("text", ["50%"])
def test_times_and_sizes_are_no_percentages(text: str) -> None:
    for parse in (parse_seconds, parse_bytes):
        with pytest.raises(UsageError):
            parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ms",
        "5 parsec",
        "-5ms",
        "0ms",
        "nan",
        "inf",
        "5MB",
        "1e999s",
        "0x10",
        "5ms6",
        "\N{ARABIC-INDIC DIGIT FIVE}ms",
    ],
)
def test_what_is_not_a_time_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UsageError, match="5ms"):
        parse_seconds(text)


@pytest.mark.parametrize("text", ["", "64 mebibytes", "64Mb", "-1MB", "0", "0.5B", "infMB", "64MBps"])
def test_what_is_not_a_size_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UsageError, match="64MB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["", "1.5", "0", "-0.5", *NO_PERCENTAGES, "nan", "0.0000001K"])
def test_what_is_not_a_limit_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UsageError, match="30M"):
        parse_limit(text)


@pytest.mark.parametrize("text", ["0", "1.01", "2", *NO_PERCENTAGES, "-1", "0.5M", "nan"])
def test_what_is_not_a_share_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UsageError, match=r"0\.25"):
        parse_share(text)


@given(st.floats(1e-9, 1e6))
def test_printed_seconds_read_back_to_three_digits(seconds: float) -> None:
    assert parse_seconds(format_seconds(seconds)) == pytest.approx(seconds, rel=5.1e-3)


@given(st.integers(1, 10**15))
def test_printed_bytes_read_back_to_three_digits(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=5.1e-3)


@given(st.integers(2, 10**12))
def test_printed_counts_read_back_to_three_digits(count: int) -> None:
    limit = parse_limit(format_count(count))
    assert isinstance(limit, Count)
    assert limit.value == pytest.approx(count, rel=5.1e-3)


@given(st.integers(1, 10**9), st.sampled_from([("KB", 10**3), ("MB", 10**6), ("KiB", 2**10), ("MiB", 2**20)]))
def test_whole_numbers_of_a_unit_are_exact(number: int, unit: tuple[str, int]) -> None:
    assert parse_bytes(f"{number}{unit[0]}") == number * unit[1]


@given(st.text(max_size=12))
def test_any_other_text_is_a_usage_error_and_nothing_else(text: str) -> None:
    for parse in (parse_seconds, parse_bytes, parse_limit, parse_share):
        try:
            parse(text)
        except UsageError as error:
            assert "write for example" in str(error)


def test_printing_chooses_the_unit_after_rounding() -> None:
    assert format_bytes(999_999) == "1 MB"
    assert format_bytes(1_500_000) == "1.5 MB"
    assert format_bytes(12) == "12 B"
    assert format_seconds(0.0123456) == "12.3 ms"
    assert format_seconds(0) == "0 ns"
    assert format_count(11_173_962) == "11.2M"
    assert format_count(7) == "7"
    assert format_limit(Share(0.5)) == "50%"
    assert format_limit(Count(30_000_000)) == "30M"
