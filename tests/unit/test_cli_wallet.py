"""The live wallet: records of the worker's topics in, rows out, and how they look."""

from __future__ import annotations

import io
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from spendfuse.cli.doctor import _worker_states
from spendfuse.cli.status import as_data
from spendfuse.client.follow import Record
from spendfuse.client.keys import Signer, Verifier, generate
from spendfuse.engine.spend import Hold, Spend
from spendfuse.engine.state import Part, ScopeState, SharedState
from spendfuse.pipeline.codec import encode_scope, encode_shared
from spendfuse.pipeline.wallet import LiveWallet
from spendfuse.pipeline.wallet_view import render, runway_text, shortened
from spendfuse.wire.base import encode, to_us
from spendfuse.wire.budget import Budget, Cap, WindowSpec
from spendfuse.wire.control import Command, Heartbeat
from spendfuse.wire.signing import SIGNATURE_HEADER

NOW = datetime(2026, 11, 23, 12, 30, tzinfo=UTC)
NOW_US = to_us(NOW)
DAY_START_S = 1_795_392_000  # 2026-11-23T00:00:00Z, by date(1)
AGENT = "agent:acme/research/planner-7"
USD = 1_000_000_000


def day_spend(nanos: int, tokens: int = 0, **holds: Hold) -> Spend:
    return Spend(windows={f"day@UTC@{DAY_START_S}": [nanos, tokens, 1]}, holds=holds, first_us=NOW_US - 1)


def scopes(scope: str, spend: Spend, partition: int = 0) -> Record:
    value = encode_scope(ScopeState(spend=spend))
    return Record("spendfuse-scopes-changelog", partition, 0, 0, f"{partition}/{scope}".encode(), value)


def shared(scope: str, *spends: Spend) -> Record:
    state = SharedState(parts={number: Part(0, spend) for number, spend in enumerate(spends)})
    return Record("spendfuse-shared-changelog", 0, 0, 0, f"0/{scope}".encode(), encode_shared(state))


def budget(scope: str, amount: int = 10 * USD, unit: str = "nano-USD", name: str = "day") -> Record:
    cap = Cap(id="cap", unit=unit, amount=amount, window=WindowSpec(kind="day"))
    said = Budget(id=name, version=1, scope=scope, caps=[cap])
    return Record("spendfuse.budgets.v1", 0, 0, 0, name.encode(), encode(said))


def command(action: str, scope: str, seq: int, signer: Signer | None = None, **fields: object) -> Record:
    said = Command(
        id="0" * 32, seq=seq, action=action, scope=scope, budget="manual", cap="halt", issued_at=NOW, by="ada", **fields
    )  # fmt: skip
    key, value = said.key.encode(), encode(said)
    headers = () if signer is None else ((SIGNATURE_HEADER, signer.sign("spendfuse.commands.v1", key, value)),)
    return Record("spendfuse.commands.v1", 0, 0, 0, key, value, headers)


def wallet(*records: Record, verifier: Verifier | None = None) -> LiveWallet:
    live = LiveWallet(verifier=verifier)
    for record in records:
        live.on_record(record)
    return live


def test_a_row_shows_spend_and_what_is_in_flight_of_the_cap() -> None:
    spend = day_spend(4 * USD, call=Hold(1 * USD, 10, NOW_US + 1), old=Hold(5 * USD, 10, NOW_US - 1))
    (row,) = wallet(scopes(AGENT, spend), budget("agent:acme/*/*")).rows(NOW_US)
    assert (row.scope, row.spend, row.committed, row.cap_amount, row.used) == (AGENT, 4 * USD, 5 * USD, 10 * USD, 5_000)
    assert row.state == "armed"


def test_a_team_is_the_sum_of_its_partitions_and_their_shares_are_no_rows_of_their_own() -> None:
    team = "team:acme/research"
    live = wallet(
        budget(team),
        scopes(team, day_spend(999 * USD), 0),  # one partition's share: not the team's spend
        shared(team, day_spend(2 * USD), day_spend(3 * USD)),
    )
    assert [(row.scope, row.spend) for row in live.rows(NOW_US)] == [(team, 5 * USD)]


