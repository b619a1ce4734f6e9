"""Corrections in the trail: rollups, an upgrade over existing rows, repeated batches, rebuilds of rollups and state."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from audit_samples import START, charge, correction, message
from spendfuse.audit import migrate, queries, rebuild, trail
from spendfuse.audit.batches import Collector, Message
from spendfuse.wire.base import to_us

pytest.importorskip("chdb", reason="the embedded ClickHouse needs the chdb package")

from spendfuse.audit.database import Engine, open_embedded

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from spendfuse.audit.batches import Batch
    from spendfuse.audit.database import Database
    from spendfuse.wire.ledger import LedgerEntry

BEFORE = 10
"""The last migration without corrections."""
CHARGES = [charge(nth) for nth in range(40)]
FIXES = [correction(entry, 100 + nth, tokens=-(nth + 9)) for nth, entry in enumerate(CHARGES[::4])]
ROLLUPS = ("spend_1m", "spend_1h", "spend_1d")


@contextmanager
def opened(directory: Path, rights: Any = "writer") -> Iterator[Database]:
    database = open_embedded(Engine(directory, "trail", rights))
    try:
        yield database
    finally:
        database.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "clickhouse"


def batch(entries: Sequence[LedgerEntry], seq: int) -> Batch:
    collector = Collector("spendfuse.ledger.v1", 0, 1, seq, {}, 5_000)
    assert collector.add(Message(seq, seq, message(entries)))
    return collector.seal()


def expected() -> tuple[int, int, int]:
    """Calls, output tokens and nano-units of the charges and their corrections, added up here."""
    output = nanos = 0
    for entry in CHARGES:
        assert entry.usage is not None
        assert entry.charge is not None
        output += entry.usage.tokens.output
        nanos += entry.charge.cost_nanos
    for entry in FIXES:
        assert entry.correction is not None
        output += entry.correction.tokens.output
        nanos += entry.correction.cost_nanos
    return len(CHARGES), output, nanos


def sums(database: Database, table: str) -> tuple[int, ...]:
    sql = f"SELECT sum(calls), toInt64(sum(output_tokens)), sum(cost_nanos) FROM trail.{table}"  # noqa: S608
    ((calls, output, nanos),) = database.query(sql)
    return int(calls), int(output), int(nanos)


def filled(database: Database) -> None:
    """A trail of charges from before there were corrections, upgraded, with corrections; their batch came twice."""
    every = migrate.load_migrations()
    migrate.apply(database, [each for each in every if each.version <= BEFORE])
    trail.store(database, batch(CHARGES, 1))
    migrate.apply(database, every)
    for _ in range(2):
        trail.store(database, batch(FIXES, 2))


def test_after_an_upgrade_old_charges_and_new_corrections_are_one_sum_in_rows_and_rollups(directory: Path) -> None:
    with opened(directory) as database:
        filled(database)
        for table in (*ROLLUPS, "net_charges"):
            assert sums(database, table) == expected(), table
        assert database.query("SELECT count() FROM trail.corrections") == [(len(FIXES),)]
        assert rebuild.compare(database) == []


def test_rollups_rebuilt_from_the_rows_have_the_corrections(directory: Path) -> None:
    with opened(directory) as database:
        filled(database)
        database.command("INSERT INTO trail.spend_1d SELECT * FROM trail.spend_1d LIMIT 3")
    with opened(directory, "operator") as database:
        assert {each.table for each in rebuild.rebuild(database)} == {"spend_1d"}
        for table in ROLLUPS:
            assert sums(database, table) == expected(), table


def test_a_bucket_below_zero_is_read_as_a_negative_number(directory: Path) -> None:
    with opened(directory) as database:
        migrate.apply(database)
        trail.store(database, batch(FIXES[:1], 1))
        database.command("USE trail")
        ((output, nanos),) = database.query(
            "SELECT sum(output_tokens), sum(cost_nanos) FROM trail.spend_over(since = 0, until = 4000000000)"
        )
        assert (output, nanos) == (-9, -9)


def test_the_pipeline_s_state_is_folded_from_charges_and_corrections_of_the_trail(directory: Path) -> None:
    with opened(directory) as database:
        filled(database)
        database.command("USE trail")
        given = {
            "partition": 0, "seq_from": 0, "seq_to": 9, "former_seq": 9, "former": START, "first": 1, "after_seq": 0,
            "after_offset": 0, "after_row": 0, "rows_max": 1_000,
        }  # fmt: skip
        rows = database.query(queries.load("state_charges"), given)
    assert (sum(row[12] == 0 for row in rows), sum(row[12] > 0 for row in rows)) == (len(CHARGES), len(FIXES))
    assert sum(row[7] for row in rows) == expected()[2]
    fixes = {row[4]: row[12] for row in rows if row[12]}
    assert fixes == {entry.correction.id: to_us(entry.correction.at) for entry in FIXES if entry.correction}
