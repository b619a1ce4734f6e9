"""Every statement of the dashboard, run by the ClickHouse engine over a trail whose sums are known.

chDB gives a process one directory, so this file is also a program: it migrates a database, writes the trail through
the audit's own row builder, runs the statements it is given and prints what came out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from spendfuse.audit.rows import Table
from spendfuse.grafana import ALL, Panel, expand, panels
from spendfuse.grafana.dashboards import annotations, variables
from spendfuse.grafana.spec import TIME_SERIES
from spendfuse.wire.base import to_us
from spendfuse.wire.control import Ack, Cause, Command, CommandWindow, Measure
from spendfuse.wire.ledger import Charge, LedgerEntry
from spendfuse.wire.usage import Tokens, Usage

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

DEADLINE_S = 120
USD = 1_000_000_000
NOW = datetime(2026, 11, 20, 15, 30, tzinfo=UTC)
RANGES = {"24 h": timedelta(hours=24), "1 h": timedelta(hours=1)}
OBRIEN = "o'brien \\' OR 1=1 --"
"""No name of ours: it reaches the database here by an insert of its own, and must be data there."""
CHOICES: dict[str, dict[str, str | list[str]]] = {
    "all": {"workspace": "acme", "team": ALL, "agent": [ALL]},
    "two teams": {"workspace": "acme", "team": ["research", "support"], "agent": ALL},
    "support": {"workspace": "acme", "team": ["support"], "agent": ALL},
    "o'brien": {"workspace": "acme", "team": ["research", "support"], "agent": ["o'brien"]},
}

GLOBEX: dict[str, dict[str, str | list[str]]] = {"globex": {"workspace": "globex", "team": ALL, "agent": [ALL]}}


def minutes(ago: float) -> datetime:
    return NOW - timedelta(minutes=ago)


def charged(
    nth: int, ago: float, agent: str, usd: float, *, run: str = "run-1", workspace: str = "acme", **entry: Any
) -> LedgerEntry:
    """A usage of 100 fresh, 300 cached and 50 written tokens, some minutes before the range ends."""
    team = "support" if agent.startswith("helper") else "research"
    usage = Usage(
        id=f"call-{nth}", ts=minutes(ago), workspace=workspace, team=team, agent=agent, run=run, root_run=run,
        provider="anthropic", model="claude-opus-4-5" if team == "research" else "claude-haiku-4-5",
        tokens=Tokens(input=100, cache_read=300, cache_write_5m=40, cache_write_1h=10, output=20),
    )  # fmt: skip
    given: dict[str, Any] = {"kind": "charge", "currency": "USD", **entry}
    charge = Charge(
        cost_nanos=round(usd * USD), currency=given.pop("currency"), price_book="test", priced_by="book", rates=[0] * 5
    )
    return LedgerEntry(
        topic="spendfuse.usage.v1", partition=0, offset=nth, at=minutes(ago), usage=usage, charge=charge, **given
    )


def charges() -> list[LedgerEntry]:
    """Two hours of three agents at 1, 2 and 0.5 USD every ten minutes, with what must not be counted beside it."""
    regular = [
        charged(nth * 10 + place, ago, agent, usd)
        for nth, ago in enumerate(range(120, 30, -10))
        for place, (agent, usd) in enumerate([("planner-1", 1.0), ("planner-2", 2.0), ("helper-1", 0.5)])
    ]
    return [
        *regular,
        charged(901, 29, "planner-1", 0.25),  # its halt was a minute ago: it was in flight
        charged(902, 15, "planner-2", 0.125, run="run-9"),  # its run is halted
        charged(903, 5, "planner-2", 4.0, run="run-9"),  # its run is resumed
        charged(904, 20, "planner-2", 64.0, kind="duplicate"),
        charged(905, 20, "planner-2", 32.0, currency="EUR"),
        charged(906, 20, "planner-1", 16.0, workspace="globex"),
        charged(907, 23 * 60, "planner-2", 8.0),  # yesterday, and in the range
        *owls(),
    ]


def owls() -> list[LedgerEntry]:
    """Twelve hours of two agents of globex that spend through their halts, 1 and 0.5 USD every 20 minutes."""
    return [
        charged(1_000 + nth * 2 + place, ago, agent, usd, workspace="globex", run=f"night-{place}")
        for nth, ago in enumerate(range(12 * 60, 0, -20))
        for place, (agent, usd) in enumerate([("owl-1", 1.0), ("owl-2", 0.5)])
    ]


def order(nth: int, ago: float, action: str, scope: str, budget_cap: str, **given: Any) -> Command:
    budget, cap = budget_cap.split("/")
    return Command(
        id=f"{nth:032x}", seq=nth, action=action, scope=scope, budget=budget, cap=cap,  # type: ignore[arg-type]
        issued_at=minutes(ago), message=f"{action} it's {scope}", **given,
    )  # fmt: skip


def window(kind: str, start: datetime | None, end: datetime | None, label: str = "") -> CommandWindow:
    return CommandWindow(kind=kind, label=label or kind, timezone="UTC", start=start, end=end)  # type: ignore[arg-type]


def usd_of(cap: float) -> Measure:
    return Measure(unit="nano-USD", cap=round(cap * USD), spend=1, committed=1, fraction=11_000)


MIDNIGHT = NOW.replace(hour=0, minute=0)
DAY = window("day", MIDNIGHT, MIDNIGHT + timedelta(1))
HOUR = window("hour", NOW.replace(minute=0), NOW.replace(minute=0) + timedelta(hours=1))


def orders() -> list[tuple[str, Command]]:
    tree = {"scope": "run:acme/run-9", "budget_cap": "runs/total", "window": window("run", None, None)}
    old = window("hour", NOW - timedelta(hours=2), NOW - timedelta(hours=1))
    rolling = window("rolling", None, None, "rolling 90m")
    return [
        ("command", order(1, 90, "warn", "workspace:acme", "wallet/daily", window=DAY, measure=usd_of(100))),
        ("command", order(2, 80, "halt", "agent:acme/research/planner-2", "agents/hourly", window=old,
                          measure=usd_of(1), expires_at=old.end)),
        ("command", order(3, 50, "halt", "agent:acme/research/idle-1", "manual/halt")),
        ("command", order(4, 40, "degrade", "team:acme/support", "teams/daily", window=DAY, measure=usd_of(10))),
        ("command", order(5, 30, "halt", "agent:acme/research/planner-1", "agents/hourly", window=HOUR,
                          measure=usd_of(0.5), expires_at=HOUR.end,
                          cause=Cause(usage_id="call-x", ts=minutes(30), partition=0, offset=1))),
        ("command", order(6, 20, "halt", measure=usd_of(8), **tree)),
        ("command", order(7, 10, "resume", measure=usd_of(16), **tree)),
        ("decision", order(8, 25, "halt", "agent:acme/support/helper-1", "shadow/daily", window=DAY,
                           measure=usd_of(1))),
        # owl-1: 10 h 5 min to 2 h 5 min ago, for an hour of it by its run too; owl-2: by its team for 90 minutes
        ("command", order(10, 605, "halt", "agent:globex/research/owl-1", "agents/daily")),
        ("command", order(11, 300, "halt", "run:globex/night-0", "runs/total", expires_at=minutes(240))),
        ("command", order(12, 125, "resume", "agent:globex/research/owl-1", "agents/daily")),
        ("command", order(13, 700, "halt", "team:globex/research", "teams/daily", expires_at=minutes(610))),
        ("command", order(9, 8, "warn", "team:acme/research", "teams/rolling", window=rolling, measure=usd_of(20))),
    ]  # fmt: skip


def controls() -> Iterator[LedgerEntry]:
    for nth, (kind, command) in enumerate(orders()):
        yield LedgerEntry(
            kind=kind, topic="spendfuse.commands.v1", partition=0, offset=nth, at=command.issued_at, command=command
        )  # type: ignore[arg-type]
    stopped = orders()[4][1]
    for nth, (state, lag_ms, agent) in enumerate([
        ("received", None, "planner-1"), ("enforced", 40, "planner-1"), ("enforced", 9_000, "planner-1"),
        ("enforced", 60, "planner-1b"),
    ]):  # fmt: skip
        yield LedgerEntry(
            kind="ack", topic="spendfuse.acks.v1", partition=0, offset=nth, at=NOW,
            ack=Ack(
                command_id=stopped.id, seq=stopped.seq, scope=stopped.scope, budget=stopped.budget, cap=stopped.cap,
                agent=f"agent:acme/research/{agent}", guard="guard-1", state=state,  # type: ignore[arg-type]
                at=stopped.issued_at + timedelta(milliseconds=lag_ms or 5), halt_lag_us=lag_ms and lag_ms * 1_000,
            ),
        )  # fmt: skip


def program(directory: Path, statements: Mapping[str, str]) -> dict[str, Any]:
    """Return the names, types and rows of each statement's result, or its error."""
    from spendfuse.audit import migrate, readonly
    from spendfuse.audit.database import Engine, open_embedded
    from spendfuse.audit.rows import Place, entry_row, tables

    engine = Engine(directory, "spendfuse")
    database = open_embedded(engine)
    migrate.apply(database)
    rows = [
        entry_row(entry, Place("spendfuse.ledger.v1", 0, nth, 0)) for nth, entry in enumerate([*charges(), *controls()])
    ]
    for table in tables(rows):
        database.insert(table, f"seed:{table.name}")
    template = next(row for name, row in rows if name == "usage_events")
    for nth, agent in enumerate(["o'brien", OBRIEN]):
        named = {**template, "agent": agent, "usage_id": agent, "src_offset": 10_000 + nth, "cost_nanos": 3 * USD,
                 "occurred_at": to_us(minutes(45))}  # fmt: skip
        for table in tables([("usage_events", named)]):
            database.insert(table, f"seed:{agent}")
    database.insert(waited_batches(), "seed:batches")
    answers: dict[str, Any] = {}
    for key, statement in statements.items():
        query = readonly.Query(statement, {}, {}, "spendfuse", "JSONCompact")
        try:
            answer = json.loads(readonly.run(engine, query).body)
        except readonly.QueryRefusedError as error:
            answers[key] = {"error": str(error)}
        else:
            meta = answer["meta"]
            answers[key] = {
                "names": [each["name"] for each in meta],
                "types": [each["type"] for each in meta],
                "rows": answer["data"],
            }
    database.close()
    return answers


