"""What a usage costs, against exact fractions and the worked examples of the facts page."""

from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factories import MILLION, NOW, SECOND, book, rates, row, usage
from spendfuse.engine.prices import PriceBook, round_half_even, rows_sha256
from spendfuse.wire.base import NANOS_MAX, TOKENS_MAX, from_us
from spendfuse.wire.prices import LongContext, PriceBookFile, PriceOverride, PriceRow, Rates
from spendfuse.wire.usage import Tokens

COUNTERS = ("input", "cache_read", "cache_write_5m", "cache_write_1h", "output")
SONNET = Rates(input=3 * 10**9, cache_read=3 * 10**8, cache_write_5m=375 * 10**7, cache_write_1h=6 * 10**9,
               output=15 * 10**9)  # fmt: skip


def cost(prices: PriceBook, **more: Any) -> int:
    return prices.charge(usage(**more)).cost_nanos


def override(price_row: PriceRow, name: str = "o") -> PriceOverride:
    return PriceOverride(id=name, row=price_row)


def test_the_sample_calls_cost_what_the_providers_say() -> None:
    sonnet = row("claude-sonnet-4-6", "anthropic", rates=SONNET)
    tokens = Tokens(input=1_200, cache_read=17_000, cache_write_5m=1_000, cache_write_1h=2_000, output=800)
    who = {"provider": "anthropic", "model": "claude-sonnet-4-6"}
    assert cost(book(sonnet), tokens=tokens, **who) == 36_450_000
    as_5m = Tokens(input=1_200, cache_read=17_000, cache_write_5m=3_000, output=800)
    assert cost(book(sonnet), tokens=as_5m, **who) == 31_950_000


def test_the_long_context_threshold_is_strictly_above_and_counts_caches() -> None:
    base = Rates(input=3 * 10**9, cache_read=3 * 10**8, cache_write_5m=0, cache_write_1h=0, output=15 * 10**9)
    long = Rates(input=6 * 10**9, cache_read=6 * 10**8, cache_write_5m=0, cache_write_1h=0, output=225 * 10**8)
    prices = book(row(rates=base, above=LongContext(threshold=200_000, rates=long)))
    assert cost(prices, tokens=Tokens(input=200_000, output=1_000)) == 615_000_000
    assert cost(prices, tokens=Tokens(input=200_001, output=1_000)) == 1_222_506_000
    assert cost(prices, tokens=Tokens(input=10_000, cache_read=240_000, output=1_000)) == 226_500_000
    assert cost(prices, tokens=Tokens(input=1, output=900_000)) == 3_000 + 900 * 15 * 10**6, "output has no threshold"


@given(st.integers(0, 10**30))
def test_rounding_is_half_even(femto: int) -> None:
    exact = Decimal(femto).scaleb(-6)
    with_all_digits = exact.quantize(Decimal(1), ROUND_HALF_EVEN) if femto < 10**20 else None
    found = round_half_even(femto)
    assert abs(Fraction(found) - Fraction(femto, MILLION)) <= Fraction(1, 2)
    if with_all_digits is not None:
        assert found == int(with_all_digits)


@pytest.mark.parametrize(("femto", "nanos"), [(0, 0), (499_999, 0), (500_000, 0), (500_001, 1), (1_500_000, 2),
                                              (2_500_000, 2), (2_500_001, 3), (3_500_000, 4)])  # fmt: skip
def test_halves_go_to_the_even_neighbour(femto: int, nanos: int) -> None:
    assert round_half_even(femto) == nanos


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, TOKENS_MAX), min_size=5, max_size=5),
    st.lists(st.integers(0, 10**15), min_size=5, max_size=5),
)
def test_a_charge_is_rounded_once_and_can_be_computed_again_from_what_it_carries(
    tokens: list[int], each: list[int]
) -> None:
    prices = book(row(rates=Rates(**dict(zip(COUNTERS, each, strict=True)))))
    charge = prices.charge(usage(tokens=Tokens(**dict(zip(COUNTERS, tokens, strict=True)))))
    exact = sum((Fraction(count * rate, MILLION) for count, rate in zip(tokens, each, strict=True)), Fraction())
    assert charge.cost_nanos == round(exact), "Python rounds fractions half to even too"
    assert charge.cost_nanos <= NANOS_MAX
    assert (list(charge.rates), charge.priced_by, charge.tier_known) == (each, "book", True)


def test_a_dated_row_holds_from_its_first_instant_until_its_last_exclusive() -> None:
    prices = book(
        row(each=2 * MILLION, valid_to=from_us(NOW)),
        row(each=3 * MILLION, valid_from=from_us(NOW), valid_to=from_us(NOW + SECOND)),
        row("other", each=50 * MILLION),
    )
    assert cost(prices, ts_us=NOW - 1) == 2
    assert cost(prices, ts_us=NOW) == 3
    assert cost(prices, ts_us=NOW + SECOND - 1) == 3
    assert prices.charge(usage(ts_us=NOW + SECOND)).priced_by == "ceiling"
    assert cost(prices, ts_us=NOW + SECOND) == 50


