"""What an operator may do to the trail: drop old months and remake rollups, say so, and nothing else."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from audit_samples import START, charge, message, totals

pytest.importorskip("chdb", reason="the embedded ClickHouse needs the chdb package")
pytest.importorskip("clickhouse_connect")

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from clickhouse_connect.driver.exceptions import DatabaseError

from spendfuse.audit import migrate, operator, rebuild, retention, roles, trail
from spendfuse.audit.batches import Collector, Message
from spendfuse.audit.database import Engine, open_embedded
from spendfuse.audit.reports import Period, read_chargeback
from spendfuse.audit.rows import Place, entry_row, tables
from spendfuse.audit.verify import verify
from spendfuse.cli import operator_entry
from spendfuse.cli.app import app
from spendfuse.client.keys import Signer, Verifier, generate
from spendfuse.wire.ledger import LedgerBatch
from spendfuse.wire.topics import LEDGER

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from spendfuse.audit.batches import Batch
    from spendfuse.audit.database import Database
    from spendfuse.embedded.tansu import EmbeddedBroker
    from spendfuse.wire.ledger import LedgerEntry

ENTRIES = [charge(nth, ts=START + timedelta(minutes=nth * 31)) for nth in range(400)]
"""March and April of 2025, whose month ends in the middle of a batch."""
PRIVATE, PUBLIC = generate("test")
SIGNER, VERIFIER = Signer.parse(PRIVATE), Verifier.parse(PUBLIC)
FAR = datetime(2027, 6, 1, tzinfo=UTC)
"""Long after the rows came in, which is now."""
TABLES = ("spend_1m", "spend_1h", "spend_1d")


def batches(entries: Sequence[LedgerEntry]) -> list[Batch]:
    collector = Collector("spendfuse.ledger.v1", 0, 1, 1, {}, 90)
    sealed = []
    for offset in range(0, len(entries), 30):
        each = Message(offset, 1_700_000_000_000, message(entries[offset : offset + 30]))
        if not collector.add(each):
            sealed.append(collector.seal())
            collector.add(each)
    return [*sealed, collector.seal()]


BATCHES = batches(ENTRIES)


@contextmanager
def opened(directory: Path, rights: Any = "writer") -> Iterator[Database]:
    database = open_embedded(Engine(directory, "trail", rights))
    try:
        yield database
    finally:
        database.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    where = tmp_path / "clickhouse"
    with opened(where) as database:
        migrate.apply(database)
        for batch in BATCHES:
            trail.store(database, batch)
    return where


def sums(database: Database, table: str) -> dict[tuple[str, str], tuple[int, ...]]:
    calls, only = ("count()", "WHERE kind = 'charge' ") if table == "usage_events" else ("sum(calls)", "")
    names = ("input", "cache_read", "cache_write_5m", "cache_write_1h", "output", "reasoning")
    columns = ", ".join(f"sum({name}_tokens)" for name in names)
    rows = database.query(
        f"SELECT team, agent, {calls}, {columns}, sum(cost_nanos) FROM {{db:Identifier}}.{table} {only}"  # noqa: S608
        "GROUP BY team, agent"
    )
    return {(row[0], row[1]): tuple(int(value) for value in row[2:]) for row in rows}


def test_a_rebuild_makes_damaged_rollups_exact_and_a_batch_inserted_again_after_it_counts_once(directory: Path) -> None:
    with opened(directory) as database:  # a row too many in one, as after a hand's insert
        database.command("INSERT INTO trail.spend_1d SELECT * FROM trail.spend_1d LIMIT 3")
        database.command(
            "INSERT INTO trail.spend_1m (bucket, team, calls, cost_nanos) VALUES ('2025-04-02', 'x', 1, 5)"
        )
    with opened(directory, "operator") as database:
        assert {each.table for each in rebuild.compare(database)} == {"spend_1d", "spend_1m"}
        months: list[tuple[str, str]] = []
        wrong = rebuild.rebuild(database, lambda table, month: months.append((table, month)))
        assert {each.table for each in wrong} == {"spend_1d", "spend_1m"}
        assert months == [(table, month) for table in TABLES for month in ("202503", "202504")]
        assert rebuild.compare(database) == []
        assert rebuild.rebuild(database) == []
        assert database.query("SELECT count() FROM system.tables WHERE endsWith(name, '_rebuild')") == [(0,)]
    with opened(directory) as database:
        for table in TABLES:
            assert sums(database, table) == totals(ENTRIES)
        trail.store(database, BATCHES[-1])  # as every restart of the audit process does
        for table in ("usage_events", *TABLES):
            assert sums(database, table) == totals(ENTRIES)
        collector = Collector("spendfuse.ledger.v1", 0, 2, 100, {}, 90)
        assert collector.add(Message(1_000, 0, message([charge(900)])))
        trail.store(database, collector.seal())
        for table in ("usage_events", *TABLES):
            assert sums(database, table) == totals([*ENTRIES, charge(900)])


def test_a_rebuild_waits_until_the_last_batch_is_whole(directory: Path) -> None:
    more = batches([*ENTRIES, *(charge(nth) for nth in range(500, 600))])[-1]
    with opened(directory) as database:
        for table in more.tables:
            database.insert(table, more.token(table.name))
    with opened(directory, "operator") as database, pytest.raises(rebuild.RebuildError, match="not whole yet"):
        rebuild.rebuild(database)


def test_old_months_go_with_a_signed_entry_and_their_sums_and_headers_stay(directory: Path) -> None:
    with opened(directory, "operator") as database:
        assert [month.expired for month in retention.plan(database, 184, datetime.now(UTC))] == [False, False]
        months = retention.plan(database, 184, FAR)
        assert [(month.name, month.expired) for month in months] == [("202503", True), ("202504", True)]
        march = months[:1]
        inside = [entry for entry in ENTRIES if entry.usage and entry.usage.ts.month == 3]
        assert march[0].rows == len(inside)
        assert march[0].cost_nanos == {"USD": sum(entry.charge.cost_nanos for entry in inside if entry.charge)}
        said = retention.about(database, march, 184)
        assert said["dropped_before"] == "2025-04-01T00:00:00.000000Z"
        assert said["months"][0]["ledger"] == [
            {"partition": 0, "rows": len(inside), "first_offset": 0, "last_offset": (len(inside) - 1) // 30 * 30}
        ]
        entry = operator.message("retention", said, by="ada", reason="yearly", at=FAR, signer=SIGNER)
        retention.apply(database, march, 184, FAR)
        assert database.query("SELECT count(), min(toMonth(occurred_at)) FROM trail.usage_events") == [
            (len(ENTRIES) - len(inside), 4)
        ]
        assert rebuild.rebuild(database) == []
        with pytest.raises(retention.RetentionError, match="has changed"):
            retention.apply(database, march, 184, FAR)
    with opened(directory) as database:
        for table in TABLES:
            assert sums(database, table) == totals(ENTRIES), "sums outlive their rows, a rebuild too"
        assert database.query("SELECT sum(rows) FROM trail.audit_batches") == [(len(ENTRIES),)]
        assert retention.dropped_before(database, VERIFIER).year == 1970
        collector = Collector("spendfuse.ledger.v1", 1, 1, 1, {}, 90)
        forged = operator.message("retention", {**said, "dropped_before": "2099-01-01T00:00:00Z"}, by="eve", reason="x",
                                  at=FAR + timedelta(seconds=1), signer=Signer.parse(generate("test")[0]))  # fmt: skip
        assert collector.add(Message(0, 0, entry))
        assert collector.add(Message(1, 0, forged))
        trail.store(database, collector.seal())
        assert retention.dropped_before(database, VERIFIER) == datetime(2025, 4, 1, tzinfo=UTC)
        assert retention.dropped_before(database, None) == datetime(2099, 1, 1, tzinfo=UTC)


def test_a_month_is_kept_while_one_before_it_is_or_while_rows_of_it_came_lately(directory: Path) -> None:
    with opened(directory, "operator") as database:
        newest = min(month.newest_at for month in retention.plan(database, 184, FAR))
        for now, expired in (
            (newest + timedelta(days=184), [False, False]),  # not more than 184 days ago
            (newest + timedelta(days=184, minutes=5), [True, True]),
        ):
            assert [month.expired for month in retention.plan(database, 184, now)] == expired
        with pytest.raises(retention.RetentionError, match="floor of 184"):
            retention.plan(database, 183, FAR)
        with pytest.raises(retention.RetentionError, match="have expired"):
            retention.about(database, retention.plan(database, 184, newest), 184)


FORBIDDEN = (
    "DROP TABLE trail.usage_events",
    "TRUNCATE TABLE trail.usage_events",
    "ALTER TABLE trail.usage_events UPDATE cost_nanos = 0 WHERE 1",
    "INSERT INTO trail.usage_events (usage_id) VALUES ('x')",
    "INSERT INTO trail.audit_batches (seq) VALUES (99)",
    "ALTER TABLE trail.audit_batches DELETE WHERE 1",
    "ALTER TABLE trail.ledger_events DELETE WHERE 1",
    "ALTER TABLE trail.commands DROP PARTITION ID 'all'",
    "ALTER TABLE trail.acks DELETE WHERE 1",
    "DROP TABLE trail.spend_1d",
    "TRUNCATE TABLE trail.spend_1d",
    "CREATE TABLE trail.elsewhere (a Int8) ENGINE = MergeTree ORDER BY a",
    "DROP DATABASE trail",
    "SELECT * FROM file('/etc/hostname', LineAsString)",
    "INSERT INTO FUNCTION file('/dev/null', 'CSV', 'a Int8') SELECT 1",
    "SELECT * FROM url('http://127.0.0.1:9/', 'CSV', 'a String')",
    "GRANT ALL ON *.* TO default",
)


def test_an_operator_has_no_other_right(directory: Path) -> None:
    with opened(directory, "operator") as database:
        for statement in FORBIDDEN:
            with pytest.raises(DatabaseError, match=r"Not enough privileges|no writeable access storage"):
                database.command(statement)
        assert database.query("SELECT count() FROM trail.usage_events") == [(len(ENTRIES),)]


PARSER = """
import json, sys, chdb
handle = chdb.connect(":memory:")
for statement in json.load(sys.stdin):
    try:
        handle.query("EXPLAIN AST " + statement, "TSVRaw")
        print("ok")
    except Exception as error:
        print(str(error).replace(chr(10), " ")[:300])