WAITED_S = {50: 0.25, 49: 0.5, 20: 1_800.0}
"""Minutes ago a batch was inserted -> how long it had waited; the last after an outage."""


def waited_batches() -> Table:
    """Sealed batches, and one of before there were seals."""
    ago = [*WAITED_S, 10]
    waited = [*WAITED_S.values(), 10**6]
    count = len(ago)
    inserted = [to_us(minutes(each)) // 1_000 for each in ago]
    columns: dict[str, list[Any]] = {
        "ledger_partition": [0] * count, "generation": [1] * count, "seq": list(range(1, count + 1)),
        "first_offset": list(range(count)), "last_offset": list(range(count)), "rows": [1] * count,
        "content_sha256": ["0" * 64] * count, "leaf_version": [1] * len(WAITED_S) + [0], "inserted_at": inserted,
        "written_at": [at - round(wait * 1_000) for at, wait in zip(inserted, waited, strict=True)],
    }  # fmt: skip
    return Table("audit_batches", columns)


class Answer:
    """A result, by column."""

    def __init__(self, names: Sequence[str], types: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.names, self.types, self.rows = list(names), list(types), list(rows)

    def column(self, name: str) -> list[Any]:
        return [row[self.names.index(name)] for row in self.rows]

    def by(self, key: str, value: str) -> dict[str, Any]:
        return dict(zip(self.column(key), self.column(value), strict=True))


def statement(sql: str, choice: str, span: str) -> str:
    return expand(sql, from_us=to_us(NOW - RANGES[span]), to_us=to_us(NOW), variables={**CHOICES, **GLOBEX}[choice])


def everything() -> dict[str, str]:
    asked: list[tuple[str, str]] = [(panel.query, panel.sql) for panel in panels()]
    asked += [(each.query, each.sql) for each in (*variables(), *annotations())]
    sent = {
        f"{query} | {choice} | {span}": statement(sql, choice, span)
        for query, sql in asked
        for choice in CHOICES
        for span in RANGES
    }
    after_halt = next(panel for panel in panels() if panel.query == "spend_after_halt")
    for span in RANGES:
        sent[f"{after_halt.query} | globex | {span}"] = statement(after_halt.sql, "globex", span)
    strange = {"workspace": "acme", "team": ALL, "agent": [OBRIEN.replace("\\", "")]}
    one = next(panel for panel in panels() if panel.query == "spend_today")
    sent["strange"] = expand(one.sql, from_us=to_us(MIDNIGHT), to_us=to_us(NOW), variables=strange)
    return sent


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("chdb", reason="the statements need the chdb package: pip install 'spendfuse[embedded]'")
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path_factory.mktemp("grafana"))],
        input=json.dumps(everything()),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4_000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def answer_of(answers: Mapping[str, Any], query: str, choice: str = "all", span: str = "24 h") -> Answer:
    answer = answers[f"{query} | {choice} | {span}"]
    assert "error" not in answer, answer["error"]
    return Answer(**answer)


