"""The trail in the embedded ClickHouse: typed rows, exact sums in base and rollups, and a batch in once."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from audit_samples import COUNTERS, START, ack_entry, charge, command_entry, halt, message, totals
from spendfuse.audit import migrate, queries, trail
from spendfuse.audit.batches import Collector, Message, form_again
from spendfuse.wire.control import CommandWindow, Measure
from spendfuse.wire.usage import Tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from spendfuse.audit.batches import Batch
    from spendfuse.audit.database import Database
    from spendfuse.wire.ledger import LedgerEntry

pytest.importorskip("chdb", reason="the embedded ClickHouse needs the chdb package")
clickhouse = pytest.importorskip("clickhouse_connect.driver.exceptions")

from spendfuse.audit.database import Engine, open_embedded  # noqa: E402

COLUMNS = ", ".join(f"sum({name}_tokens)" for name in COUNTERS)
EVERYTHING = {
    "workspace": "acme",
    "since": datetime(2025, 1, 1, tzinfo=UTC),
    "until": datetime(2026, 1, 1, tzinfo=UTC),
}


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = open_embedded(Engine(tmp_path / "clickhouse", "trail"))
    try:
        migrate.apply(opened)
        yield opened
    finally:
        opened.close()


def batches(entries: Sequence[LedgerEntry], per_message: int = 7, rows_max: int = 30) -> Iterator[Batch]:
    collector = Collector("spendfuse.ledger.v1", 1, 1, 1, {}, rows_max)
    for offset in range(0, len(entries), per_message):
        each = Message(offset, 1_700_000_000_000, message(entries[offset : offset + per_message]))
        if not collector.add(each):
            yield collector.seal()
            collector.add(each)
    yield collector.seal()


def write(database: Database, entries: Sequence[LedgerEntry]) -> None:
    for batch in batches(entries):
        trail.store(database, batch)


def ask(database: Database, name: str, **parameters: Any) -> list[dict[str, Any]]:
    """The rows of a shipped query by column; a reader's client has chosen the database."""
    client = database._client
    client.database = database.name
    result = client.query(queries.load(name), parameters={**EVERYTHING, **parameters})
    return [dict(zip(result.column_names, row, strict=True)) for row in result.result_rows]


def sums(database: Database, table: str, calls: str) -> dict[tuple[str, str], tuple[int, ...]]:
    rows = database.query(
        f"SELECT team, agent, {calls}, {COLUMNS}, sum(cost_nanos) FROM {{db:Identifier}}.{table} "  # noqa: S608
        + ("WHERE kind = 'charge' " if table == "usage_events" else "")
        + "GROUP BY team, agent"
    )
    return {(row[0], row[1]): tuple(int(value) for value in row[2:]) for row in rows}


def everywhere(database: Database) -> list[dict[tuple[str, str], tuple[int, ...]]]:
    base = sums(database, "usage_events", "count()")
    return [base, *(sums(database, table, "sum(calls)") for table in ("spend_1m", "spend_1h", "spend_1d"))]


def test_migrations_run_twice_change_nothing(database: Database) -> None:
    assert migrate.apply(database) == []
    versions = database.query("SELECT version FROM {db:Identifier}.schema_migrations ORDER BY version")
    assert [row[0] for row in versions] == [migration.version for migration in migrate.load_migrations()]


def test_migrations_cut_short_anywhere_are_completed_by_the_next_run(tmp_path: Path) -> None:
    database = open_embedded(Engine(tmp_path / "clickhouse", "trail"))
    try:
        statements = [
            each.replace("${DB}", "trail").replace("${TTL_DAYS}", "400")
            for migration in migrate.load_migrations()
            for each in migrate.split_statements(migration.sql)
        ]
        for statement in statements[:6]:
            database.command(statement)
        assert len(migrate.apply(database)) == len(migrate.load_migrations())
        write(database, [charge(nth) for nth in range(50)])
        assert everywhere(database) == [totals(map(charge, range(50)))] * 4
    finally:
        database.close()


