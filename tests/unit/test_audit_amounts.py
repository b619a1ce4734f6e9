"""Amounts as text: exact, and cents that add up. The oracle is Python's Decimal."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spendfuse.audit.amounts import apportion, decimal_text, exact, minor_digits
from spendfuse.audit.reports import Period, ReportError, safe_cell


@given(st.integers(-(2**63), 2**63 - 1))
def test_exact_text_is_the_decimal_of_the_nano_units(nanos: int) -> None:
    text = exact(nanos)
    assert Decimal(text) == Decimal(nanos).scaleb(-9)
    assert len(text.partition(".")[2]) == 9


@given(st.lists(st.integers(0, 2**60), max_size=60), st.sampled_from([0, 2, 3]))
def test_apportioned_amounts_add_up_to_the_rounded_total_and_none_is_off_by_a_whole_unit(
    nanos: list[int], digits: int
) -> None:
    minor = apportion(nanos, digits)
    exact_total = Decimal(sum(nanos)).scaleb(digits - 9)
    assert sum(minor) == int(exact_total.quantize(Decimal(1), ROUND_HALF_UP))
    assert all(
        abs(Decimal(value) - Decimal(each).scaleb(digits - 9)) < 1 for value, each in zip(minor, nanos, strict=True)
    )
    assert apportion(nanos, digits) == minor


def test_three_thirds_of_a_dollar_are_a_dollar() -> None:
    assert apportion([333_333_333, 333_333_333, 333_333_334], 2) == [33, 33, 34]
    assert [decimal_text(value, 2) for value in (0, 5, -5, 123_456)] == ["0.00", "0.05", "-0.05", "1234.56"]
    assert [minor_digits(currency) for currency in ("USD", "JPY", "KWD")] == [2, 0, 3]
    assert decimal_text(-7, 0) == "-7"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "＝1"])  # noqa: RUF001 - the twin is meant
def test_a_text_that_a_spreadsheet_would_calculate_is_text(text: str) -> None:
    assert safe_cell(text) == "'" + text
    assert safe_cell(f"x{text}") == f"x{text}"


def test_a_month_and_days_are_whole_days_in_utc() -> None:
    assert Period.month("2024-02") == Period.days("2024-02-01", "2024-02-29")
    assert str(Period.month("2026-12")) == "2026-12-01 to 2026-12-31"


@pytest.mark.parametrize(
    ("say", "words"),
    [
        (lambda: Period.month("2026-13"), "2026-13"),
        (lambda: Period.month("2026-1"), "such as 2026-11"),
        (lambda: Period.month("0000-01"), "year 0"),
        (lambda: Period.month("9999-12"), "year 9999"),
        (lambda: Period.days("2026-11-02", "2026-11-01"), "exchange"),
        (lambda: Period.days("yesterday", "2026-11-01"), "yesterday"),
        (lambda: Period.days("2026-11-01", "9999-12-31"), "year 9999"),
    ],
)
def test_a_period_that_is_none_is_a_sentence(say: object, words: str) -> None:
    with pytest.raises(ReportError, match=words):
        say()  # type: ignore[operator]