@pytest.mark.parametrize("span", RANGES)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel.query)
def test_a_panel_has_the_shape_its_visualisation_draws(
    answers: dict[str, Any], panel: Panel, choice: str, span: str
) -> None:
    answer = answer_of(answers, panel.query, choice, span)
    assert answer.rows, "a panel that is empty on a trail with usage and commands tells nobody anything"
    if panel.format == TIME_SERIES:
        assert answer.names[0] == "time"
        assert answer.types[0].startswith("DateTime")
        times = answer.column("time")
        assert times == sorted(times)
        texts = [name for name, kind in zip(answer.names, answer.types, strict=True) if "String" in kind]
        if texts:  # a long series: one name, one value, and each pair once
            assert answer.names == ["time", texts[0], "Value"]
            assert len({(time, name) for time, name, _ in answer.rows}) == len(answer.rows)
        else:
            assert all(before < after for before, after in pairwise(times))
    elif panel.viz == "bargauge":
        assert len(answer.names) == 2
        assert answer.types[0] == "String"
    elif panel.viz == "stat":
        assert len(answer.rows) == 1
    assert set(panel.columns) <= set(answer.names)


@pytest.mark.parametrize("choice", CHOICES)
def test_the_variables_offer_what_has_spent(answers: dict[str, Any], choice: str) -> None:
    assert answer_of(answers, "variable_workspace", choice).column("workspace") == ["acme", "globex"]
    assert answer_of(answers, "variable_team", choice).column("team") == ["research", "support"]
    agents = answer_of(answers, "variable_agent", choice).column("agent")
    everybody = sorted(["helper-1", "o'brien", OBRIEN, "planner-1", "planner-2"])
    assert agents == (["helper-1"] if choice == "support" else everybody)


