"""The compiled price book against genai-prices' own Decimal arithmetic, and against the worked table, to the nano."""

import csv
import json
import random
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import Any

import pytest

from spendfuse.adapters.price_book_file import shipped
from spendfuse.engine.prices import PriceBook
from spendfuse.wire import PriceRow, Tokens, Usage

genai_prices = pytest.importorskip("genai_prices", reason="the oracle genai-prices is not installed (extra: prices)")

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((Path(__file__).parent / "prices.json").read_text(encoding="utf-8"))
FILE = shipped()
BOOK = PriceBook.compile(FILE)
SEED_CSV = ROOT.parent / "shared" / "seed_prices.csv"
SEED = """\
model,provider,input_usd_per_mtok,output_usd_per_mtok
claude-opus-4-6,anthropic,5,25
claude-sonnet-4-6,anthropic,3,15
claude-haiku-4-5,anthropic,1,5
gpt-4o,openai,2.50,10
gpt-4o-mini,openai,0.15,0.60
"""
SEED_MODELS = [(row["provider"], row["model"]) for row in csv.DictReader(SEED.splitlines())]
CONTEXTS = {
    "standard": None,
    "batch": {"processing": "batch"},
    "priority": {"service_tier": "priority"},
    "flex": {"service_tier": "flex"},
}
FIRST, LAST = datetime(2024, 1, 1, tzinfo=UTC), datetime(2027, 6, 1, tzinfo=UTC)


def usage(provider: str, model: str, tokens: dict[str, int], ts: datetime, tier: str = "standard") -> Usage:
    return Usage(
        id="call",
        ts=ts,
        workspace="acme",
        team="research",
        agent="planner",
        run="run",
        provider=provider,
        model=model,
        tier=tier,
        tokens=Tokens(**tokens),
    )


def oracle_nanos(one: Usage) -> int:
    """Price a usage with genai-prices: inclusive counts, Decimal, rounded once."""
    tokens = one.tokens
    writes = tokens.cache_write_5m + tokens.cache_write_1h
    context = CONTEXTS.get(one.tier) or {"speed" if one.provider == "anthropic" else "service_tier": one.tier}
    price = genai_prices.calc_price(
        genai_prices.Usage(
            input_tokens=tokens.input + tokens.cache_read + writes,
            cache_read_tokens=tokens.cache_read,
            cache_write_tokens=writes,
            cache_write_5m_tokens=tokens.cache_write_5m,
            cache_write_1h_tokens=tokens.cache_write_1h,
            output_tokens=tokens.output,
        ),
        one.model,
        provider_id=one.provider,
        genai_request_timestamp=one.ts,
        price_context=None if one.tier == "standard" else context,
    )
    return int((price.total_price * 10**9).to_integral_value(ROUND_HALF_EVEN))


def random_usage(chance: random.Random, provider: str, model: str, tier: str = "standard") -> Usage:
    tokens = {
        "input": chance.choice([0, chance.randrange(2_000), chance.randrange(400_000)]),
        "cache_read": chance.choice([0, chance.randrange(300_000)]),
        "cache_write_5m": chance.choice([0, chance.randrange(40_000)]),
        "cache_write_1h": chance.choice([0, chance.randrange(40_000)]),
        "output": chance.choice([0, chance.randrange(64_000)]),
    }
    return usage(provider, model, tokens, FIRST + (LAST - FIRST) * chance.random(), tier)


def by_the_hour(row: PriceRow) -> bool:
    return row.provider in ("deepseek", "azure") and row.model in (
        "deepseek-chat",
        "deepseek-flash",
        "deepseek-reasoner",
        "deepseek-v4-flash",
        "deepseek-v4-pro",
    )


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_worked_example(case: dict[str, Any]) -> None:
    ts = datetime.fromisoformat(case["ts"])
    charge = BOOK.charge(usage(case["provider"], case["model"], case["tokens"], ts, case.get("tier", "standard")))
    assert (charge.cost_nanos, charge.priced_by, charge.tier_known) == (case["cost_nanos"], "book", True)


