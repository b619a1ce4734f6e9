"""The seed workflows, and the sums the product is told by, in integers."""

import csv
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from spendfuse.adapters.price_book_file import shipped
from spendfuse.engine.prices import PriceBook, rows_sha256
from spendfuse.wire import PriceBookFile, PriceRow, Rates, Tokens, Usage

SEED_CSV = Path(__file__).parents[3] / "shared" / "seed_workflows.csv"
SEED = """\
workflow,tokens_per_run,cost_per_run_usd,runs_per_day,monthly_usd
support-triage,2000,0.004,1000,120
document-summary,8000,0.016,1000,480
lead-qualification,5000,0.010,1000,300
research-report,40000,0.08,1000,2400
multi-agent-code-review,80000,0.16,1000,4800
"""
NANOS = 10**9
DAYS_PER_MONTH = 30
BLENDED = 2 * NANOS
"""$2.00 per million tokens of any kind, which is what the seed table was made with."""
BOOK = PriceBook.compile(shipped())


def flat_book(rate: int) -> PriceBook:
    rates = Rates(input=rate, cache_read=rate, cache_write_5m=rate, cache_write_1h=rate, output=rate)
    rows = [PriceRow(provider="seed", model="blended", rates=rates)]
    return PriceBook.compile(
        PriceBookFile(book="seed", sha256=rows_sha256(rows), source="seed table", currency="USD", rows=rows)
    )


def cost_nanos(book: PriceBook, provider: str, model: str, **tokens: int) -> int:
    return book.charge(
        Usage(
            id="call",
            ts=datetime(2026, 11, 23, tzinfo=UTC),
            workspace="acme",
            team="research",
            agent="planner",
            run="run",
            provider=provider,
            model=model,
            tokens=Tokens(**tokens),
        )
    ).cost_nanos


def blend_nanos(budget: tuple[str, str], frontier: tuple[str, str]) -> int:
    """Price 1,000,000 tokens: 20 % output, 70 % of the input from the cache, 80 % of the calls on the budget model."""
    return sum(
        cost_nanos(BOOK, *model, input=240 * calls, cache_read=560 * calls, output=200 * calls)
        for model, calls in ((budget, 800), (frontier, 200))
    )


@pytest.mark.parametrize("row", list(csv.DictReader(SEED.splitlines())), ids=lambda row: row["workflow"])
def test_the_seed_workflow_costs_what_its_table_says(row: dict[str, str]) -> None:
    run = cost_nanos(flat_book(BLENDED), "seed", "blended", input=int(row["tokens_per_run"]))
    assert run == Decimal(row["cost_per_run_usd"]) * NANOS
    assert run * int(row["runs_per_day"]) * DAYS_PER_MONTH == int(row["monthly_usd"]) * NANOS


@pytest.mark.skipif(not SEED_CSV.is_file(), reason="shared/seed_workflows.csv does not lie beside the project")
def test_the_seed_file_beside_the_project_says_the_same_as_its_copy_here() -> None:
    assert SEED_CSV.read_text(encoding="utf-8").split() == SEED.split()


@pytest.mark.parametrize(
    ("budget", "frontier", "nanos"),
    [
        # README.md beside this file: $2.00 lies between the Claude blends; the OpenAI one is far below.
        ("claude-haiku-4-5", "claude-sonnet-4-6", 1_814_400_000),
        ("claude-haiku-4-5", "claude-opus-4-6", 2_332_800_000),
        ("gpt-4o-mini", "gpt-4o", 818_400_000),
    ],
)
def test_a_blend_of_seed_models_with_a_fifth_of_output(budget: str, frontier: str, nanos: int) -> None:
    provider = "anthropic" if budget.startswith("claude") else "openai"
    assert blend_nanos((provider, budget), (provider, frontier)) == nanos


def test_a_cached_system_prompt_of_4000_tokens_saves_108_dollars_a_day_on_sonnet() -> None:
    calls = 10_000
    plain = calls * cost_nanos(BOOK, "anthropic", "claude-sonnet-4-6", input=4_000)
    cached = calls * cost_nanos(BOOK, "anthropic", "claude-sonnet-4-6", cache_read=4_000)
    assert (plain, cached, plain - cached) == (120 * NANOS, 12 * NANOS, 108 * NANOS)


def test_47000_dollars_in_72_hours_are_18_cents_a_second_over_23_subagents() -> None:
    spent, seconds, subagents = 47_000 * NANOS, 72 * 3_600, 23
    a_second = spent // seconds
    assert a_second == 181_327_160
    assert f"${a_second // 10**6 / 1000:.3f}/s" == "$0.181/s"
    assert a_second // subagents == 7_883_789
    lags = {1: 181_327_160, 5: 906_635_802, 10: 1_813_271_604, 60: 10_879_629_629, 86_400: 15_666_666_666_666}
    assert {lag: spent * lag // seconds for lag in lags} == lags