def test_commands_are_marked_where_they_happened(answers: dict[str, Any]) -> None:
    marks = answer_of(answers, "annotation_commands")
    assert marks.names == ["time", "title", "text", "tags"]
    assert marks.column("tags") == ["halt", "halt", "degrade", "halt", "halt", "resume"]
    assert marks.column("time") == sorted(marks.column("time"))
    assert len(answer_of(answers, "annotation_commands", span="1 h").rows) == 5
    assert answer_of(answers, "annotation_commands", "support").column("title") == [
        "degrade team:acme/support", "halt run:acme/run-9", "resume run:acme/run-9",
    ]  # fmt: skip


def test_spend_today_is_the_dollars_since_midnight(answers: dict[str, Any]) -> None:
    # 9 rounds of 3.50, 0.25 and 0.125 after halts, 4 after the resume, and 3 of each o'brien
    assert sum(answer_of(answers, "spend_today").column("spend")) == pytest.approx(31.5 + 4.375 + 6)
    assert sum(answer_of(answers, "spend_today", "support").column("spend")) == pytest.approx(4.5)
    assert sum(answer_of(answers, "spend_today", "o'brien").column("spend")) == pytest.approx(3)


def test_a_name_with_quotes_selects_itself_and_nothing_else(answers: dict[str, Any]) -> None:
    assert answers["strange"] == {"names": ["time", "spend"], "types": answers["strange"]["types"], "rows": []}


