"""One halt's story, read from ClickHouse, against rows whose story is known by hand."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from audit_samples import START, ack_entry, charge, command_entry, halt, message
from spendfuse.audit import migrate, queries, trail
from spendfuse.audit.batches import Collector, Message
from spendfuse.cli.app import app
from spendfuse.wire.control import Alert
from spendfuse.wire.ledger import LedgerEntry
from spendfuse.wire.usage import Tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from spendfuse.audit.database import Database

pytest.importorskip("chdb", reason="the embedded ClickHouse needs the chdb package")

from spendfuse.audit.database import Engine, open_embedded

DOLLAR = 1_000_000_000
ISSUED = START + timedelta(minutes=10)
AGENT = "agent:acme/research/agent-1"
EVERYTHING: dict[str, Any] = {
    "workspace": "", "id": "", "limit": 100,
    "since": datetime(2025, 1, 1, tzinfo=UTC), "until": datetime(2026, 1, 1, tzinfo=UTC),
}  # fmt: skip


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    opened = open_embedded(Engine(tmp_path_factory.mktemp("incidents") / "clickhouse", "trail"))
    try:
        migrate.apply(opened)
        write(opened, STORY)
        yield opened
    finally:
        opened.close()


def write(database: Database, entries: Sequence[LedgerEntry]) -> None:
    collector = Collector("spendfuse.ledger.v1", 1, 1, 1, {}, 10_000)
    for offset, entry in enumerate(entries):
        assert collector.add(Message(offset, 1_700_000_000_000, message([entry])))
    trail.store(database, collector.seal())


def ask(database: Database, name: str, **parameters: Any) -> list[dict[str, Any]]:
    client = database._client
    client.database = database.name
    result = client.query(queries.load(name), parameters=parameters)
    return [dict(zip(result.column_names, row, strict=True)) for row in result.result_rows]


def spent(nth: int, seconds: float, dollars: int, **usage: Any) -> LedgerEntry:
    """A call that ended so long after the order, of so many dollars and 1,000 tokens a dollar."""
    given = {"ts": ISSUED + timedelta(seconds=seconds), "team": "research", "tokens": Tokens(input=dollars * 1_000)}
    entry = charge(nth, **{**given, "agent": "agent-1", **usage})
    assert entry.charge is not None
    return entry.model_copy(update={"charge": entry.charge.model_copy(update={"cost_nanos": dollars * DOLLAR})})


def proof(offset: int, kid: str) -> LedgerEntry:
    """What a guard's enrolled key signed: the ack of the same origin."""
    return LedgerEntry(
        kind="proof", topic="spendfuse.acks.v1", partition=0, offset=offset, index=1, at=ISSUED,
        data={"proves": "ack", "kid": kid, "calls_in_flight": 2, "tokens_since": 900},
    )  # fmt: skip


def violation(offset: int, scope: str, cap: str, seconds: float) -> LedgerEntry:
    at = ISSUED + timedelta(seconds=seconds)
    alert = Alert(
        id=f"{offset:032x}", ts=at, kind="violation", severity="critical", scope=scope, budget="weekend", cap=cap,
        message="went on",
    )  # fmt: skip
    return LedgerEntry(kind="alert", topic="spendfuse.alerts.v1", partition=0, offset=offset, at=at, alert=alert)


def later(seconds: float) -> datetime:
    return ISSUED + timedelta(seconds=seconds)


