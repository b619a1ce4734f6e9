"""What dashboards read instead of rows: rollups in the order of time, and by run, exact for any range and upgrade."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from audit_samples import START, charge
from spendfuse.audit import migrate
from spendfuse.audit.rows import Place, entry_row, tables
from spendfuse.wire.base import to_us

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from spendfuse.audit.database import Database
    from spendfuse.wire.ledger import LedgerEntry

pytest.importorskip("chdb", reason="the embedded ClickHouse needs the chdb package")

from spendfuse.audit.database import Engine, open_embedded

BEFORE = 9
"""The last migration without rollups in the order of time."""
FIRST_S = to_us(START) // 1_000_000
SPAN_S = 5 * 86_400
HOUR_S = 3_600
MERGED_S_MAX = 60.0


def entries(count: int, first: int = 0) -> list[LedgerEntry]:
    """Charges spread over five days and a month's end, with every ninth a duplicate."""
    dice = random.Random(count + first)  # noqa: S311 - the same dice in every run
    return [
        charge(
            nth, kind="duplicate" if nth % 9 == 0 else "charge", root_run=f"tree-{nth % 11}",
            ts=START + timedelta(seconds=dice.randrange(SPAN_S), microseconds=dice.randrange(1_000_000)),
        )
        for nth in range(first, first + count)
    ]  # fmt: skip


def insert(database: Database, given: Sequence[LedgerEntry], token: str) -> None:
    for table in tables(entry_row(entry, Place("t", 0, nth, 0)) for nth, entry in enumerate(given)):
        database.insert(table, token)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = open_embedded(Engine(tmp_path / "clickhouse", "trail"))
    try:
        yield opened
    finally:
        opened.close()


def minute_of(entry: LedgerEntry) -> int:
    assert entry.usage is not None
    return to_us(entry.usage.ts) // 60_000_000 * 60


def charged(given: Sequence[LedgerEntry]) -> list[LedgerEntry]:
    return [entry for entry in given if entry.kind == "charge"]


def spent(given: Sequence[LedgerEntry], since: int, until: int) -> dict[str, tuple[int, int]]:
    """Agent -> calls and nano-units of the minutes from since to until, added up here."""
    sums: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for entry in charged(given):
        if since <= minute_of(entry) <= until:
            assert entry.usage is not None
            assert entry.charge is not None
            sums[entry.usage.agent][0] += 1
            sums[entry.usage.agent][1] += entry.charge.cost_nanos
    return {agent: (calls, nanos) for agent, (calls, nanos) in sums.items()}


def asked(database: Database, source: str) -> dict[str, tuple[int, int]]:
    rows = database.query(f"SELECT agent, sum(calls), sum(cost_nanos) FROM {database.name}.{source} GROUP BY agent")  # noqa: S608
    return {str(agent): (int(calls), int(nanos)) for agent, calls, nanos in rows}


def by_run(database: Database) -> dict[tuple[str, int], int]:
    """(root run, hour) -> nano-units, in the words that ClickHouse answers from the projection."""
    rows = database.query(
        "SELECT root_run, toUnixTimestamp(toStartOfHour(occurred_at)) AS hour, sum(cost_nanos) "
        "FROM {db:Identifier}.usage_events WHERE kind = 'charge' GROUP BY root_run, toStartOfHour(occurred_at)"
    )
    return {(str(run), int(hour)): int(nanos) for run, hour, nanos in rows}