def test_a_wallet_that_stopped_burning_shows_zero(answers: dict[str, Any]) -> None:
    burn = answer_of(answers, "burn_rate", span="1 h")
    assert burn.column("burn")[-1] == 0
    assert len(burn.rows) == 60
    assert sum(burn.column("burn")) / 60 == pytest.approx(3 * 3.5 + 4.375 + 6)
    assert max(burn.column("burn")) == pytest.approx(6 * 60)
    assert sum(answer_of(answers, "burn_rate").column("burn")) / 12 == pytest.approx(31.5 + 4.375 + 6 + 8)


def test_agents_under_a_halt_that_holds_are_counted_once(answers: dict[str, Any]) -> None:
    # planner-1 and idle-1; not the shadow halt, the expired one, or that of the resumed run
    assert answer_of(answers, "agents_halted").rows == [[2]]
    assert answer_of(answers, "agents_halted", "support").rows == [[0]]


def test_spend_after_halt_ends_at_a_resume_or_expiry(answers: dict[str, Any]) -> None:
    # planner-1's call in flight, and the run's before it was resumed. planner-2 was halted for 20 minutes: two rounds.
    assert answer_of(answers, "spend_after_halt").rows == [[pytest.approx(0.25 + 0.125 + 2.0)]]
    assert answer_of(answers, "spend_after_halt", span="1 h").rows == [[pytest.approx(0.375)]]
    assert answer_of(answers, "spend_after_halt", "support").rows == [[0]]


def test_spend_through_a_long_halt_is_counted_once_whatever_else_halts_it(answers: dict[str, Any]) -> None:
    # owl-1 every 20 minutes: 600 to 140 minutes ago by its own halt, 680 to 620 by the team's; owl-2 by the team's
    own, team = len(range(600, 125, -20)), len(range(680, 610, -20))
    assert answer_of(answers, "spend_after_halt", "globex").rows == [[pytest.approx(own + team * 1.5)]]
    assert answer_of(answers, "spend_after_halt", "globex", "1 h").rows == [[0]]


def test_the_cache_hit_rate_is_reads_over_all_input(answers: dict[str, Any]) -> None:
    assert answer_of(answers, "cache_hit_rate").rows == [[pytest.approx(300 / 450)]]


def test_caps_in_an_open_window_are_measured_by_their_charges(answers: dict[str, Any]) -> None:
    used = answer_of(answers, "caps_used").by("cap_of", "used")
    assert used == {
        "workspace:acme  wallet/daily": pytest.approx((31.5 + 4.375 + 6) / 100),
        "team:acme/support  teams/daily": pytest.approx(4.5 / 10),
        "agent:acme/research/planner-1  agents/hourly": pytest.approx(0.25 / 0.5),
        "run:acme/run-9  runs/total": pytest.approx(4.125 / 16),
        # the last 90 minutes: rounds 90 to 40 minutes ago, what came after, and both o'briens
        "team:acme/research  teams/rolling": pytest.approx((6 * 3 + 4.375 + 6) / 20),
    }
    assert list(used.values()) == sorted(used.values(), reverse=True)
    assert "team:acme/research  teams/rolling" not in answer_of(answers, "caps_used", "support").column("cap_of")