LIFTED = halt(0x1A)
RESUME = halt(
    0x1B, action="resume", issued_at=later(600), measure=None, cause=None, by="ada", reason="it was the backfill"
)
TEAM = halt(0x2A, scope="team:acme/research", cap="team", issued_at=later(1_000), expires_at=later(2_000))
MANUAL = halt(
    0x3A, scope="workspace:other", budget="manual", cap="halt", measure=None, cause=None, window=None, by="jan",
    reason="looks odd", issued_at=later(5_000),
)  # fmt: skip
STORY = [
    spent(1, -1, 1),  # the crossing usage's money: before the order
    spent(2, 5, 2),  # in flight at the halt
    spent(3, 90, 4),  # after it was lifted it would be fine; before, it is not
    spent(4, 601, 8),  # after the resume
    spent(5, 30, 16, agent="agent-2"),  # another agent
    spent(6, 1_500, 32, agent="agent-2"),  # under the team's halt
    spent(7, 1_600, 64),
    spent(8, 2_001, 128),  # after the team's halt expired
    spent(9, 1_700, 256, team="support"),  # another team
    spent(10, 100, 512, workspace="other"),  # before the person's halt of that workspace
    spent(11, 91, 1_024).model_copy(update={"kind": "duplicate"}),
    command_entry(LIFTED, 0),
    command_entry(halt(0x1C, scope="agent:acme/research/agent-9"), 1, "decision"),  # in shadow: never sent
    command_entry(RESUME, 2),
    command_entry(TEAM, 3),
    command_entry(MANUAL, 4),
    command_entry(LIFTED, 7),  # written again after a rebalance
    ack_entry(LIFTED, 0, "received", later(0.02)),
    ack_entry(LIFTED, 1, "enforced", later(0.05), halt_lag_us=60_050_000),
    ack_entry(TEAM, 2, "received", later(1_000.1)),
    ack_entry(TEAM, 3, "enforced", later(1_000.2), halt_lag_us=1_200_000),
    ack_entry(TEAM, 4, "received", later(1_000.1), agent="agent:acme/research/agent-2", guard="guard-2"),
    proof(3, "guard-research"),
    violation(0, AGENT, "daily", 90),
    violation(1, "agent:acme/research/agent-2", "team", 1_500),
    violation(2, AGENT, "team", 1_600),
]


def test_each_halt_has_its_story(database: Database) -> None:
    rows = ask(database, "incidents", **EVERYTHING)
    assert [row["command_id"] for row in rows] == [MANUAL.id, TEAM.id, LIFTED.id]  # the latest first
    manual, team, lifted = (
        {name: value for name, value in row.items() if value not in (None, 0, "", {})} for row in rows
    )
    naive = lambda at: at.replace(tzinfo=None)  # noqa: E731 - a word for it
    assert lifted == {
        "command_id": LIFTED.id, "seq": 0x1A, "scope": AGENT, "budget": "weekend", "cap": "daily", "unit": "nano-USD",
        "cap_amount": DOLLAR, "spend_at_halt": 1_100_000_000, "issued_by": "spendfuse", "message": "it's over",
        "cause_usage_id": "call-0-1", "crossed_at": naive(START + timedelta(minutes=9)), "issued_at": naive(ISSUED),
        "received_at": naive(later(0.02)), "enforced_at": naive(later(0.05)), "all_enforced_at": naive(later(0.05)),
        "first_lag_us": 60_050_000, "last_lag_us": 60_050_000, "agents": 1, "agents_stopped": 1, "guards": 1,
        "calls_after": 2, "agents_after": 1, "tokens_after": 6_000, "nanos_after": {"USD": 6 * DOLLAR},
        "last_spent_at": naive(later(90)), "violations": 1, "ended_at": naive(later(600)), "ended_by": "resume",
        "lifted_by": "ada", "lift_reason": "it was the backfill",
    }  # fmt: skip
    expected = {
        "calls_after": 2, "agents_after": 2, "nanos_after": {"USD": 96 * DOLLAR}, "violations": 2, "agents": 2,
        "agents_stopped": 1, "agents_proved": 1, "guards": 2, "ended_by": "expiry", "ended_at": naive(later(2_000)),
    }  # fmt: skip
    assert {name: team.get(name) for name in expected} == expected
    assert {"calls_after", "agents", "ended_at", "ended_by", "unit", "crossed_at", "violations"} & set(manual) == set()
    assert (manual["issued_by"], manual["reason"]) == ("jan", "looks odd")