def test_an_unknown_tier_costs_the_standard_price_and_says_so() -> None:
    prices = book(row(), row(tier="batch", each=MILLION // 2), row("only-batch", tier="batch"))
    found = {tier: prices.charge(usage(output=10, tier=tier)) for tier in ("standard", "batch", "turbo")}
    assert {tier: (charge.cost_nanos, charge.tier_known) for tier, charge in found.items()} == {
        "standard": (10, True),
        "batch": (5, True),
        "turbo": (10, False),
    }
    assert prices.charge(usage(model="only-batch")).priced_by == "ceiling"
    assert not prices.knows("openai", "only-batch")
    assert prices.knows("openai", "known")
    assert not prices.knows("openai", "unknown")


def test_an_unknown_model_costs_the_dearest_rates_of_its_provider_and_an_unknown_provider_the_dearest_of_all() -> None:
    prices = book(
        row("a", rates=rates(1, output=90 * MILLION)),
        row("b", rates=rates(5 * MILLION), above=LongContext(threshold=9, rates=rates(7 * MILLION))),
        row("c", "other", rates=rates(100 * MILLION)),
    )
    seen = prices.charge(usage(model="new", tokens=Tokens(input=1, cache_read=1, output=1)))
    assert (seen.cost_nanos, seen.priced_by) == (7 + 7 + 90, "ceiling")
    assert cost(prices, provider="nobody", model="a") == 100


def test_an_unknown_model_is_never_free_even_at_a_provider_that_charges_nothing() -> None:
    free = Rates(input=0, cache_read=0, cache_write_5m=0, cache_write_1h=0, output=0)
    prices = book(row("tiny", "local", rates=free), row("big", rates=rates(0, input=4 * MILLION, output=9 * MILLION)))
    assert cost(prices, provider="local", model="tiny") == 0, "what the book calls free is free"
    for provider in ("local", "openai", "nobody"):
        for counter in COUNTERS:
            charged = cost(prices, provider=provider, model="new", tokens=Tokens(**{counter: 1}))
            assert charged == (9 if counter == "output" else 4), (provider, counter)


def test_an_override_comes_before_the_book_by_whatever_name_it_matches() -> None:
    prices = book(
        row("known-mini"),
        row("known", models=["known-2*"]),
        overrides=[override(row("anything", each=8 * MILLION, models=["known*"]))],
    )
    for model in ("known", "known-mini", "known-2026"):
        charge = prices.charge(usage(model=model))
        assert (charge.cost_nanos, charge.priced_by) == (8, "override")


def test_an_override_of_one_tier_or_time_leaves_the_others_to_the_book() -> None:
    prices = book(
        row("family", each=2 * MILLION, models=["known*"]),
        overrides=[
            override(row("known-1", tier="batch", each=9 * MILLION), "a"),
            override(row("known-2", each=7 * MILLION, valid_from=from_us(NOW)), "b"),
        ],
    )
    assert cost(prices, model="known-1", tier="batch") == 9
    assert cost(prices, model="known-1") == 2
    assert cost(prices, model="known-2", ts_us=NOW) == 7
    assert cost(prices, model="known-2", ts_us=NOW - 1) == 2


def test_the_nearest_name_of_the_book_decides_and_a_stranger_is_not_guessed() -> None:
    prices = book(
        row("x", each=MILLION, models=["gpt*"]),
        row("y", each=2 * MILLION, models=["gpt-5*", "exact"]),
        row("gpt-5-mini", each=3 * MILLION, valid_from=from_us(NOW)),
        row("dear", each=70 * MILLION),
    )
    assert [cost(prices, model=model) for model in ("gpt-4", "gpt-5", "gpt-5-mini", "exact")] == [1, 2, 3, 2]
    assert cost(prices, model="gpt-5-mini", ts_us=NOW - 1) == 70, "its own price is not yet known: the ceiling"


def test_a_flood_of_unknown_names_does_not_grow_the_memory() -> None:
    prices = book()
    for nth in range(10_050):
        prices.charge(usage(model=f"m{nth}"))
    assert len(prices._cache) <= 10_000
    assert cost(prices) == 1


def test_the_version_names_the_rows_and_the_overrides_by_content_in_any_order() -> None:
    rows = [row(), row("b")]
    file = PriceBookFile(book="2026-11-23", sha256=rows_sha256(rows), source="test", currency="USD", rows=rows)
    first, second = override(row("c"), "a"), override(row("d"), "b")
    plain = PriceBook.compile(file)
    both = {PriceBook.compile(file, order).version for order in ([first, second], [second, first])}
    assert plain.version == f"2026-11-23+{rows_sha256(rows)[:12]}"
    assert len(both) == 1
    assert plain.version not in both
    assert PriceBook.compile(file, [first]).version not in both
