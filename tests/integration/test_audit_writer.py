"""The audit process against a broker: every ledger entry in ClickHouse once, whatever is killed, broken or away."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from audit_samples import charge, command_entry, halt, message, totals
from audit_writers import (
    DEADLINE_S,
    Topics,
    base_and_rollups,
    create,
    replayed,
    rows,
    running,
    send,
    until,
)
from workers import quick_settings

pytest.importorskip("chdb", reason="the embedded ClickHouse needs the chdb package")
pytest.importorskip("clickhouse_connect")

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from spendfuse.audit import headers, migrate, queries, trail
from spendfuse.audit.address import AuditNotRunningError, read_address
from spendfuse.audit.batches import BatchHeader, Collector, Message
from spendfuse.audit.checkpoints import Head, NoteSigner, make_checkpoint, open_note, own_key
from spendfuse.audit.database import Database, Engine, open_embedded
from spendfuse.audit.trail import TrailError
from spendfuse.audit.verify import verify
from spendfuse.client.connection import consumer_options, producer_options
from spendfuse.embedded.processes import ChildProcess
from spendfuse.embedded.tansu import EmbeddedBroker
from spendfuse.settings import AuditSettings, BrokerSettings
from spendfuse.wire.base import encode
from spendfuse.wire.topics import BATCHES, CHECKPOINTS, LEDGER

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from kraft import KraftBroker
    from spendfuse.audit.rows import Table

pytestmark = pytest.mark.broker

KILLS = 3


def in_batches(database: Database) -> int:
    """Rows of batches that are whole: their headers come last."""
    return int(database.query("SELECT sum(rows) FROM {db:Identifier}.audit_batches")[0][0])


class Flaky(Database):
    """A database that fails its next inserts: before, or after, they were carried out."""

    failures = 0
    after = False
    table = ""

    def insert(self, table: Table, token: str) -> None:
        fail = self.failures > 0 and table.name == (self.table or table.name)
        if fail and not self.after:
            self.failures -= 1
            raise ConnectionError("ClickHouse is away")
        super().insert(table, token)
        if fail:
            self.failures -= 1
            raise TimeoutError("the answer was lost")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Flaky]:
    opened = open_embedded(Engine(tmp_path / "clickhouse", "trail"))
    opened.__class__ = Flaky
    try:
        migrate.apply(opened)
        yield opened  # type: ignore[misc]
    finally:
        opened.close()


@pytest.fixture
async def topics(tansu: EmbeddedBroker, request: pytest.FixtureRequest) -> Topics:
    found = Topics(quick_settings(tansu), f"audit-{abs(hash(request.node.name))}")
    await create(found.broker, found.ledger, found.batches)
    return found


async def test_a_ledger_with_replays_is_written_once_and_exactly(topics: Topics, database: Flaky) -> None:
    everything, values = replayed(400, seed=1)
    await topics.send(values)
    async with running(topics.writer(database)):
        await until(lambda: rows(database) >= 400, "written")
    assert base_and_rollups(database) == [totals(everything)] * 3
    ranges = database.query(
        "SELECT ledger_partition, groupArray((seq, first_offset, last_offset)) FROM "
        "(SELECT * FROM {db:Identifier}.audit_batches ORDER BY seq) GROUP BY ledger_partition"
    )
    assert len(ranges) == 2
    for _, found in ranges:
        assert [seq for seq, _, _ in found] == list(range(1, len(found) + 1))
        assert all(found[nth][2] + 1 == found[nth + 1][1] for nth in range(len(found) - 1))


async def test_messages_nobody_can_read_are_kept_and_stop_nothing(topics: Topics, database: Flaky) -> None:
    poison = [b"", b"\xff\x00", b"{}", b'{"entries": []}', b"[" * 5_000, message([charge(1)])[:-9]]
    await topics.send([(0, value) for value in poison])
    await topics.send([(0, message([charge(2)]))])
    async with running(topics.writer(database)):
        await until(lambda: rows(database) == 1, "past the poison")
    kept = database.query("SELECT kind, src_topic, src_offset FROM {db:Identifier}.ledger_events ORDER BY src_offset")
    assert kept == [("unreadable", topics.ledger, offset) for offset in range(len(poison))]


@pytest.mark.parametrize("after", [False, True], ids=["lost on the way", "its answer lost"])
@pytest.mark.parametrize("table", ["usage_events", "commands", "audit_batches"])
async def test_inserts_that_fail_are_repeated_until_they_are_in_and_once(
    topics: Topics, database: Flaky, table: str, after: bool
) -> None:
    database.failures, database.after, database.table = 3, after, table
    entries = [charge(nth) for nth in range(40)]
    await topics.send([(0, message([*entries, command_entry(halt(1), 0)]))])
    async with running(topics.writer(database)):
        await until(lambda: not database.failures and rows(database, "audit_batches") == 1, "written")
    assert base_and_rollups(database) == [totals(entries)] * 3
    assert rows(database, "commands") == 1


@pytest.mark.parametrize("table", ["usage_events", "commands", "audit_batches"])
async def test_a_writer_that_died_between_two_inserts_is_completed_by_the_next(
    topics: Topics, database: Flaky, table: str
) -> None:
    database.failures, database.table = 10_000, table  # it never gets any further
    entries = [charge(nth) for nth in range(60)]
    await topics.send([(0, message([*entries[:30], command_entry(halt(1), 0)]))])
    async with running(topics.writer(database)):
        await until(lambda: database.failures < 10_000, "stuck between two inserts")
    assert rows(database, "audit_batches") == 0
    database.failures = 0
    await topics.send([(0, message(entries[20:]))])
    async with running(topics.writer(database)):
        await until(lambda: rows(database) == 60, "completed")
    assert base_and_rollups(database) == [totals(entries)] * 3
    assert rows(database, "commands") == 1
    assert trail.last_seq(database, 0) == rows(database, "audit_batches")


async def test_a_second_writer_takes_over_half_and_all_of_it_without_a_gap_or_a_repeat(
    topics: Topics, database: Flaky
) -> None:
    await take_turns(topics, database)


@pytest.mark.kafka
async def test_writers_take_turns_on_a_real_kafka_as_well(kraft: KraftBroker, database: Flaky) -> None:
    topics = Topics(BrokerSettings(bootstrap_servers=kraft.bootstrap_servers), "audit-turns")
    await create(topics.broker, topics.ledger, topics.batches)
    await take_turns(topics, database)


async def take_turns(topics: Topics, database: Flaky) -> None:
    """One writer, two of them, and one again, while the ledger grows."""
    everything, values = replayed(600, seed=2)
    third = len(values) // 3
    first, second = topics.writer(database), topics.writer(database)
    async with running(first):
        await topics.send(values[:third])
        await until(lambda: rows(database) > 0, "written by the first")
        async with running(second):
            await until(lambda: len(first._lanes) == len(second._lanes) == 1, "shared")
            await topics.send(values[third : 2 * third])
            await topics.send(values[2 * third :])
            await until(lambda: rows(database) >= 400, "written by both")
        await until(lambda: rows(database) >= 600, "written")
    assert base_and_rollups(database) == [totals(everything)] * 3


async def test_a_new_database_is_filled_from_the_whole_ledger(topics: Topics, tmp_path: Path) -> None:
    everything, values = replayed(200, seed=3)
    for name in ("first", "second"):
        database = open_embedded(Engine(tmp_path / name, "trail"))
        try:
            migrate.apply(database)
            await topics.send(values if name == "first" else [])
            async with running(topics.writer(database)):
                await until(lambda opened=database: rows(opened) >= 200, "written")
            assert base_and_rollups(database) == [totals(everything)] * 3
        finally:
            database.close()


async def test_a_ledger_that_was_created_anew_under_its_headers_is_refused(topics: Topics, database: Flaky) -> None:
    await topics.send([(0, message([charge(nth)])) for nth in range(5)])
    async with running(topics.writer(database)):
        await until(lambda: rows(database) == 5, "written")
    anew = f"{topics.ledger}-anew"
    await create(topics.broker, anew, f"{anew}-batches")
    await send(topics.broker, anew, [(0, message([charge(nth)])) for nth in range(100, 120)])
    with pytest.raises(TrailError, match="created anew"):
        await asyncio.wait_for(topics.writer(database, ledger=anew, group=f"{anew}-group").run(), DEADLINE_S)
    assert rows(database) == 5


async def read_all(broker: BrokerSettings, topic: str) -> list[bytes]:
    async with AIOKafkaConsumer(topic, **consumer_options(broker, "test")) as consumer:
        ends = await consumer.end_offsets(consumer.assignment())
        found: list[bytes] = []
        while any([await consumer.position(part) < end for part, end in ends.items()]):
            for records in (await consumer.getmany(timeout_ms=200)).values():
                found += [record.value for record in records]
    return found


async def test_a_trail_is_intact_and_its_signed_checkpoints_are_on_their_topic(
    topics: Topics, database: Flaky, tmp_path: Path
) -> None:
    _, values = replayed(300, seed=5)
    signer = NoteSigner.parse(own_key(tmp_path))
    topic = f"{topics.ledger}-checkpoints"
    await create(topics.broker, f"{topics.ledger}-other", topic)

    def note(heads: Sequence[Head]) -> str:
        return signer.sign(make_checkpoint("spendfuse/test", datetime.now(UTC), heads))

    for part in (values[: len(values) // 2], values[len(values) // 2 :]):  # the second by a writer that took over
        await topics.send(part)
        before = rows(database, "audit_batches")
        async with running(topics.writer(database, checkpoint=note, checkpoint_s=0.2, checkpoints=topic)):
            await until(lambda before=before: rows(database, "audit_batches") > before + 1, "written")
    async with running(topics.writer(database)):
        await until(lambda: in_batches(database) == 300, "written")
    checkpoints = [open_note(each.decode(), signer.public) for each in await read_all(topics.broker, topic)]
    assert len(checkpoints) >= 2
    assert {head.partition for head in checkpoints[-1].heads} == {0, 1}
    database.command("USE trail")
    report = verify(database, now=datetime.now(UTC), checkpoints=checkpoints)
    assert (report.findings, report.rows, report.unsealed_rows) == ([], 300, 0)


async def test_a_header_of_the_first_version_is_completed_as_it_was_begun_and_the_chain_goes_on_from_it(
    topics: Topics, database: Flaky
) -> None:
    """The first version was killed after its header and before its rows; the upgrade takes over."""
    values = [message([charge(nth)]) for nth in range(6)]
    await topics.send([(0, value) for value in values])
    old = [Message(offset, 0, value) for offset, value in enumerate(values)][:3]
    collector = Collector(topics.ledger, 0, 1, 1, {}, 50)
    assert all(collector.add(each) for each in old)
    header = BatchHeader.model_validate(collector.seal().header.model_dump() | {"v": 1, "seal": None})
    assert b"seal" not in encode(header), "as the first version wrote it"
    async with AIOKafkaProducer(**producer_options(topics.broker, "test")) as producer:
        await headers.append(producer, topics.batches, header)
    async with running(topics.writer(database)):
        await until(lambda: in_batches(database) == 6, "written")
    database.command("USE trail")
    report = verify(database, now=datetime.now(UTC))
    assert (report.findings, report.unsealed_rows, report.rows) == ([], 3, 3)
    (link,) = database.query("SELECT toString(prev_hash) FROM trail.audit_batches WHERE seq = 2")
    assert link == (header.content_sha256,)


async def test_a_new_broker_begins_its_ledger_anew_and_the_chain_goes_on(topics: Topics, database: Flaky) -> None:
    """The embedded broker forgets everything when it stops; offsets begin at 0 again, batches do not."""
    for name in ("first", "second"):
        each = Topics(topics.broker, f"{topics.ledger}-{name}")
        await create(each.broker, each.ledger, each.batches)
        before = in_batches(database)
        await each.send([(0, message([charge(nth, partition=5 if name == "first" else 6)])) for nth in range(9)])
        async with running(each.writer(database)):
            await until(lambda before=before: in_batches(database) == before + 9, "written")
    database.command("USE trail")
    report = verify(database, now=datetime.now(UTC))
    assert (report.findings, report.rows) == ([], 18)


def audit_process(directory: Path, broker: BrokerSettings, name: str) -> ChildProcess:
    """`python -m spendfuse.audit`, as an operator starts it."""
    given = {key: str(value) for key, value in broker.model_dump().items() if key != "sasl_password" and value != ""}
    audit = {"chdb_dir": directory / "clickhouse", "http_port": 0, "batch_rows_max": 60, "batch_wait_ms": 20}
    env = {f"SPENDFUSE_{key.upper()}": str(value) for key, value in {**given, **audit}.items()}
    return ChildProcess(
        name,
        [sys.executable, "-m", "spendfuse.audit"],
        log_path=directory / f"{name}.log",
        env={
            **env,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "SPENDFUSE_READY_FILE": str(directory / "ready"),
            "PATH": os.defpath,
        },
    )


def count(directory: Path) -> int:
    """The charges a reader sees over HTTP; -1 while no audit process answers."""
    try:
        with queries.connect(AuditSettings(chdb_dir=str(directory / "clickhouse"))) as client:
            return int(client.command("SELECT count() FROM usage_events"))
    except AuditNotRunningError:
        return -1


def verdict(directory: Path) -> dict[str, Any]:
    """What `spendfuse audit verify` says: through the process that has the trail, or of a directory at rest."""
    done = subprocess.run(
        [sys.executable, "-m", "spendfuse", "audit", "verify", "--json"],
        capture_output=True, text=True, timeout=DEADLINE_S, check=False, cwd=directory,
        env={
            "PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.defpath,
            "SPENDFUSE_CHDB_DIR": str(directory / "clickhouse"),
        },
    )  # fmt: skip
    assert done.returncode in {0, 1}, done.stderr
    return dict(json.loads(done.stdout))


async def test_killed_at_any_moment_the_audit_process_ends_up_with_exact_sums(tmp_path: Path) -> None:
    dice = random.Random(7)  # noqa: S311 - the same dice in every run
    everything, values = replayed(3_000, seed=4)
    with EmbeddedBroker(tmp_path / "broker") as broker:
        settings = quick_settings(broker)
        await create(settings, LEDGER.name, BATCHES.name, CHECKPOINTS.name)
        sending = asyncio.create_task(send(settings, LEDGER.name, values))
        for kill in range(KILLS):
            with audit_process(tmp_path, settings, f"killed-{kill}") as process:
                ready = tmp_path / "ready"
                await asyncio.to_thread(process.wait_until, ready.exists, DEADLINE_S)
                await asyncio.sleep(dice.uniform(0.0, 0.6))  # not a wait for anything: the moment of the kill
                os.kill(process.pid, signal.SIGKILL)
                await until(lambda running=process: not running.alive, "killed")
                ready.unlink()
        await sending
        with audit_process(tmp_path, settings, "last") as process:
            await until(lambda: count(tmp_path) >= 3_000, "written")
            alive = await asyncio.to_thread(verdict, tmp_path)
            os.kill(process.pid, signal.SIGTERM)
            await until(lambda: not process.alive, "stopped")
            assert process.returncode == 0, (tmp_path / "last.log").read_text()
    assert not (tmp_path / "ready").exists()
    with pytest.raises(AuditNotRunningError):
        read_address(tmp_path / "clickhouse")
    for line in (tmp_path / "last.log").read_text().splitlines():
        assert json.loads(line)["level"] in ("info", "warning"), line
    stopped = verdict(tmp_path)
    for report in (alive, stopped):
        assert (report["intact"], report["findings"], report["unsealed_rows"]) == (True, [], 0)
    assert stopped["rows"] == 3_000
    assert stopped["heads"] >= 2, "the last checkpoint has both partitions"
    database = open_embedded(Engine(tmp_path / "clickhouse", "spendfuse"))
    try:
        assert base_and_rollups(database) == [totals(everything)] * 3
    finally:
        database.close()