def test_spend_over_time_adds_up_by_team_agent_and_model(answers: dict[str, Any]) -> None:
    for query in ("spend_by_team", "spend_by_agent"):
        assert sum(answer_of(answers, query).column("Value")) == pytest.approx(31.5 + 4.375 + 6 + 8)
    assert set(answer_of(answers, "spend_by_team").column("team")) == {"research", "support"}
    assert set(answer_of(answers, "spend_by_agent", "support").column("agent_name")) == {"support/helper-1"}
    by_model = answer_of(answers, "spend_by_model").by("model_name", "spend")
    assert by_model == {
        "anthropic/claude-opus-4-5": pytest.approx(27 + 4.375 + 6 + 8),
        "anthropic/claude-haiku-4-5": pytest.approx(4.5),
    }


def test_a_stopped_series_falls_to_zero_instead_of_ending(answers: dict[str, Any]) -> None:
    series = answer_of(answers, "spend_by_team", span="1 h")
    support = [value for _, team, value in series.rows if team == "support"]
    assert len(support) == 60
    assert support[-1] == 0


def test_tokens_are_counted_by_counter(answers: dict[str, Any]) -> None:
    tokens = answer_of(answers, "tokens_by_kind")
    calls = 27 + 3 + 2 + 1 + 1  # with the call in EUR: tokens have no currency
    sums = {name: sum(tokens.column(name)) for name in tokens.names[1:]}
    assert sums == {"input": 100 * calls, "cache_read": 300 * calls, "cache_write": 50 * calls, "output": 20 * calls}


def test_the_table_says_who_spends_and_under_which_command(answers: dict[str, Any]) -> None:
    table = answer_of(answers, "agents_by_spend")
    assert table.by("agent", "state") == {
        "planner-1": "halted", "planner-2": "warned", "helper-1": "degraded", "o'brien": "warned", OBRIEN: "warned",
    }  # fmt: skip
    assert table.by("agent", "cost")["planner-2"] == pytest.approx(9 * 2 + 4.125 + 8)
    assert table.by("agent", "last_command")["planner-2"] == "warn"
    assert table.by("agent", "calls")["planner-1"] == 10
    assert table.by("agent", "runs") == {"planner-1": 1, "planner-2": 2, "helper-1": 1, "o'brien": 1, OBRIEN: 1}
    assert table.by("agent", "last_call")["planner-2"].startswith("2026-11-20 15:25:00")
    assert table.column("cost") == sorted(table.column("cost"), reverse=True)


def test_commands_come_newest_first_with_their_halt_lag(answers: dict[str, Any]) -> None:
    table = answer_of(answers, "commands_latest")
    assert len(table.rows) == 8
    assert table.column("issued_at") == sorted(table.column("issued_at"), reverse=True)
    halted = dict(zip(table.names, table.rows[3], strict=True))
    assert (halted["scope"], halted["agents"]) == ("agent:acme/research/planner-1", 2)
    assert (halted["quickest_lag"], halted["slowest_lag"]) == (40, 60)
    assert halted["used"] == pytest.approx(1.1)
    assert table.rows[0][table.names.index("quickest_lag")] is None


def test_halt_lag_takes_the_first_refusal_of_each_agent(answers: dict[str, Any]) -> None:
    lag = answer_of(answers, "halt_lag")
    assert lag.names == ["p50", "p99"]
    assert lag.rows[0] in ([40, 60], [60, 60])
    assert answer_of(answers, "halt_lag", "support").rows == [[None, None]]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(program(Path(sys.argv[1]), json.load(sys.stdin))) + "\n")


@pytest.mark.parametrize(("span", "longest"), [("24 h", [0.5, 1_800]), ("1 h", [0.25, 0.5, 1_800])])
def test_the_audits_lag_is_the_longest_wait_of_each_interval(
    answers: dict[str, Any], span: str, longest: list[float]
) -> None:
    answer = answer_of(answers, "audit_lag", span=span)
    assert answer.column("audit_lag") == longest