@pytest.mark.parametrize(("provider", "model"), SEED_MODELS)
def test_seed_model_costs_what_genai_prices_says_for_random_usage_at_random_times(provider: str, model: str) -> None:
    chance = random.Random(f"seed {model}")  # noqa: S311 - test data that must be the same each time
    for _ in range(320):
        one = random_usage(chance, provider, model)
        assert BOOK.charge(one).cost_nanos == oracle_nanos(one), one


def known_name(row: PriceRow) -> str:
    """Return a name of the row's model that genai-prices knows; a few of its ids, as `regional.` ones, are no names."""
    for name in (row.model, *row.models):
        model = name.removesuffix("*")
        try:
            genai_prices.calc_price(genai_prices.Usage(input_tokens=1), model, provider_id=row.provider)
        except LookupError:
            continue
        return model
    raise AssertionError(f"genai-prices knows no name of {row.provider} {row.model}")


def test_every_row_of_the_book_costs_what_genai_prices_says_at_random_times_in_its_tier() -> None:
    chance = random.Random("rows")  # noqa: S311 - the same
    checked = 0
    for row in FILE.rows:
        if by_the_hour(row):
            continue
        model = known_name(row)
        for _ in range(2):
            one = random_usage(chance, row.provider, model, row.tier)
            assert BOOK.charge(one).cost_nanos == oracle_nanos(one), one
            checked += 1
    assert checked > 1_900


def test_every_exact_name_and_prefix_of_the_book_finds_the_price_that_genai_prices_finds() -> None:
    chance = random.Random("names")  # noqa: S311 - the same
    checked = 0
    for row in FILE.rows:
        if row.tier != "standard" or by_the_hour(row):
            continue
        for name in row.models:
            ending = "260101" if name.endswith("20*") else "-x" if chance.random() < 0.5 else ""
            model = name[:-1] + ending if name.endswith("*") else name
            one = random_usage(chance, row.provider, model)
            try:
                expected = oracle_nanos(one)
            except LookupError:  # a pattern of dates written 2026-01-01
                one = random_usage(chance, row.provider, name[:-1] + "26-01-01")
                expected = oracle_nanos(one)
            assert BOOK.charge(one).cost_nanos == expected, one
            checked += 1
    assert checked > 1_000


def test_a_price_by_the_hour_is_charged_at_its_dearest_hour() -> None:
    chance = random.Random("hours")  # noqa: S311 - the same
    for model in ("deepseek-chat", "deepseek-flash", "deepseek-reasoner", "deepseek-v4-pro"):
        day = datetime(2026, 11, 23, tzinfo=UTC)
        tokens = random_usage(chance, "deepseek", model).tokens.model_dump()
        charged = {
            BOOK.charge(usage("deepseek", model, tokens, day + timedelta(minutes=30 * half))).cost_nanos
            for half in range(48)
        }
        expected = [
            oracle_nanos(usage("deepseek", model, tokens, day + timedelta(minutes=30 * half))) for half in range(48)
        ]
        assert charged == {max(expected)}
        assert len(set(expected)) == 2


@pytest.mark.parametrize("row", list(csv.DictReader(SEED.splitlines())), ids=lambda row: row["model"])
def test_the_book_holds_the_seed_price(row: dict[str, str]) -> None:
    for column, counter in (("input_usd_per_mtok", "input"), ("output_usd_per_mtok", "output")):
        charge = BOOK.charge(
            usage(row["provider"], row["model"], {counter: 1_000_000}, datetime(2026, 11, 23, tzinfo=UTC))
        )
        assert charge.cost_nanos == Decimal(row[column]) * 10**9


@pytest.mark.skipif(not SEED_CSV.is_file(), reason="shared/seed_prices.csv does not lie beside the project")
def test_the_seed_file_beside_the_project_says_the_same_as_its_copy_here() -> None:
    assert SEED_CSV.read_text(encoding="utf-8").split() == SEED.split()


def test_an_unlisted_model_costs_more_than_nothing_at_every_provider() -> None:
    for provider in sorted({row.provider for row in FILE.rows} | {"nobody-knows"}):
        one = usage(provider, "a-model-of-tomorrow", {"input": 1, "output": 1}, datetime(2026, 11, 23, tzinfo=UTC))
        charge = BOOK.charge(one)
        assert charge.priced_by == "ceiling"
        assert charge.cost_nanos > 0
