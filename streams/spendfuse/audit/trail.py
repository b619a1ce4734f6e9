"""The trail in ClickHouse: store a batch, and find where a partition stands. Blocking calls."""

from dataclasses import dataclass
from typing import Final

from spendfuse.audit.batches import Batch, BatchHeader
from spendfuse.audit.database import Database
from spendfuse.audit.seal import GENESIS

_ROW_TABLES: Final = ("usage_events", "corrections", "commands", "acks", "alerts", "ledger_events")
_LAST_SEQ: Final = """
SELECT max(seq), count() FROM {db:Identifier}.audit_batches WHERE ledger_partition = {partition:UInt16}
"""
_LAST_LINK: Final = """
SELECT if(leaf_version = 0, content_sha256, header_hash) FROM {db:Identifier}.audit_batches
WHERE ledger_partition = {partition:UInt16} ORDER BY seq DESC LIMIT 1
"""
_HAS_ROWS: Final = """
SELECT count() FROM (
  SELECT 1 FROM {db:Identifier}.{table:Identifier} WHERE ledger_partition = {partition:UInt16} LIMIT 1
)
"""


class TrailError(Exception):
    """The ledger, its batch headers and the database contradict each other; the message says how to go on."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a partition's batches go on: from a header's end, or from the ledger's beginning when there is none.

    `repeat` is the header whose batch is inserted once more before that, `link` the hash that the next one holds.
    """

    generation: int
    seq: int
    repeat: BatchHeader | None
    note: str = ""
    link: str = GENESIS


def store(database: Database, batch: Batch) -> None:
    """Insert a batch's rows, then the row that says so; every insert is harmless the second time."""
    for table in batch.tables:
        database.insert(table, batch.token(table.name))
    note = batch.batch_row
    database.insert(note, batch.token(note.name))


def last_seq(database: Database, partition: int) -> int | None:
    """Return the number of the last batch the database has of a ledger partition; None when it has none."""
    ((seq, count),) = database.query(_LAST_SEQ, {"partition": partition})
    return int(seq) if count else None


def last_link(database: Database, partition: int) -> str:
    """Return the hash that the header after the last batch holds; zeros when there is no batch."""
    found = database.query(_LAST_LINK, {"partition": partition})
    if not found:
        return GENESIS
    link = found[0][0]
    return link.decode() if isinstance(link, bytes) else str(link)


def has_rows(database: Database, partition: int) -> bool:
    """Say whether any table holds a row of a ledger partition."""
    return any(database.query(_HAS_ROWS, {"table": table, "partition": partition})[0][0] for table in _ROW_TABLES)


def where_to_start(database: Database, partition: int, header: BatchHeader | None, committed: int | None) -> Start:
    """Decide where a partition goes on, from its last header, the database and the group's committed offset.

    Raises TrailError rather than count money twice or leave a gap.
    """
    known = last_seq(database, partition)
    if header is None:
        if known is None:
            return Start(1, 1, None)
        if committed is not None:
            raise TrailError(
                f"ledger partition {partition}: the database has {known} batches and the topic of batch headers has "
                "none. Was the topic deleted? Point the audit at a new, empty database: it is filled from the ledger"
            )
        note = "the broker is new: batches go on from the beginning of its ledger"
        return Start(1, known + 1, None, note, last_link(database, partition))
    if known is None and header.seq > 1:
        if has_rows(database, partition):
            raise TrailError(
                f"ledger partition {partition}: the database has rows and no audit_batches. "
                "Restore it from a backup, or point the audit at a new, empty database"
            )
        return Start(header.generation + 1, 1, None, "the database is new: it is filled from the whole ledger")
    if (known or 0) not in (header.seq - 1, header.seq):
        raise TrailError(
            f"ledger partition {partition}: the last batch header is {header.seq}, the database's last batch is "
            f"{known or 0}. Was one of them restored from a backup? Point the audit at a new, empty database"
        )
    return Start(header.generation + 1, header.seq + 1, header, link=header.link)