"""


def test_the_roles_are_sql_that_clickhouse_s_parser_takes(tmp_path: Path) -> None:
    said = [statement for role in roles.ROLES for statement in roles.statements(role, "trail")]
    assert sum(statement.startswith("CREATE ROLE") for statement in said) == len(roles.ROLES) == 5
    done = subprocess.run(
        [sys.executable, "-c", PARSER], input=json.dumps([*said, "GRANT NONSENSE ON trail.* TO x"]),
        capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path,
    )  # fmt: skip
    *answers, nonsense = done.stdout.splitlines()
    assert nonsense != "ok"
    assert answers == ["ok"] * len(said), list(zip(said, answers, strict=True))
    assert not any("$" in statement for statement in said)


def test_no_role_may_shrink_the_headers_or_reach_outside() -> None:
    for role in roles.ROLES:
        for grant in roles.grants(role, "trail"):
            rights, _, what = grant.removeprefix("GRANT ").partition(" ON ")
            words = {right.strip() for right in rights.split(",")}
            assert not words & {
                "ALL",
                "TRUNCATE",
                "ALTER UPDATE",
                "ALTER",
                "DROP",
                "DROP DATABASE",
                "FILE",
                "URL",
                "S3",
            }
            if words & {"ALTER DELETE", "DROP TABLE"}:
                assert role == "operator"
                assert what.startswith(("trail.usage_events", "trail.spend_"))
            assert what.startswith("trail.") or (what.startswith("system.") and words <= {"SHOW", "SELECT"})


def test_an_entry_says_who_why_and_what_and_a_changed_one_says_nothing() -> None:
    raw = operator.message("forget", {"kid": "2026"}, by="ada", reason="asked", at=FAR, signer=SIGNER)
    (entry,) = LedgerBatch.model_validate_json(raw).entries
    assert (entry.kind, entry.topic, entry.offset) == ("operator", "operator", 1_811_808_000_000)
    data = json.dumps(entry.data)
    assert operator.read(data, VERIFIER) == {
        "action": "forget", "at": "2027-06-01T00:00:00.000000Z", "by": "ada", "reason": "asked", "kid": "2026",
    }  # fmt: skip
    assert operator.read(data.replace("asked", "nudged"), VERIFIER) is None
    for broken in ("", "[]", "{}", '{"statement":1,"signature":2}', '{"statement":"[]","signature":""}'):
        assert operator.read(broken, None) is None


def test_what_was_dropped_with_an_entry_is_expired_and_what_was_dropped_without_one_is_not(directory: Path) -> None:
    with opened(directory, "operator") as database:
        march = retention.plan(database, 184, FAR)[:1]
        entry = operator.message("retention", retention.about(database, march, 184), by="ada", reason="yearly", at=FAR,
                                 signer=SIGNER)  # fmt: skip
        retention.apply(database, march, 184, FAR)
    now = datetime(2024, 1, 1, tzinfo=UTC)  # the ledger took them 50 days before
    with opened(directory) as database:
        database.command("USE trail")
        unsaid = verify(database, now=now, dropped_before=retention.dropped_before(database, VERIFIER))
        assert {finding.cause for finding in unsaid.findings} <= {"deleted", "truncated"}
        assert unsaid.findings
        collector = Collector("spendfuse.ledger.v1", 1, 1, 1, {}, 90)
        assert collector.add(Message(0, 1_700_000_000_000, entry))
        trail.store(database, collector.seal())
        said = verify(database, now=now, dropped_before=retention.dropped_before(database, VERIFIER))
        assert (said.findings, said.expired) == ([], len(unsaid.findings))


def test_rows_from_before_the_projection_are_charged_back_like_any_other(tmp_path: Path) -> None:
    entries = [
        charge(nth, ts=START + timedelta(minutes=nth), tags={"cost_center": f"cc-{nth % 3}"} if nth % 4 else {})
        for nth in range(60)
    ]
    every = migrate.load_migrations()
    with opened(tmp_path / "clickhouse") as database:
        migrate.apply(database, [each for each in every if each.version <= 7])
        for table in tables(entry_row(entry, Place("t", 0, nth, 0)) for nth, entry in enumerate(entries[:40])):
            database.insert(table, "the first version's")
        assert migrate.apply(database)[-1].name == every[-1].name
        for table in tables(entry_row(entry, Place("t", 0, nth, 0)) for nth, entry in enumerate(entries[40:], 40)):
            database.insert(table, "this version's")
        client = database._client
        client.database = "trail"
        charged = read_chargeback(client, Period.month("2025-03"), "acme").report.rows
        expected: dict[tuple[str, str], int] = {}
        for entry in entries:
            assert entry.usage is not None
            assert entry.charge is not None
            key = (entry.usage.team, entry.usage.tags.get("cost_center", ""))
            expected[key] = expected.get(key, 0) + entry.charge.cost_nanos
        assert {(row["team"], row["cost_center"]): row["cost_nanos"] for row in charged} == expected


@pytest.fixture
def home(tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The command line's surroundings: the trail, a key to sign with, and a ledger that is a list."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "signing.key").write_text(PRIVATE)
    monkeypatch.setenv("SPENDFUSE_CHDB_DIR", str(directory))
    monkeypatch.setenv("SPENDFUSE_DATABASE", "trail")
    monkeypatch.setenv("SPENDFUSE_SIGNING_KEY_FILE", str(tmp_path / "signing.key"))
    return tmp_path


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["audit", *words])


def test_retention_and_rebuild_on_the_command_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run("retention", "--json")
    assert [(row["month"], row["state"]) for row in json.loads(shown.stdout)] == [
        ("202503", "kept"),
        ("202504", "kept"),
    ]
    monkeypatch.setenv("SPENDFUSE_RETENTION_DAYS", "183")
    refused = run("retention")
    assert (refused.exit_code, "SPENDFUSE_RETENTION_DAYS" in refused.stderr) == (64, True)
    monkeypatch.delenv("SPENDFUSE_RETENTION_DAYS")
    unsaid = run("retention", "--apply")
    assert (unsaid.exit_code, "--by" in unsaid.stderr) == (2, True)
    assert run("rebuild", "--check").exit_code == 0
    unsaid = run("rebuild")
    assert (unsaid.exit_code, "--by" in unsaid.stderr) == (2, True)
    recorded: list[tuple[str, Any]] = []
    monkeypatch.setattr(
        operator_entry, "record", lambda _where, action, about, *_rest: recorded.append((action, about))
    )
    done = run("rebuild", "--by", "ada", "--reason", "a disk was restored")
    assert "every rollup is the sum of its rows" in done.stdout
    assert recorded == [("rebuild rollups", {"tables": list(TABLES), "differing": 0, "differ": []})]


def test_a_subject_key_is_made_once_and_forgetting_destroys_it_after_the_ledger_knows(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spendfuse.client.subject import Subjects

    assert run("subject-key", "--out", "subject.key", "--kid", "2026").exit_code == 0
    assert run("subject-key", "--out", "subject.key", "--kid", "2026").exit_code == 64
    path = home / "subject.key"
    assert path.stat().st_mode & 0o777 == 0o600
    secret = path.read_text().strip().partition("=")[2]
    assert len(base64.b64decode(secret)) == 32
    monkeypatch.setenv("SPENDFUSE_SUBJECT_KEY_FILE", str(path))
    assert Subjects.from_env().kid == "2026"
    recorded: list[tuple[str, Any, bool]] = []
    monkeypatch.setattr(
        operator_entry, "record", lambda _where, action, about, *_rest: recorded.append((action, about, path.exists()))
    )
    done = run("forget", "subject.key", "--by", "ada", "--reason", "asked to")
    assert done.exit_code == 0, done.stderr
    assert recorded == [("forget", {"kid": "2026"}, True)]
    assert not path.exists()
    assert secret not in done.stdout + done.stderr
    (home / "other").write_text("no key\n")
    assert run("forget", "other", "--by", "ada", "--reason", "x").exit_code == 64
    assert (home / "other").exists()


@pytest.mark.broker
async def test_what_an_operator_does_is_on_the_ledger_signed_before_it_is_done(
    tansu: EmbeddedBroker, home: Path
) -> None:
    servers = tansu.bootstrap_servers
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        if LEDGER.name not in await admin.list_topics():
            await admin.create_topics([NewTopic(LEDGER.name, 1, 1)])
    finally:
        await admin.close()
    consumer = AIOKafkaConsumer(bootstrap_servers=servers)
    await consumer.start()
    try:
        parts = [TopicPartition(LEDGER.name, each) for each in await partitions(consumer)]
        consumer.assign(parts)
        for part, end in (await consumer.end_offsets(parts)).items():
            consumer.seek(part, end)
        assert run("subject-key", "--out", "subject.key", "--kid", "2026").exit_code == 0
        words = ("forget", "subject.key", "--by", "ada", "--reason", "asked to", "-b", servers)
        away = await asyncio.to_thread(run, *words[:-1], "127.0.0.1:1")
        assert (away.exit_code, (home / "subject.key").exists()) == (69, True)
        done = await asyncio.to_thread(run, *words)
        assert (done.exit_code, (home / "subject.key").exists()) == (0, False), done.stderr
        async with asyncio.timeout(30):
            record = await consumer.getone()
    finally:
        await consumer.stop()
    (entry,) = LedgerBatch.model_validate_json(record.value).entries
    said = operator.read(json.dumps(entry.data), VERIFIER)
    assert said is not None
    assert (said["action"], said["kid"], said["by"], said["reason"]) == ("forget", "2026", "ada", "asked to")


async def partitions(consumer: AIOKafkaConsumer) -> list[int]:
    """The ledger's partitions, once the broker has said which there are."""
    async with asyncio.timeout(30):
        while not (found := consumer.partitions_for_topic(LEDGER.name)):
            await consumer.topics()
    return sorted(found)
