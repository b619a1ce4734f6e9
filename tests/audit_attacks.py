"""A program: fill trails in an engine without any grants, attack each of them, verify, and print what was found.

`python audit_attacks.py DIR`. Everything happens in one process with one engine, a database for each attack: the
database's own administrator is the attacker, and may do anything.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import clickhouse_connect

from audit_trails import messages, sealed, unsealed
from spendfuse.audit import migrate, seal, trail
from spendfuse.audit.checkpoints import Head, make_checkpoint
from spendfuse.audit.database import Database
from spendfuse.audit.rows import Table
from spendfuse.audit.verify import Report, verify

NOW: Final = datetime(2026, 1, 1, tzinfo=UTC)
LATER: Final = datetime(2028, 1, 1, tzinfo=UTC)
UNSEALED_UNTIL: Final = 7
EVIDENCE: Final = {
    "database",
    "usage_events",
    "control",
    "ledger_events",
    "audit_batches",
    "sealing",
    "spend_rollups",
    "chargeback_projection",
    "corrections",
}
"""The migrations of what is sealed; a trail without rollups is made in a tenth of the time."""
SYNC: Final = " SETTINGS mutations_sync = 2"
# Columns of which a copy of a row consists: all that are stored.
_COPY: Final = "INSERT INTO {table} SELECT * REPLACE ({change}) FROM (SELECT * FROM {table} WHERE {where})"

Attack = Callable[[Database], None]


def run(*statements: str) -> Attack:
    """An attack in SQL; mutations are waited for."""

    def attack(database: Database) -> None:
        for statement in statements:
            database.command(statement + (SYNC if statement.startswith("ALTER") else ""))

    return attack


def update(table: str, change: str, where: str) -> str:
    """Rewrite rows."""
    return f"ALTER TABLE {table} UPDATE {change} WHERE {where}"


def copy(table: str, change: str, where: str) -> str:
    """Insert a changed copy of a row."""
    return _COPY.format(table=table, change=change, where=where)


def forge_header(database: Database) -> None:
    """Rewrite batch 2 and hash its header anew: the attacker knows how, and forgets the batches after it."""
    columns = (
        "leaf_version, ledger_partition, seq, first_offset, last_offset, rows, usage_rows, leaf_sum, "
        "toUnixTimestamp64Milli(written_at), toUnixTimestamp64Micro(occurred_from), "
        "toUnixTimestamp64Micro(occurred_to), toString(content_sha256), toString(merkle_root), toString(prev_hash)"
    )
    ((*fields,),) = database.query(
        f"SELECT {columns} FROM audit_batches WHERE ledger_partition = 0 AND seq = 2"  # noqa: S608
    )
    forged = seal.HeaderFields(*fields)._replace(content_sha256="f" * 64)
    change = f"content_sha256 = '{'f' * 64}', header_hash = '{seal.header_hash(forged)}'"
    run(update("audit_batches", change, HEADER_2))(database)


def fork(database: Database) -> None:
    """A former owner of the partition writes another batch under a number that is taken."""
    (first, *_) = sealed(0, messages(0))
    (other, *_) = sealed(0, messages(0)[2:], seq=2, link=first.header.link)
    database.insert(other.batch_row, other.token("audit_batches"))


IN_1: Final = "ledger_partition = 0 AND batch_seq = 1"
IN_2: Final = "ledger_partition = 0 AND batch_seq = 2"
IN_3: Final = "ledger_partition = 0 AND batch_seq = 3"
EVENTS: Final = "usage_events", "corrections", "commands", "acks", "alerts", "ledger_events"
HEADER_2: Final = "ledger_partition = 0 AND seq = 2"
TAIL: Final = "ledger_partition = 0 AND batch_seq >= 4"
FIRST: Final = "ledger_partition = 0 AND usage_id = 'call-0-1'"

ATTACKS: Final[dict[str, Attack]] = {
    "nothing": run(),
    "a cost": run(update("usage_events", "cost_nanos = cost_nanos - 1", FIRST)),
    "a tag": run(update("usage_events", "tags = map('cost-center', 'cc-9')", FIRST)),
    "a rate": run(update("usage_events", "rates = [1, 2, 3, 4, 5]", FIRST)),
    "a computed column": run(
        "ALTER TABLE usage_events MODIFY COLUMN cost_center LowCardinality(String) MATERIALIZED 'cc-9'",
        "ALTER TABLE usage_events MATERIALIZE COLUMN cost_center IN PARTITION '202503'",
    ),
    "a correction": run(update("corrections", "cost_nanos = cost_nanos + 1", "ledger_partition = 0")),
    "a correction deleted": run("ALTER TABLE corrections DELETE WHERE ledger_partition = 0"),
    "a flag": run(update("usage_events", "late = 1 - late", FIRST)),
    "a command's message": run(update("commands", "message = 'nothing happened'", "ledger_partition = 0")),
    "a null": run(update("commands", "cause_ts = toDateTime64(0, 6, 'UTC')", HEADER_2)),
    "an ack's time": run(update("acks", "halt_lag_us = 1", "ledger_partition = 0 AND state = 'enforced'")),
    "an alert": run(update("alerts", "severity = 'info'", "ledger_partition = 0")),
    "an event": run(update("ledger_events", "data = '{}'", "ledger_partition = 0 AND kind = 'operator'")),
    "a row deleted": run("ALTER TABLE usage_events DELETE WHERE ledger_partition = 0 AND usage_id = 'call-0-1'"),
    "a row deleted lightly": run("DELETE FROM acks WHERE ledger_partition = 0 AND state = 'enforced'"),
    "a table truncated": run("TRUNCATE TABLE acks"),
    "the last row of a batch": run(
        "ALTER TABLE usage_events DELETE WHERE ledger_partition = 0 AND usage_id = 'call-0-11'"
    ),
    "a row repeated": run(copy("usage_events", "cost_nanos AS cost_nanos", FIRST)),
    "a row added": run(copy("usage_events", "batch_row + 1000 AS batch_row, 'new' AS usage_id", FIRST)),
    "a row in the place of another": run(
        "ALTER TABLE usage_events DELETE WHERE ledger_partition = 0 AND usage_id = 'call-0-1'",
        copy("usage_events", "1 AS batch_row, 'new' AS usage_id", "ledger_partition = 0 AND usage_id = 'call-0-2'"),
    ),
    "a row of no batch": run(copy("usage_events", "0 AS batch_seq, 'new' AS usage_id", FIRST)),
    "a row of a batch to come": run(copy("usage_events", "99 AS batch_seq, 'new' AS usage_id", FIRST)),
    "two rows exchanged": run(
        update("usage_events", "batch_row = 3 - batch_row", f"{IN_1} AND batch_row IN (1, 2)")
    ),
    "a row moved to another batch": run(update("usage_events", "batch_seq = 4", FIRST)),
    "a row moved to another partition": run(update("usage_events", "ledger_partition = 1", FIRST)),
    "a header gone": run("ALTER TABLE audit_batches DELETE WHERE ledger_partition = 0 AND seq = 3"),
    "a header and its rows gone": run(
        "ALTER TABLE audit_batches DELETE WHERE ledger_partition = 0 AND seq = 3",
        *(f"ALTER TABLE {table} DELETE WHERE {IN_3}" for table in EVENTS),
    ),
    "the tail cut": run(
        "ALTER TABLE audit_batches DELETE WHERE ledger_partition = 0 AND seq >= 4",
        *(f"ALTER TABLE {table} DELETE WHERE {TAIL}" for table in EVENTS),
    ),
    "a header's field": run(update("audit_batches", "last_offset = last_offset + 1", HEADER_2)),
    "a header's time": run(
        update("audit_batches", "written_at = toDateTime64('2020-01-01', 3, 'UTC')", HEADER_2),
        f"ALTER TABLE usage_events DELETE WHERE {IN_2}",
    ),
    "a header hashed anew": forge_header,
    "a fork": fork,
    "a header repeated": run(copy("audit_batches", "seq AS seq", HEADER_2)),
    "a seal taken off": run(
        update("audit_batches", "leaf_version = 0", "ledger_partition = 0 AND seq = 5"),
        *(update(table, "batch_seq = 0, cost_nanos = 0" if table == "usage_events" else "batch_seq = 0",
                 "ledger_partition = 0 AND batch_seq = 5") for table in EVENTS),
    ),
}  # fmt: skip


def rewrite(database: Database) -> None:
    """Replace the whole of partition 0 by another trail that is as well sealed as the first."""
    wipe = [f"ALTER TABLE {table} DELETE WHERE ledger_partition = 0" for table in (*EVENTS, "audit_batches")]
    run(*wipe)(database)
    for batch in sealed(0, messages(0)[1:]):
        trail.store(database, batch)


def findings(report: Report) -> list[object]:
    """What pytest compares."""
    return [[finding.partition, finding.seq, finding.cause, finding.detail] for finding in report.findings]


def filled(client: object, name: str, fill: Callable[[Database], object]) -> Database:
    """A migrated and filled database."""
    database = Database(client, name)  # type: ignore[arg-type]
    migrate.apply(database, [each for each in migrate.load_migrations() if each.name in EVIDENCE])
    database.command(f"USE {name}")
    fill(database)
    return database


def seal_all(database: Database) -> list[Head]:
    """Both partitions, sealed; returns their heads. All batches in one insert for each table: that is quicker."""
    heads: list[Head] = []
    every: dict[str, dict[str, list[object]]] = {}
    for partition in (0, 1):
        for batch in sealed(partition, messages(partition)):
            for table in (*batch.tables, batch.batch_row):
                into = every.setdefault(table.name, {column: [] for column in table.columns})
                for column, values in table.columns.items():
                    into[column] += values
        heads.append(Head(partition, batch.header.seq, batch.header.link))
    for name, columns in every.items():
        database.insert(Table(name, columns), "the trail")
    return heads


def first_version(client: object, name: str) -> Database:
    """A database as the first version left it, then migrated and gone on with."""
    database = Database(client, name)  # type: ignore[arg-type]
    every = migrate.load_migrations()
    migrate.apply(database, [each for each in every if each.version <= UNSEALED_UNTIL])
    database.command(f"USE {name}")
    link, seq = seal.GENESIS, 1
    for batch in unsealed(0, messages(0)[:6]):
        for table in (*batch.tables, batch.batch_row):
            known = {key: value for key, value in table.columns.items() if key not in {"batch_seq", "batch_row"}}
            database.insert(Table(table.name, known), batch.token(table.name))
        link, seq = batch.header.link, batch.header.seq + 1
    migrate.apply(database, every)
    database = Database(client, name)  # type: ignore[arg-type]
    for batch in sealed(0, messages(0)[6:], seq=seq, link=link):
        trail.store(database, batch)
    return database


def main(directory: Path) -> None:
    """Print {attack: findings} as JSON, and what was counted in the runs that are not attacks."""
    client = clickhouse_connect.get_client(interface="chdb", path=str(directory / "engine"))
    results: dict[str, object] = {}
    for nth, (name, attack) in enumerate(ATTACKS.items()):
        database = filled(client, f"attack_{nth}", seal_all)
        attack(database)
        report = verify(database, now=NOW, slice_rows=15)
        results[name] = {"findings": findings(report), "rows": report.rows, "batches": report.batches}
    results |= against_checkpoints(client) | of_old(client) | upgraded(client)
    sys.stdout.write(json.dumps(results))


def against_checkpoints(client: object) -> dict[str, object]:
    """The tail cut, and everything rewritten: seen only with a checkpoint."""
    results = {}
    for name, attack in {"kept": run(), "cut": ATTACKS["the tail cut"], "rewritten": rewrite}.items():
        heads: list[Head] = []
        database = filled(client, f"checked_{name}", lambda it, heads=heads: heads.extend(seal_all(it)))
        attack(database)
        checkpoint = make_checkpoint("spendfuse/test", NOW, heads)
        without = verify(database, now=NOW)
        report = verify(database, now=NOW, checkpoints=[checkpoint])
        results[f"checkpoint, {name}"] = {
            "findings": findings(report),
            "without": findings(without),
            "heads": report.heads,
        }
    return results


def of_old(client: object) -> dict[str, object]:
    """Rows that retention took, and a row added to what is left."""
    database = filled(client, "expired", seal_all)
    gone = run(f"ALTER TABLE usage_events DELETE WHERE {IN_2}", f"ALTER TABLE ledger_events DELETE WHERE {IN_3}")
    gone(database)
    early, late = verify(database, now=NOW), verify(database, now=LATER)
    dropped = verify(database, now=NOW, dropped_before=datetime(2025, 4, 1, tzinfo=UTC))
    run(copy("usage_events", "cost_nanos AS cost_nanos", "ledger_partition = 0 AND usage_id = 'call-0-1'"))(database)
    return {
        "expired": {
            "early": findings(early), "late": findings(late), "late_expired": late.expired,
            "dropped": findings(dropped), "dropped_expired": dropped.expired,
            "added": findings(verify(database, now=LATER)),
        }
    }  # fmt: skip


def upgraded(client: object) -> dict[str, object]:
    """The first version's data, sealed from some batch on; then attacked."""
    database = first_version(client, "upgraded")
    before = verify(database, now=NOW)
    sums = database.query("SELECT uniqExact(usage_id), count(), sum(cost_nanos) FROM usage_events")[0]
    run(copy("usage_events", "'new' AS usage_id", "usage_id = 'call-0-1'"))(database)
    added = verify(database, now=NOW)
    run("ALTER TABLE usage_events DELETE WHERE usage_id IN ('call-0-1', 'new')")(database)
    gone = verify(database, now=NOW)
    run(update("audit_batches", f"content_sha256 = '{'e' * 64}'", "leaf_version = 0"))(database)
    return {
        "upgraded": {
            "before": findings(before), "unsealed_batches": before.unsealed_batches,
            "unsealed_rows": before.unsealed_rows, "rows": before.rows, "sums": [int(value) for value in sums],
            "added": findings(added), "gone": findings(gone), "unlinked": findings(verify(database, now=NOW)),
        }
    }  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