def test_a_changed_migration_is_refused_and_nothing_is_run(database: Database, tmp_path: Path) -> None:
    directory = tmp_path / "migrations"
    directory.mkdir()
    for migration in migrate.load_migrations():
        (directory / str(migration)).write_text(migration.sql + ("\n" if migration.version == 3 else ""))
    (directory / "0099_new.sql").write_text("CREATE TABLE ${DB}.new (a Int8) ENGINE = Memory;")
    with pytest.raises(migrate.MigrationError, match=r"0003_spend_rollups\.sql was changed"):
        migrate.apply(database, migrate.load_migrations(directory))
    assert database.query("SELECT count() FROM system.tables WHERE database = {db:String} AND name = 'new'") == [(0,)]


def test_a_charge_is_a_row_with_every_value_typed(database: Database) -> None:
    entry = charge(11)
    write(database, [entry])
    (row,) = database.query(
        "SELECT usage_id, toUnixTimestamp64Micro(occurred_at), toString(kind), workspace, team, agent, run, root_run, "
        "parent_run, model, input_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, "
        "output_tokens, reasoning_tokens, cost_nanos, currency, rates, late, tags, src_partition, src_offset, "
        "src_index, ledger_partition, cost_usd, ts = occurred_at FROM {db:Identifier}.usage_events"
    )
    assert row == (
        "call-0-11", 1_743_199_200_000_000 + 407_000_011, "charge", "acme", "research", "agent-1", "run-4", "run-root",
        "", "claude-opus-4-5", 122, 1_111, 11, 2, 20, 2, 11_000_040, "USD",
        [5_000_000_000, 500_000_000, 6_250_000_000, 10_000_000_000, 25_000_000_000], 0,
        {"cost-center": "cc-1", "note": "o'brien \\ \"x\" ; DROP TABLE usage_events --"}, 0, 2, 3, 1, 0.01100004, 1,
    )  # fmt: skip


def test_base_and_rollups_hold_the_exact_sums_over_a_month_s_end_and_duplicates_count_nowhere(
    database: Database,
) -> None:
    weekend = [charge(nth, ts=START + timedelta(minutes=nth * 11), kind="duplicate" if nth % 9 == 0 else "charge")
               for nth in range(700)]  # fmt: skip
    assert weekend[-1].usage is not None
    assert weekend[-1].usage.ts.month > START.month
    write(database, [*weekend[:400], *weekend[350:]])
    assert everywhere(database) == [totals(weekend)] * 4
    assert database.query("SELECT countIf(kind = 'duplicate') FROM {db:Identifier}.usage_events") == [(78,)]


@pytest.mark.parametrize("inserted", range(6))
def test_a_batch_cut_short_after_any_insert_is_whole_and_single_after_it_is_repeated(
    database: Database, inserted: int
) -> None:
    """The writer was killed after so many inserts; who takes over forms the batch again from its header."""
    day = START + timedelta(days=1)
    entries = [
        *(charge(nth) for nth in range(60)),
        command_entry(halt(1), 0),
        ack_entry(halt(1), 0, "enforced", day),
        charge(70).model_copy(update={"kind": "rejected", "usage": None, "charge": None, "data": {"why": "late"}}),
    ]
    offset_and_value = [Message(nth, 0, message([entry])) for nth, entry in enumerate(entries)]
    collector = Collector("spendfuse.ledger.v1", 1, 1, 1, {}, 5_000)
    assert all(collector.add(each) for each in offset_and_value)
    batch = collector.seal()
    steps = [*batch.tables, batch.batch_row]
    assert len(steps) == 5
    for table in steps[:inserted]:
        database.insert(table, batch.token(table.name))

    trail.store(database, form_again("spendfuse.ledger.v1", batch.header, offset_and_value))

    assert everywhere(database) == [totals(entries)] * 4
    counts = [
        database.query(f"SELECT count() FROM {{db:Identifier}}.{table}")[0][0]  # noqa: S608
        for table in ("usage_events", "commands", "acks", "ledger_events", "audit_batches")
    ]
    assert counts == [60, 1, 1, 1, 1]
    assert trail.last_seq(database, 1) == 1
    assert trail.last_seq(database, 0) is None


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE trail.usage_events",
        "TRUNCATE TABLE trail.usage_events",
        "ALTER TABLE trail.usage_events DELETE WHERE 1",
        "ALTER TABLE trail.usage_events UPDATE cost_nanos = 0 WHERE 1",
        "DELETE FROM trail.usage_events WHERE 1",
        "ALTER TABLE trail.usage_events DROP COLUMN cost_nanos",
        "DROP DATABASE trail",
        "INSERT INTO FUNCTION file('/dev/null', 'CSV', 'a Int8') SELECT 1",
        "SELECT * FROM url('http://127.0.0.1:9/', 'CSV', 'a String')",
    ],
)
def test_even_the_process_that_writes_the_trail_has_no_right_to_change_it(database: Database, statement: str) -> None:
    with pytest.raises(clickhouse.DatabaseError, match="Not enough privileges"):
        database.command(statement)


