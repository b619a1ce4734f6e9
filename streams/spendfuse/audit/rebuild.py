"""Rollups made anew from the rows they sum, month by month, while nothing is written.

Each month is summed into a table beside the rollup and takes the month's place in one step (REPLACE PARTITION), so a
reader sees the old sums or the new ones. The rollup stays the table it was, and with it the tokens it knows: a batch
that is inserted again, as after every restart, is still recognised. (A table exchanged for it, or one that was
truncated, would count that batch twice; tried on chDB 26.9.) Months whose rows have expired keep their sums.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from spendfuse.audit.database import Database

ROLLUPS: Final = ("spend_1m", "spend_1h", "spend_1d")
SUFFIX: Final = "_rebuild"
_MONTH: Final = re.compile(r"[0-9]{6}")
SOURCES: Final = {"usage_events": "mv", "corrections": "corrections_mv"}
"""What rollups sum, and the ending of the name of the view that sums it."""
_MONTHS: Final = "SELECT DISTINCT toString(toYYYYMM(occurred_at)) FROM {db:Identifier}.usage_events ORDER BY 1"
_VIEW: Final = "SELECT as_select FROM system.tables WHERE database = {db:String} AND name = {view:String}"
# By the batch's number and not by offset: on a new broker offsets begin again, and batches do not.
_OPEN_ROWS: Final = """
SELECT u.ledger_partition, count() FROM {db:Identifier}.usage_events AS u
LEFT JOIN (
  SELECT ledger_partition, max(seq) AS seq, count() AS batches
  FROM {db:Identifier}.audit_batches GROUP BY ledger_partition
) AS b ON b.ledger_partition = u.ledger_partition
WHERE b.batches = 0 OR u.batch_seq > b.seq
GROUP BY u.ledger_partition ORDER BY u.ledger_partition
"""
_BASE_SUMS: Final = """
SELECT toString(toYYYYMM(occurred_at)) AS month, currency, toInt64(sum(calls)), sum(cost_nanos),
  sum(input_tokens + cache_read_tokens + cache_write_5m_tokens + cache_write_1h_tokens + output_tokens)
FROM {db:Identifier}.net_charges GROUP BY month, currency
"""
_ROLLUP_SUMS: Final = """
SELECT toString(toYYYYMM(bucket)) AS month, currency, toInt64(sum(calls)), sum(cost_nanos),
  toInt64(sum(input_tokens + cache_read_tokens + cache_write_5m_tokens + cache_write_1h_tokens + output_tokens))
FROM {db:Identifier}.{table:Identifier} GROUP BY month, currency
"""

Sums = dict[tuple[str, str], tuple[int, int, int]]
"""(month, currency) -> calls, nano-units, tokens."""


class RebuildError(Exception):
    """Rollups that cannot be rebuilt now; the message says why and what to do. What is there is left as it is."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A month of a rollup that is not the sum of its rows: calls, nano-units and tokens, of each."""

    table: str
    month: str
    currency: str
    rollup: tuple[int, int, int]
    rows: tuple[int, int, int]


def compare(database: Database) -> list[Difference]:
    """Return where a rollup differs from its rows; months without any row have expired and are left out."""
    base = _sums(database, _BASE_SUMS)
    months = set(_months(database))
    found: list[Difference] = []
    for table in ROLLUPS:
        rollup = _sums(database, _ROLLUP_SUMS, table)
        for key in sorted({*base, *rollup}):
            mine, rows = rollup.get(key, (0, 0, 0)), base.get(key, (0, 0, 0))
            if key[0] in months and mine != rows:
                found.append(Difference(table, *key, mine, rows))
    return found


def rebuild(database: Database, progress: Callable[[str, str], None] = lambda _table, _month: None) -> list[Difference]:
    """Make every month of every rollup anew and return what was wrong before; `progress` gets each table and month.

    Nothing may be written meanwhile: raises RebuildError when the last batch of a ledger partition is not whole, or
    when rows arrived. Run again after a failure, it begins anew.
    """
    _check_whole(database)
    before, wrong = _sums(database, _BASE_SUMS), compare(database)
    for table in ROLLUPS:
        _rebuild(database, table, progress)
    if _sums(database, _BASE_SUMS) != before:
        raise RebuildError("usage was written while rollups were rebuilt: stop the audit process and run this again")
    left = compare(database)
    if left:
        raise RebuildError(f"{left[0].table} of {left[0].month} still differs from its rows: {left[0]}")
    return wrong


def _check_whole(database: Database) -> None:
    open_rows = database.query(_OPEN_ROWS)
    if open_rows:
        partition, rows = open_rows[0]
        raise RebuildError(
            f"{rows:,} rows of ledger partition {partition} are of a batch that is not whole yet, and would be counted "
            "again when it is completed: start the audit process, let it get ready, stop it, and run this again"
        )


def _rebuild(database: Database, table: str, progress: Callable[[str, str], None]) -> None:
    name, beside = database.name, table + SUFFIX
    selects = {source: _select(database, f"{table}_{ending}") for source, ending in SOURCES.items()}
    database.command(f"DROP TABLE IF EXISTS {name}.{beside} SYNC")
    database.command(f"CREATE TABLE {name}.{beside} AS {name}.{table}")
    for month in _months(database):
        progress(table, month)
        for source, select in selects.items():
            # The view's own text, over one month: what is inserted is what the view would have inserted.
            only = f"{{'{name}.{source}': 'toYYYYMM(occurred_at) = {month}'}}"
            database.command(
                f"INSERT INTO {name}.{beside} {select} SETTINGS additional_table_filters = {only}, "
                "insert_deduplicate = 0, max_partitions_per_insert_block = 0"
            )
        database.command(
            f"ALTER TABLE {name}.{table} REPLACE PARTITION ID '{month}' FROM {name}.{beside} "
            "SETTINGS allow_replace_partition_from_empty_source = 1"
        )
    database.command(f"DROP TABLE {name}.{beside} SYNC")


def _select(database: Database, view: str) -> str:
    ((select,),) = database.query(_VIEW, {"view": view}) or [("",)]
    if not select:
        raise RebuildError(f"database {database.name} has no view {view}: run `spendfuse audit migrate`")
    return str(select)


def _months(database: Database) -> list[str]:
    return [month for (month,) in database.query(_MONTHS) if _MONTH.fullmatch(month)]


def _sums(database: Database, sql: str, table: str = "") -> Sums:
    rows = database.query(sql, {"table": table} if table else {})
    return {(month, currency): (int(calls), int(nanos), int(tokens)) for month, currency, calls, nanos, tokens in rows}