def test_the_fullest_come_first_whatever_their_unit() -> None:
    live = wallet(
        scopes("agent:a/t/half", day_spend(5 * USD)),
        scopes("agent:a/t/over", day_spend(30 * USD)),
        scopes("agent:b/t/most", day_spend(0, 90)),
        budget("agent:a/*/*"),
        budget("agent:b/*/*", 100, "tokens", "tokens"),
    )
    assert [(row.scope, row.used) for row in live.rows(NOW_US)] == [
        ("agent:a/t/over", 30_000), ("agent:b/t/most", 9_000), ("agent:a/t/half", 5_000),
    ]  # fmt: skip


@pytest.mark.parametrize("halted", [AGENT, "team:acme/research", "workspace:acme"])
def test_a_persons_halt_holds_the_scope_and_all_below_it_until_resumed(halted: str) -> None:
    live = wallet(scopes(AGENT, day_spend(1)), scopes("agent:other/t/a", day_spend(1)), budget("agent:*/*/*"))
    live.on_record(command("halt", halted, 1))
    assert {row.scope: row.state for row in live.rows(NOW_US)} == {AGENT: "held", "agent:other/t/a": "armed"}
    live.on_record(command("resume", halted, 2))
    live.on_record(command("halt", halted, 1))  # read again: older than the resume
    assert {row.state for row in live.rows(NOW_US)} == {"armed"}


def test_a_halt_with_an_end_lapses() -> None:
    live = wallet(scopes(AGENT, day_spend(1)), budget("agent:*/*/*"), command("halt", AGENT, 1, expires_at=NOW))
    assert [row.state for row in live.rows(NOW_US - 1)] == ["held"]
    assert [row.state for row in live.rows(NOW_US)] == ["armed"]


def test_with_public_keys_only_signed_commands_are_shown() -> None:
    private, public = generate("k")
    signer, verifier = Signer.parse(private), Verifier.parse(public)
    state = (scopes(AGENT, day_spend(1)), budget("agent:*/*/*"))
    forged = wallet(*state, command("halt", AGENT, 1), verifier=verifier)
    signed = wallet(*state, command("halt", AGENT, 1, signer), verifier=verifier)
    assert [row.state for row in forged.rows(NOW_US)] == ["armed"]
    assert [row.state for row in signed.rows(NOW_US)] == ["held"]


def test_scopes_without_a_budget_are_shown_when_asked_for() -> None:
    live = wallet(shared("run:acme/r", Spend(windows={"run": [7, 0, 1]})))
    assert live.rows(NOW_US) == []
    (row,) = live.rows(NOW_US, unbudgeted=True)
    assert (row.scope, row.spend, row.cap_amount, row.budget) == ("run:acme/r", 7, 0, "")


def test_a_withdrawn_budget_and_a_dropped_scope_leave_no_row() -> None:
    live = wallet(scopes(AGENT, day_spend(1)), budget("agent:*/*/*"))
    live.on_record(Record("spendfuse.budgets.v1", 0, 1, 0, b"day", None))
    assert live.rows(NOW_US) == []
    live = wallet(scopes(AGENT, day_spend(1)), budget("agent:*/*/*"))
    live.on_record(Record("spendfuse-scopes-changelog", 0, 1, 0, f"0/{AGENT}".encode(), None))
    assert live.rows(NOW_US) == []


