"""Retention: whole months of usage, the oldest first, dropped after a signed entry of the ledger has said so.

Only `usage_events` is dropped. Commands, acks, alerts and events have their tables' time to live; headers and rollups
stay: sums without persons may be wanted for longer (accounting law), and they prove what was there.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from spendfuse.audit import operator
from spendfuse.audit.database import Database
from spendfuse.audit.files import query_text
from spendfuse.client.keys import Verifier
from spendfuse.settings import RETENTION_DAYS_FLOOR
from spendfuse.wire.base import EPOCH, rfc3339

ACTION: Final = "retention"
MONTHS_MAX: Final = 1_200
_MONTH: Final = re.compile(r"[0-9]{4}(?:0[1-9]|1[0-2])")
_ENTRIES: Final = """
SELECT data FROM {db:Identifier}.ledger_events WHERE kind = 'operator' ORDER BY recorded_at LIMIT 100000
"""


class RetentionError(Exception):
    """Retention that may not be applied; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Month:
    """A month of usage: its rows, its charges in nano-units by currency, and whether its retention has ended."""

    name: str
    rows: int
    newest_at: datetime
    cost_nanos: dict[str, int]
    expired: bool

    @property
    def end(self) -> datetime:
        """Return the first instant after the month."""
        year, month = int(self.name[:4]), int(self.name[4:])
        return datetime(year + month // 12, month % 12 + 1, 1, tzinfo=UTC)


def plan(database: Database, days: int, now: datetime) -> list[Month]:
    """Return the months there are, oldest first, and which have expired.

    A month has expired when it ended, and its last row came, more than `days` ago, and every month before it has
    expired too. Raises RetentionError below the floor, whatever the settings say.
    """
    if days < RETENTION_DAYS_FLOOR:
        raise RetentionError(f"a retention of {days} days is below the floor of {RETENTION_DAYS_FLOOR}: keep more")
    keep_from = now - timedelta(days=days)
    months: list[Month] = []
    open_end = True
    for name, rows, newest_at, cost in database.query(query_text("retention_months")):
        month = Month(
            name, int(rows), newest_at.replace(tzinfo=UTC), {k: int(v) for k, v in cost.items()}, expired=False
        )
        open_end = open_end and month.end <= keep_from and month.newest_at < keep_from
        months.append(Month(name, month.rows, month.newest_at, month.cost_nanos, expired=open_end))
    return months


def about(database: Database, months: Sequence[Month], days: int) -> dict[str, Any]:
    """Return what the ledger's entry says of months to be dropped: their rows, their charges and where they lay."""
    if not 0 < len(months) <= MONTHS_MAX or not all(month.expired and _MONTH.fullmatch(month.name) for month in months):
        raise RetentionError("only months that have expired are dropped")
    return {
        "retention_days": days,
        "dropped_before": rfc3339(max(month.end for month in months)),
        "months": [
            {
                "month": month.name,
                "rows": month.rows,
                "cost_nanos": month.cost_nanos,
                "ledger": [
                    {
                        "partition": int(partition),
                        "rows": int(rows),
                        "first_offset": int(first),
                        "last_offset": int(last),
                    }
                    for partition, rows, first, last in database.query(
                        query_text("retention_ledger"), {"month": int(month.name)}
                    )
                ],
            }
            for month in months
        ],
    }


def apply(database: Database, months: Sequence[Month], days: int, now: datetime) -> None:
    """Drop the months, which the ledger says already; raises RetentionError when they are no longer what it says."""
    there = {month.name: month for month in plan(database, days, now)}
    for month in months:
        if there.get(month.name) != month:
            raise RetentionError(
                f"month {month.name} has changed since it was planned: stop the audit process, and plan anew"
            )
    for month in months:
        database.command(f"ALTER TABLE {database.name}.usage_events DROP PARTITION ID '{month.name}'")


def dropped_before(database: Database, verifier: Verifier | None) -> datetime:
    """Return the instant before which usage was dropped by an entry that a key of the verifier's signed; else 1970."""
    latest = EPOCH
    for (data,) in database.query(_ENTRIES):
        said = operator.read(data, verifier)
        if said is None or said.get("action") != ACTION:
            continue
        try:
            latest = max(latest, datetime.fromisoformat(str(said["dropped_before"])).astimezone(UTC))
        except (KeyError, ValueError):
            continue
    return latest