def runs_of(given: Sequence[LedgerEntry]) -> dict[tuple[str, int], int]:
    sums: defaultdict[tuple[str, int], int] = defaultdict(int)
    for entry in charged(given):
        assert entry.usage is not None
        assert entry.charge is not None
        sums[str(entry.usage.root_run), minute_of(entry) // HOUR_S * HOUR_S] += entry.charge.cost_nanos
    return dict(sums)


def filled(database: Database) -> dict[tuple[str, str], int]:
    """Rows of each projection in the parts that are in use."""
    rows = database.query(
        "SELECT table, name, sum(rows) FROM system.projection_parts WHERE active AND database = {db:String} "
        "GROUP BY table, name"
    )
    return {(str(table), str(name)): int(count) for table, name, count in rows}


def test_a_range_is_the_sum_of_its_minutes_however_its_ends_lie_to_hours_and_days(database: Database) -> None:
    migrate.apply(database)
    given = entries(1_500)
    insert(database, given, "once")
    dice = random.Random(7)  # noqa: S311 - the same dice in every run
    ranges = [
        (FIRST_S, FIRST_S),
        (FIRST_S - 86_400, FIRST_S + 2 * SPAN_S),
        (FIRST_S // 86_400 * 86_400, FIRST_S // 86_400 * 86_400 + 86_400 * 3 - 1),
        *(sorted((FIRST_S + dice.randrange(SPAN_S), FIRST_S + dice.randrange(SPAN_S))) for _ in range(60)),
        *((at, at + dice.randrange(3 * HOUR_S)) for at in (FIRST_S + dice.randrange(SPAN_S) for _ in range(40))),
    ]
    for since, until in ranges:
        found = asked(database, f"spend_over(since = {since}, until = {until})")
        assert found == spent(given, since, until), (since, until)


@pytest.mark.parametrize("step", [60, 300, 1_800, 3_600, 10_800, 86_400])
def test_a_graph_s_points_are_whole_at_its_beginning_and_add_up(database: Database, step: int) -> None:
    migrate.apply(database)
    given = entries(800)
    insert(database, given, "once")
    since, until = FIRST_S + 40_321, FIRST_S + 300_119
    found = asked(database, f"spend_by(step = {step}, since = {since}, until = {until})")
    last = until if step % HOUR_S else until // HOUR_S * HOUR_S + HOUR_S - 1
    assert found == spent(given, since // step * step, last)


def test_a_repeated_insert_changes_neither_order_of_a_rollup_nor_the_runs(database: Database) -> None:
    migrate.apply(database)
    given = entries(600)
    for token in ("a", "a", "b", "b", "a"):
        insert(database, given[:350] if token == "a" else given[350:], token)
    assert asked(database, f"spend_over(since = 0, until = {FIRST_S * 2})") == spent(given, 0, FIRST_S * 2)
    assert asked(database, f"spend_by(step = 60, since = 0, until = {FIRST_S * 2})") == spent(given, 0, FIRST_S * 2)
    assert by_run(database) == runs_of(given)


def test_merged_parts_hold_the_same_sums_in_both_orders(database: Database) -> None:
    migrate.apply(database)
    given = entries(1_200)
    for nth in range(0, len(given), 30):
        insert(database, given[nth : nth + 30], f"batch {nth}")
    give_up_at = time.monotonic() + MERGED_S_MAX
    merged = (
        "SELECT uniqExact(table) FROM system.parts WHERE active AND level > 0 AND table IN ('spend_1m', 'spend_1h')"
    )
    while database.query(merged)[0][0] < 2:
        assert time.monotonic() < give_up_at, "nothing was merged"
        time.sleep(0.1)
    for step in (60, HOUR_S):
        found = asked(database, f"spend_by(step = {step}, since = 0, until = {FIRST_S * 2})")
        assert found == spent(given, 0, FIRST_S * 2)
    rows = {name: database.query(f"SELECT count() FROM trail.{name}")[0][0] for name in ("spend_1m", "spend_1h")}  # noqa: S608
    assert {name: filled(database)[name, "by_time"] for name in rows} == rows


def test_what_was_written_before_is_filled_in_and_what_comes_after_is_added(database: Database) -> None:
    every = migrate.load_migrations()
    given = entries(1_000)
    migrate.apply(database, [each for each in every if each.version <= BEFORE])
    insert(database, given[:700], "the version before")
    assert ("spend_1m", "by_time") not in filled(database)
    assert [each.version for each in migrate.apply(database)] == [
        each.version for each in every if each.version > BEFORE
    ]
    old = filled(database)
    assert old["spend_1m", "by_time"] == database.query("SELECT count() FROM trail.spend_1m")[0][0] > 0
    assert old["spend_1h", "by_time"] == database.query("SELECT count() FROM trail.spend_1h")[0][0] > 0
    assert old["usage_events", "by_run"] > 0
    insert(database, given[700:], "this version")
    insert(database, given[:700], "the version before")  # a batch that is repeated after the upgrade
    for since, until in ((0, FIRST_S * 2), (FIRST_S + 4_000, FIRST_S + 200_000)):
        assert asked(database, f"spend_over(since = {since}, until = {until})") == spent(given, since, until)
    assert by_run(database) == runs_of(given)


def test_two_migrators_at_once_leave_one_of_everything(tmp_path: Path) -> None:
    """Two handles of one engine stand for two deployments against one server."""
    import clickhouse_connect

    from spendfuse.audit.database import Database

    engine = Engine(tmp_path / "clickhouse", "trail")
    first = open_embedded(engine)
    second = Database(
        clickhouse_connect.get_client(interface="chdb", path=engine.path, chdb_options=engine.options), "trail"
    )
    begin = threading.Barrier(2)
    faults: list[Exception] = []

    def upgrade(database: Database) -> None:
        begin.wait(30)
        try:
            migrate.apply(database)
        except Exception as error:  # noqa: BLE001 - any fault of either is a finding
            faults.append(error)

    try:
        both = [threading.Thread(target=upgrade, args=(each,)) for each in (first, second)]
        for each in both:
            each.start()
        for each in both:
            each.join(120)
        assert faults == []
        assert migrate.apply(first) == []
        versions = [row[0] for row in first.query("SELECT version FROM trail.schema_migrations ORDER BY version")]
        assert versions == [each.version for each in migrate.load_migrations()]
        given = entries(200)
        insert(second, given, "once")
        assert asked(first, "spend_1m") == asked(first, "spend_1d") == spent(given, 0, FIRST_S * 2)
    finally:
        second.close()
        first.close()


@pytest.mark.parametrize(
    ("sql", "read"),
    [
        ("SELECT sum(cost_nanos) FROM trail.spend_by(step = 60, since = {s}, until = {u}) WHERE workspace = 'acme'",
         "by_time"),
        ("SELECT sum(cost_nanos) FROM trail.spend_over(since = {s}, until = {u}) WHERE workspace = 'acme'", "by_time"),
        ("SELECT team, max(occurred_at) FROM trail.usage_events WHERE kind = 'charge' GROUP BY team", "by_run"),
    ],
)  # fmt: skip
def test_a_question_about_a_time_reads_what_lies_in_the_order_of_time(database: Database, sql: str, read: str) -> None:
    migrate.apply(database)
    # More than one granule, or any order is as good as another.
    many = [charge(nth, ts=START + timedelta(seconds=nth * 40)) for nth in range(20_000)]
    insert(database, many, "once")
    plan = database.query("EXPLAIN " + sql.format(s=FIRST_S + 400_000, u=FIRST_S + 440_000))
    assert any(f"ReadFromMergeTree ({read})" in row[0] for row in plan), plan