def test_the_header_says_who_works_and_how_long_ago_they_said_so() -> None:
    beat = Heartbeat(emitter="spendfuse/h/1", ts=NOW, ready=True, version="0.1", price_book="book", lag=5)
    gone = beat.model_copy(update={"emitter": "spendfuse/h/2"})
    live = wallet(
        Record("spendfuse.heartbeats.v1", 0, 0, 1_000_000, b"a", encode(beat)),
        Record("spendfuse.heartbeats.v1", 0, 0, 900_000, b"b", encode(gone)),
    )
    header = live.header(NOW_US, 1_002_500)
    assert [(sign.beat.emitter, sign.age_ms) for sign in header.workers] == [("spendfuse/h/1", 2_500)]
    assert (header.lag, header.price_book) == (5, "book")


def test_a_worker_that_says_it_is_behind_is_shown_and_checked_as_stale() -> None:
    beat = Heartbeat(emitter="spendfuse/h/1", ts=NOW, ready=True, version="0.1", lag=5, stale=True)
    live = wallet(Record("spendfuse.heartbeats.v1", 0, 0, 1_000_000, b"a", encode(beat)))
    header = live.header(NOW_US, 1_000_100)
    file = io.StringIO()
    Console(file=file, width=100).print(render([], header))
    assert "h/1 stale 0.1 s ago" in file.getvalue()
    assert [worker["stale"] for worker in as_data([], header)["workers"]] == [True]
    checks = {check.name: check for check in _worker_states({beat.emitter: (beat, 1_000_000)}, 1_000_100)}
    assert checks["stale"].state == "failed"
    assert checks["stale"].found == "decides on old usage: spendfuse/h/1"
    fresh = _worker_states({beat.emitter: (beat.model_copy(update={"stale": False}), 1_000_000)}, 1_000_100)
    assert [check.name for check in fresh] == ["workers"]


TOPICS = LiveWallet().topics


@given(
    st.lists(
        st.tuples(
            st.sampled_from(TOPICS),
            st.one_of(st.none(), st.binary(max_size=40), st.just(b"0/agent:x"), st.just(b"0/run:acme/r")),
            st.one_of(st.none(), st.binary(max_size=60), st.just(b"\x01\x90"), st.just(b"{}")),
        ),
        max_size=20,
    )
)
def test_no_bytes_of_any_topic_bring_it_down(records: list[tuple[str, bytes | None, bytes | None]]) -> None:
    live = wallet(*(Record(topic, 0, 0, 0, key, value) for topic, key, value in records))
    live.on_record(scopes(AGENT, day_spend(1)))
    assert AGENT in [row.scope for row in live.rows(NOW_US, unbudgeted=True)]
    live.header(NOW_US, 0)


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 200])
def test_what_matters_most_is_shown_at_any_width(width: int) -> None:
    live = wallet(scopes(AGENT, day_spend(4 * USD)), budget("agent:acme/*/*"), command("halt", AGENT, 1, reason="x"))
    file = io.StringIO()
    Console(file=file, width=width).print(render(live.rows(NOW_US), live.header(NOW_US, 0)))
    lines = file.getvalue().splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    if width >= 60:
        row = next(line for line in lines if "40.0 %" in line)
        assert "planner-7" in row
        assert "USD 4.00" in row
        assert "held" in row


def test_a_reason_cannot_steer_the_terminal() -> None:
    live = wallet(scopes(AGENT, day_spend(1)), command("halt", AGENT, 1, reason="\x9b2J[red]x"))
    file = io.StringIO()
    Console(file=file, width=200, force_terminal=True, color_system=None).print(render([], live.header(NOW_US, 0)))
    assert "\x9b" not in file.getvalue()
    assert "[red]x" in file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"), (0, "0s"), (59, "59s"), (60, "1m 0s"), (3_599, "59m 59s"), (3_600, "1h 0m"), (90_000, "1d 1h"),
        (10**9, "> 99d"),
    ],
)  # fmt: skip
def test_a_runway_is_said_in_its_two_largest_units(seconds: int | None, text: str) -> None:
    assert runway_text(seconds) == text


def test_a_long_scope_keeps_its_kind_and_its_end() -> None:
    assert shortened(AGENT, 18) == "agent:…h/planner-7"
    assert shortened(AGENT, 100) == AGENT