def test_the_directory_of_a_running_audit_is_not_opened_by_another(database: Database, tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from spendfuse.audit.database import *\n"
        "try: open_embedded(Engine(Path(sys.argv[1]), 'trail'))\n"
        "except DatabaseUnavailableError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "clickhouse")],
        capture_output=True, text=True, timeout=60, check=False, env={"PYTHONPATH": "streams"},
    )  # fmt: skip
    assert "belongs to another audit process that is running" in done.stdout, done.stderr


def test_the_totals_query_says_what_the_entries_add_up_to(database: Database) -> None:
    entries = [charge(nth) for nth in range(200)]
    write(database, [*entries, *entries[150:]])
    rows = ask(database, "totals")
    names = ("calls", *(f"{name}_tokens" for name in COUNTERS), "cost_nanos")
    assert {(row["team"], row["agent"]): tuple(row[name] for name in names) for row in rows} == totals(entries)
    assert ask(database, "totals", workspace="other") == []
    assert len(ask(database, "totals", workspace="")) == len(rows)


def test_the_wallet_adds_up_at_every_level(database: Database) -> None:
    entries = [charge(nth) for nth in range(90)]
    write(database, entries)
    rows = ask(database, "wallet")
    expected = sum(entry.charge.cost_nanos for entry in entries if entry.charge)
    for kind, scopes in (("workspace", 1), ("team", 2), ("run", 1), ("agent", 10)):
        level = [row for row in rows if row["scope_kind"] == kind]
        assert (len(level), sum(row["cost_nanos"] for row in level)) == (scopes, expected)
        assert sum(row["calls"] for row in level) == 90
    tokens = [entry.usage.tokens for entry in entries if entry.usage]
    (workspace,) = (row for row in rows if row["scope"] == "workspace:acme")
    assert workspace["tokens"] == sum(each.total for each in tokens)
    reads = sum(each.cache_read for each in tokens)
    assert workspace["cache_hit_bp"] == 10_000 * reads // sum(each.total - each.output for each in tokens)


def test_agents_and_models_cover_the_same_money_in_the_asked_time(database: Database) -> None:
    entries = [charge(nth) for nth in range(90)]
    write(database, entries)
    until = START + timedelta(seconds=60 * 37)
    inside = [entry for entry in entries if entry.usage and entry.usage.ts < until]
    expected = sum(entry.charge.cost_nanos for entry in inside if entry.charge)
    agents, models = ask(database, "agents", until=until), ask(database, "models", until=until)
    assert 0 < len(inside) < 90
    assert sum(row["cost_nanos"] for row in agents) == sum(row["cost_nanos"] for row in models) == expected
    assert [row["model"] for row in models] == ["claude-opus-4-5", "claude-haiku-4-5"]
    assert min(row["first_at"] for row in agents) == START.replace(tzinfo=None)


