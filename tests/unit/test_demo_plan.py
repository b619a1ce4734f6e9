"""The weekend's plan: what it costs by itself, before anything runs."""

from fractions import Fraction

import pytest

from spendfuse.adapters import price_book_file
from spendfuse.demo import plan
from spendfuse.demo.weekend import planned_cost

SEED_OPUS_USD_PER_MTOK = {
    "input": Fraction(5),
    "cache_read": Fraction(1, 2),
    "cache_write_5m": Fraction(25, 4),
    "output": Fraction(25),
}


def test_the_plan_costs_47000_dollars_to_the_nano_by_an_independent_sum() -> None:
    total = Fraction(0)
    for agent in plan.weekend():
        for call in agent.calls():
            for counter, usd in SEED_OPUS_USD_PER_MTOK.items():
                total += getattr(call.tokens, counter) * usd / 1_000_000
    assert total == 47_000


def test_the_shipped_price_book_prices_the_plan_at_the_same_sum() -> None:
    assert planned_cost(plan.weekend()) == 47_000 * 10**9


def test_the_plan_is_23_agents_whose_calls_run_forward_within_72_hours() -> None:
    agents = plan.weekend()
    assert len({agent.name for agent in agents}) == 23
    for agent in agents:
        offsets = [call.offset_us for call in agent.calls()]
        assert offsets == sorted(offsets)
        assert offsets[0] >= 0
        assert offsets[-1] < 72 * 3600 * 1_000_000


def test_the_real_pace_is_18_cents_a_second() -> None:
    assert Fraction(47_000, 72 * 3600) * 10**9 - plan.WEEKEND_NANOS_PER_S < 1
    assert round(plan.WEEKEND_NANOS_PER_S / 1e9, 3) == 0.181


def test_every_process_that_makes_the_plan_makes_the_same_one() -> None:
    assert list(plan.weekend()[4].calls()) == list(plan.weekend()[4].calls())


@pytest.mark.parametrize("field", plan.Rates._fields)
def test_the_plans_own_rates_are_the_shipped_books(field: str) -> None:
    rows = [row for row in price_book_file.shipped().rows if (row.provider, row.model) == ("anthropic", plan.MODEL)]
    standard = next(row for row in rows if row.tier == "standard")
    assert getattr(standard.rates, field) == getattr(plan.RATES, field) * 1_000_000