def test_incidents_are_found_by_workspace_time_and_the_beginning_of_their_id(database: Database) -> None:
    def found(**changes: Any) -> list[str]:
        return [row["scope"] for row in ask(database, "incidents", **{**EVERYTHING, **changes})]

    assert found(workspace="other") == ["workspace:other"]
    assert found(id=TEAM.id) == [TEAM.scope]
    assert found(id="ff") == []
    assert found(id="'; DROP TABLE commands --") == []
    assert found(since=later(1_000), until=later(1_001)) == [TEAM.scope]
    assert found(limit=1) == ["workspace:other"]


def test_each_agent_under_a_halt_has_its_row(database: Database) -> None:
    rows = ask(
        database, "incident_agents",
        id=TEAM.id, scope=TEAM.scope, since=TEAM.issued_at, until=later(2_000), limit=100,
    )  # fmt: skip
    assert [
        (
            row["agent"],
            row["enforced_at"] is not None,
            row["lag_us"],
            row["calls_after"],
            row["nanos_after"],
            row["proved_by"],
            row["in_flight_at_stop"],
            row["tokens_since"],
        )
        for row in rows
    ] == [
        (AGENT, True, 1_200_000, 1, {"USD": 64 * DOLLAR}, "guard-research", 2, 900),
        ("agent:acme/research/agent-2", False, None, 1, {"USD": 32 * DOLLAR}, "", None, None),
    ]


class Shown:
    """The command line over the trail above, as if it were a server's."""

    def __init__(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        client = database._client
        client.database = database.name
        monkeypatch.setattr(queries, "connect", lambda _settings: client)
        monkeypatch.setattr(client, "close", lambda: None)
        for name in ("SPENDFUSE_CLICKHOUSE_URL", "SPENDFUSE_BOOTSTRAP_SERVERS"):
            monkeypatch.delenv(name, raising=False)

    def __call__(self, *arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, ["incidents", "--state-dir", "nowhere", *arguments])
        assert done.exit_code == code, done.output
        return done.output


@pytest.fixture
def shown(database: Database, monkeypatch: pytest.MonkeyPatch) -> Shown:
    return Shown(database, monkeypatch)


def test_the_command_line_lists_halts_and_tells_one(shown: Shown) -> None:
    listed = shown("--since", "9999d")
    assert len([line for line in listed.splitlines() if line.startswith("00000000")]) == 3
    assert "USD 1.10 of USD 1.00" in listed
    told = shown(LIFTED.id)
    story = [" ".join(line.split()[2:]) for line in told.splitlines() if line.startswith("03-28")]
    assert story == [
        "cap crossed usage call-0-1; USD 1.10 of USD 1.00",
        "halt ordered by spendfuse (weekend, cap daily)",
        "first guard received it 1 guards of 1 agents in all",
        "first agent stopped halt lag 60,050.0 ms",
        "last agent stopped 1 agents (0 proved), 60,050.0 ms",
        "last call that ended after it USD 6.00 in 2 calls, by 1 agents",
        "ended by resume by ada: it was the backfill",
    ]
    assert "1 alerts say that its spending went on" in told
    assert [" ".join(line.split()[:5]) for line in told.splitlines() if line.startswith("agent:") and "claimed" in line]
    assert "proved by guard-research" in " ".join(shown(TEAM.id).split())
    assert "1 of 2 (1 proved)" in " ".join(listed.split())
    assert "No guard ever answered" in shown(MANUAL.id)


def test_the_command_line_says_it_as_json_and_refuses_what_is_no_id(shown: Shown) -> None:
    one = json.loads(shown(TEAM.id, "--json"))
    assert [(each["agent"], each["nanos_after"]) for each in one["per_agent"]] == [
        (AGENT, {"USD": 64 * DOLLAR}), ("agent:acme/research/agent-2", {"USD": 32 * DOLLAR}),
    ]  # fmt: skip
    assert one["issued_at"] == "2025-03-28T22:26:40.000000Z"
    assert len(json.loads(shown("0000", "--json"))) == 3
    assert json.loads(shown("--workspace", "nobody", "--since", "9999d", "--json")) == []
    assert "is no incident's id" in shown("x'; --", code=2)
    assert "no halt whose id begins with ff" in shown("ff", code=1)