def test_a_halt_is_shown_with_the_first_acks_of_each_agent(database: Database) -> None:
    order, unheard = halt(1), halt(2, scope="team:acme/research")
    second = START + timedelta(minutes=10, seconds=1)
    write(
        database,
        [
            command_entry(order, 0),
            command_entry(unheard, 1),
            command_entry(halt(3), 2, "decision"),
            command_entry(order, 9),  # sent again after a rebalance
            ack_entry(order, 0, "received", second),
            ack_entry(order, 1, "enforced", second + timedelta(milliseconds=5), halt_lag_us=61_005_000),
            ack_entry(order, 2, "enforced", second + timedelta(seconds=9), halt_lag_us=70_000_000, guard="guard-2"),
            ack_entry(order, 3, "received", second, agent="agent:acme/research/agent-2"),
        ],
    )
    rows = ask(database, "halts")
    assert [(row["scope"], row["agent"], row["halt_lag_us"], row["guards"]) for row in rows] == [
        ("agent:acme/research/agent-1", "agent:acme/research/agent-1", 61_005_000, 2),
        ("agent:acme/research/agent-1", "agent:acme/research/agent-2", None, 1),
        ("team:acme/research", "", None, 0),
    ]
    assert rows[0]["enforced_at"] == (second + timedelta(milliseconds=5)).replace(tzinfo=None)
    assert rows[0]["crossed_at"] == (START + timedelta(minutes=9)).replace(tzinfo=None)
    assert rows[1]["enforced_at"] is None


def spent(nth: int, minute: float, dollars: int, **usage: Any) -> LedgerEntry:
    """A call of agent-1 of that many dollars and a thousand tokens a dollar."""
    given = {"ts": START + timedelta(minutes=minute), "team": "research", "tokens": Tokens(input=dollars * 1_000)}
    entry = charge(nth, **{**given, "agent": "agent-1", **usage})
    assert entry.charge is not None
    return entry.model_copy(update={"charge": entry.charge.model_copy(update={"cost_nanos": dollars * 1_000_000_000})})


def test_overshoot_is_what_the_window_cost_beyond_the_cap(database: Database) -> None:
    entries = [
        spent(1, -60, 1), spent(2, 9, 2), spent(3, 10, 4), spent(4, 30, 8),
        spent(5, 24 * 60, 16),  # the next day
        spent(6, 9.5, 32, agent="agent-2"), spent(7, 9.5, 64, workspace="other"),
    ]  # fmt: skip
    tokens = Measure(unit="tokens", cap=2_000, spend=3_000, committed=3_000, fraction=15_000)
    rolling = CommandWindow(kind="rolling", label="rolling 1h", timezone="UTC")
    run = CommandWindow(kind="run", label="run", timezone="UTC")
    resume = halt(9, cap="resumed", action="resume", issued_at=START + timedelta(minutes=20), measure=None, cause=None)
    write(
        database,
        [
            *entries,
            command_entry(halt(1), 0),
            command_entry(halt(2, cap="tokens", measure=tokens), 1),
            command_entry(halt(3, cap="resumed"), 2),
            command_entry(resume, 3),
            command_entry(halt(4, cap="rolling", window=rolling), 4),
            command_entry(halt(5, scope="run:acme/run-root", cap="run", window=run), 5),
            command_entry(halt(6, scope="team:acme/research", cap="team"), 6),
            command_entry(halt(7, budget="manual", cap="halt", measure=None, cause=None, window=None), 7),
        ],
    )
    final = {
        row["cap"]: (row["spend_at_halt"], row["spend_final"], row["overshoot"]) for row in ask(database, "overshoot")
    }
    dollar = 1_000_000_000
    at_halt = 1_100_000_000
    assert final == {
        "daily": (at_halt, 15 * dollar, 14 * dollar),
        "tokens": (3_000, 15_000, 13_000),
        "resumed": (at_halt, 7 * dollar, 6 * dollar),
        "rolling": (at_halt, 29_100_000_000, 28_100_000_000),
        "run": (at_halt, 63 * dollar, 62 * dollar),
        "team": (at_halt, 47 * dollar, 46 * dollar),
    }
