"""What a person reads: the wallet, burn rate and runway, and the sentences."""

import pytest

from factories import AGENT, DAY, HOUR, MINUTE, NOW, SECOND, Line, at, budget, cap
from spendfuse.engine.crossings import Held
from spendfuse.engine.forecast import burn_per_hour, runway_s
from spendfuse.engine.sentences import amount, instant, money
from spendfuse.engine.spend import NANOS, TOKENS, Plan, Spend
from spendfuse.engine.wallet import WalletRow, wallet_rows


def spent(*charges: tuple[int, int]) -> Spend:
    spend = Spend()
    for ts_us, nanos in charges:
        spend.add(Plan((("hour", "UTC"),), (), is_run=False, grace_us=HOUR), ts_us, ts_us, nanos, 2 * nanos)
    return spend


@pytest.mark.parametrize(
    ("charges", "now_us", "expected"),
    [
        ((), NOW, 0),
        # A scope of a few seconds is taken as a minute old: 60 x.
        (((NOW, 10),), NOW + SECOND, 600),
        (((NOW, 10),), NOW + 30 * MINUTE, 20),
        (((NOW, 10),), NOW + HOUR - 1, 10),
        # Half of the hour before, as evenly spread, and the half hour since.
        (((NOW - HOUR, 100), (NOW + MINUTE, 10)), NOW + 30 * MINUTE, 60),
        (((NOW - HOUR, 100), (NOW, 10)), NOW, 110),
        # Long idle.
        (((NOW - DAY, 100),), NOW, 0),
        # A clock ahead must not divide by nothing or less.
        (((NOW + 2 * MINUTE, 10),), NOW, 600),
    ],
)
def test_the_burn_rate_is_what_the_last_hour_cost(
    charges: tuple[tuple[int, int], ...], now_us: int, expected: int
) -> None:
    assert burn_per_hour(spent(*charges), "UTC", now_us, NANOS) == expected
    assert burn_per_hour(spent(*charges), "UTC", now_us, TOKENS) == 2 * expected


@pytest.mark.parametrize(
    ("left", "burn", "expected"),
    [(3_600, 3_600, 3_600), (1, 3_600, 1), (1, 7_200, 0), (0, 1, 0), (-5, 1, 0), (100, 0, None), (100, -1, None)],
)
def test_the_runway_is_the_seconds_until_the_cap_at_the_present_burn_rate(
    left: int, burn: int, expected: int | None
) -> None:
    assert runway_s(left, burn) == expected


def test_the_incident_that_this_exists_for_has_a_runway() -> None:
    """$47,000 in 72 hours is $0.1813 a second: a budget of $500 lasts 45 minutes."""
    burn = 47_000 * 10**9 * 3_600 // 259_200
    assert runway_s(500 * 10**9, burn) == 2_757


def wallet(line: Line, now_us: int = NOW, held: Held | None = None) -> list[WalletRow]:
    state = line.meter.state(AGENT)
    policy = line.policies.of(AGENT)
    return wallet_rows(AGENT, policy, state.spend, held or Held(), state.fuses, zone="UTC", now_us=now_us)


def test_the_wallet_has_a_row_for_each_cap_with_what_is_left() -> None:
    line = Line(
        budget(cap(1_000, warn=[5_000]), cap(300, "rolling 5m", id="r"), cap(9_000, "month", id="t", unit="tokens"))
    )
    line.spend(600)
    rows = {row.cap: row for row in wallet(line, held=Held(100, 7))}
    assert [(name, row.spend, row.committed, row.used) for name, row in rows.items()] == [
        ("c", 600, 700, 7_000),
        ("r", 600, 700, 23_333),
        ("t", 600, 607, 674),
    ]
    assert {name: row.state for name, row in rows.items()} == {"c": "warned", "r": "tripped", "t": "armed"}
    assert rows["c"].until_us == at("2026-11-24T00:00:00Z")
    assert (rows["c"].window, rows["r"].window, rows["t"].unit) == ("day", "rolling 5m", "tokens")
    assert (rows["c"].burn, rows["c"].runway_s) == (36_000, 30)
    assert {row.state for row in wallet(line, NOW + 2 * DAY)} == {"armed"}


@pytest.mark.parametrize(
    ("used", "look"), [(10, "armed"), (50, "warned"), (80, "degraded"), (90, "degraded"), (100, "tripped")]
)
def test_the_wallet_shows_the_strictest_that_fired(used: int, look: str) -> None:
    line = Line(budget(cap(100, warn=[5_000, 9_000], degrade=8_000)))
    line.spend(used)
    assert wallet(line)[0].state == look


def test_a_shadow_budget_looks_like_one_and_holds_may_be_left_out() -> None:
    line = Line(budget(cap(100), shadow=True, count_holds=False))
    line.spend(100)
    (row,) = wallet(line, held=Held(50, 50))
    assert (row.state, row.committed) == ("shadow", 100)


@pytest.mark.parametrize(
    ("nanos", "text"),
    [
        (0, "USD 0.00"),
        (1, "USD 0.000000001"),
        (9_999_999, "USD 0.009999999"),
        (1_000_000, "USD 0.001"),
        (10_000_000, "USD 0.01"),
        (14_999_999, "USD 0.01"),
        (15_000_000, "USD 0.02"),
        (999_995_000_000, "USD 1,000.00"),
        (47_000 * 10**9, "USD 47,000.00"),
    ],
)
def test_money_is_written_for_a_person(nanos: int, text: str) -> None:
    assert money(nanos, "USD") == text
    assert amount(nanos, "nano-USD") == text


def test_tokens_and_instants_are_written_for_a_person() -> None:
    assert amount(1_234_567, "tokens") == "1,234,567 tokens"
    assert instant(at("2026-11-23T23:00:00Z"), "Europe/Amsterdam") == "2026-11-24 00:00 Europe/Amsterdam"


def test_warnings_say_the_threshold_and_what_follows() -> None:
    line = Line(budget(cap(10_000, warn=[5_000, 6_250], degrade=8_000)))
    said = [line.spend(output).commands[0].message for output in (5_000, 1_300, 1_700)]
    assert said == [
        f"{AGENT} reached 50 % of its day cap of USD 0.00001 (spent USD 0.000005). It goes on.",
        f"{AGENT} reached 62.50 % of its day cap of USD 0.00001 (spent USD 0.0000063). It goes on.",
        f"{AGENT} reached 80 % of its day cap of USD 0.00001 (spent USD 0.000008). Use the cheaper model.",
    ]
