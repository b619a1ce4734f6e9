"""ClickHouse away, full, slow or restarted under the writer, over HTTP: nothing is lost, nothing doubled."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("chdb", reason="the server that stands in for ClickHouse is chDB")
pytest.importorskip("clickhouse_connect")
pytest.importorskip("lz4", reason="clickhouse-connect compresses its inserts with lz4")

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from clickhouse_connect.driver.exceptions import DatabaseError, OperationalError

from audit_samples import charge, command_entry, halt, message, totals
from audit_writers import DEADLINE_S, Topics, base_and_rollups, create, replayed, rows, running, send, until
from clickhouse_faults import CODES, Faults, Step
from spendfuse.adapters.budget_file import parse
from spendfuse.audit import database as databases
from spendfuse.audit import migrate, queries, service
from spendfuse.audit.database import Database, open_server
from spendfuse.audit.lag import LedgerLag, ledger_lag
from spendfuse.audit.verify import verify
from spendfuse.audit.writer import LedgerWriter
from spendfuse.client import Guard, Halted, Meter
from spendfuse.client.connection import consumer_options, producer_options
from spendfuse.embedded.processes import ChildProcess
from spendfuse.embedded.stack import EmbeddedStack
from spendfuse.settings import AuditSettings, BrokerSettings
from spendfuse.wire.base import encode
from spendfuse.wire.topics import BATCHES, LEDGER
from workers import quick_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spendfuse.embedded.tansu import EmbeddedBroker

pytestmark = pytest.mark.broker

SERVER = Path(__file__).parents[1] / "clickhouse_server.py"
ANSWER_S_MAX = 4.0
TABLES = ("usage_events", "commands", "audit_batches")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class ClickHouse:
    """A server that is a process of its own, with a proxy before it that fails when told."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[str] | None = None
        self.port = free_port()
        self.faults = Faults(self.port, free_port())
        self.settings = AuditSettings(clickhouse_url=f"http://audit@127.0.0.1:{self.faults.port}/trail")

    def start(self) -> None:
        """Start, and wait until it listens."""
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER), str(self._directory), "trail", str(self.port)],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "listening\n"

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(DEADLINE_S)
            self._process = None

    def restart(self) -> None:
        """SIGKILL, and start again on the same directory and port."""
        self.kill()
        self.start()

    def open(self) -> Database:
        """A connection to it, past the proxy: for the test's own questions."""
        url = f"http://audit@127.0.0.1:{self.port}/trail"
        return Database(queries.connect(self.settings.model_copy(update={"clickhouse_url": url})), "trail")


@pytest.fixture
def clickhouse(tmp_path: Path) -> Iterator[ClickHouse]:
    found = ClickHouse(tmp_path / "clickhouse")
    found.start()
    found.faults.start()
    try:
        yield found
    finally:
        found.faults.away()
        found.kill()


@pytest.fixture
def database(clickhouse: ClickHouse) -> Iterator[Database]:
    """What the writer writes to: ClickHouse's ordinary HTTP client, through the proxy."""
    with contextlib.closing(open_server(clickhouse.settings)) as opened:
        migrate.apply(opened)
        yield opened


@pytest.fixture
async def topics(tansu: EmbeddedBroker, request: pytest.FixtureRequest) -> Topics:
    found = Topics(quick_settings(tansu), f"outage-{abs(hash(request.node.name))}")
    await create(found.broker, found.ledger, found.batches)
    return found


def check(clickhouse: ClickHouse, entries: list[Any], commands: int) -> None:
    """Each entry once, in the base and in the rollups; and sealed, so that the trail verifies."""
    with contextlib.closing(clickhouse.open()) as reader:
        assert base_and_rollups(reader) == [totals(entries)] * 3
        assert rows(reader, "commands") == commands
        report = verify(reader, now=datetime.now(UTC))
    assert (report.findings, report.in_flight_rows, report.rows) == ([], 0, len(entries) + commands)


@pytest.mark.parametrize(
    "step",
    [*(Step(code=code) for code in CODES), Step("lose request"), Step("lose answer"), Step("slow")],
    ids=[*CODES.values(), "cut before it arrived", "cut after it was in", "slower than the client waits"],
)
async def test_an_insert_that_fails_is_repeated_and_in_once(
    topics: Topics, clickhouse: ClickHouse, database: Database, step: Step
) -> None:
    if step.fault == "slow":
        # Long enough for an answer on a busy machine, and shorter than this server takes.
        database._client.timeout = database._client.timeout.__class__(connect=ANSWER_S_MAX, read=ANSWER_S_MAX)
        clickhouse.faults.slow_s = ANSWER_S_MAX + 1
    times = 2 if step.fault != "slow" else 1
    clickhouse.faults.plan = lambda table, nth: step if nth < (times if table == "usage_events" else 1) else Step()
    entries = [charge(nth) for nth in range(80)]
    await topics.send([(0, message([*entries[:40], command_entry(halt(1), 0)])), (0, message(entries[30:]))])
    async with running(topics.writer(database)):
        with contextlib.closing(clickhouse.open()) as reader:
            await until(lambda: rows(reader) == 80 and batches_whole(reader), "written")
    assert {happened.split()[-1] for happened in clickhouse.faults.happened} == set(TABLES)
    check(clickhouse, entries, 1)


def batches_whole(database: Database) -> bool:
    """Whether every row is of a batch that has its header row, which comes last."""
    ((header_rows,),) = database.query("SELECT sum(rows) FROM {db:Identifier}.audit_batches")
    return int(header_rows) == rows(database) + rows(database, "commands")


@pytest.mark.parametrize("table", TABLES)
async def test_a_server_killed_in_the_middle_of_a_batch_has_it_once_when_it_is_back(
    topics: Topics, clickhouse: ClickHouse, database: Database, table: str
) -> None:
    def at_the_second(of: str, nth: int) -> Step:
        return Step("crash") if of == table and nth == 1 else Step()

    clickhouse.faults.plan = at_the_second
    clickhouse.faults.crash = clickhouse.restart
    entries = [charge(nth) for nth in range(120)]
    values = [
        (0, message([*entries[nth : nth + 40], command_entry(halt(nth + 1), nth)]))
        for nth in range(0, len(entries), 40)
    ]
    await topics.send(values)
    async with running(topics.writer(database, rows_max=41)):
        await until(lambda: f"crash {table}" in clickhouse.faults.happened, "killed")
        await until(lambda: answered(clickhouse, len(entries)), "written")
    check(clickhouse, entries, 3)


def answered(clickhouse: ClickHouse, wanted: int) -> bool:
    """Whether it is up and holds so many rows in whole batches."""
    try:
        with contextlib.closing(clickhouse.open()) as reader:
            return rows(reader) == wanted and batches_whole(reader)
    except Exception:  # noqa: BLE001 - it is being restarted: any fault means not yet
        return False


async def test_while_it_is_away_the_ledger_waits_and_says_how_far_it_is_behind(
    topics: Topics, clickhouse: ClickHouse, database: Database
) -> None:
    everything, values = replayed(1_200, seed=11)
    half = len(values) // 2
    await topics.send(values[:half])
    async with running(topics.writer(database)):
        with contextlib.closing(clickhouse.open()) as reader:
            await until(lambda: rows(reader) > 0, "begun")
        clickhouse.faults.away()
        await topics.send(values[half:])
        said = await lag(topics)
        assert said.messages > 0
        assert said.oldest_ms is not None
        assert abs(time.time() * 1_000 - said.oldest_ms) < DEADLINE_S * 1_000
        clickhouse.faults.start()
        with contextlib.closing(clickhouse.open()) as reader:
            await until(lambda: rows(reader) == len(everything), "caught up")
        caught_up = await until_none(topics)
    assert caught_up == LedgerLag(0, None)
    check(clickhouse, everything, 0)


async def lag(topics: Topics) -> LedgerLag:
    return await ledger_lag(topics.broker, ledger=topics.ledger, group=topics.group)


async def until_none(topics: Topics) -> LedgerLag:
    give_up_at = time.monotonic() + DEADLINE_S
    while (said := await lag(topics)).messages:
        assert time.monotonic() < give_up_at, said
    return said


async def test_a_writer_that_is_stopped_while_it_is_away_loses_nothing(
    topics: Topics, clickhouse: ClickHouse, database: Database
) -> None:
    entries = [charge(nth) for nth in range(90)]
    clickhouse.faults.plan = lambda table, _nth: Step(code=243) if table == "usage_events" else Step()
    await topics.send([(0, message(entries[:50])), (0, message(entries[45:]))])
    async with running(topics.writer(database)):
        await until(lambda: len(clickhouse.faults.happened) >= 2, "refused for want of space")
    with contextlib.closing(clickhouse.open()) as reader:
        assert rows(reader) == rows(reader, "audit_batches") == 0
    clickhouse.faults.plan = lambda _table, _nth: Step()
    async with running(topics.writer(database)):
        with contextlib.closing(clickhouse.open()) as reader:
            await until(lambda: rows(reader) == 90 and batches_whole(reader), "written")
    check(clickhouse, entries, 0)
    assert databases.SEND_RECEIVE_TIMEOUT_S <= 60, "a server that does not answer is given up within a minute"


BUDGET = """version: 1
budgets:
  - id: everybody
    scope: agent:acme/research/*
    caps: [{amount: 1000 tokens, window: day}]
"""


async def test_a_halt_needs_no_clickhouse_and_its_ledger_is_written_when_it_is_back(
    clickhouse: ClickHouse, tmp_path: Path
) -> None:
    with EmbeddedStack(tmp_path / "stack", partitions=2, audit=False) as stack:
        given: dict[str, Any] = {
            name.removeprefix("SPENDFUSE_").lower(): value for name, value in stack.env.items()
        } | {"workspace": "acme", "team": "research", "agent": "planner-7"}
        await create_budget(stack)
        writer = LedgerWriter(stack.broker, opened(clickhouse), rows_max=200, wait_ms=50)
        clickhouse.faults.plan = lambda _table, _nth: Step(code=243)
        async with running(writer):
            halted = await asyncio.to_thread(spend_until_halted, given)
            assert halted.command is not None
            assert halted.command.budget == "everybody"
            await until(lambda: bool(clickhouse.faults.happened), "refused by ClickHouse")
            with contextlib.closing(clickhouse.open()) as reader:
                assert rows(reader) == rows(reader, "commands") == 0
            assert (await ledger_lag(stack.broker)).messages > 0
            clickhouse.faults.plan = lambda _table, _nth: Step()
            with contextlib.closing(clickhouse.open()) as reader:
                await until(lambda: rows(reader, "acks") > 0 and rows(reader) > 0, "written")
                halts = reader.query("SELECT scope FROM {db:Identifier}.commands WHERE action = 'halt'")
    assert halts == [("agent:acme/research/planner-7",)]


def opened(clickhouse: ClickHouse) -> Database:
    found = open_server(clickhouse.settings)
    migrate.apply(found)
    return found


async def create_budget(stack: EmbeddedStack) -> None:
    budgets = parse(BUDGET, name="budgets.yaml").budgets
    async with AIOKafkaProducer(**producer_options(stack.broker, "test")) as producer:
        for budget in budgets:
            await producer.send_and_wait("spendfuse.budgets.v1", encode(budget), key=budget.id.encode())


def spend_until_halted(given: dict[str, Any]) -> Halted:
    """Spend beyond the cap, again and again, until the guard refuses a call."""
    give_up_at = time.monotonic() + DEADLINE_S
    ours = {name: value for name, value in given.items() if name != "public_keys"}
    with Guard.from_env(**given) as guard, Meter.from_env(**ours) as meter:
        while time.monotonic() < give_up_at:
            try:
                guard.check()
            except Halted as error:
                return error
            meter.record(provider="anthropic", model="claude-sonnet-4-6", input=600)
            time.sleep(0.1)
    raise AssertionError(f"no halt within {DEADLINE_S:g} s")


class AuditProcess:
    """`python -m spendfuse.audit` as it is deployed, writing to the server through the proxy."""

    def __init__(self, stack: EmbeddedStack, clickhouse: ClickHouse, directory: Path) -> None:
        self._log = directory / "audit.log"
        self.ready_file = directory / "ready"
        own = {name: value for name, value in os.environ.items() if not name.startswith("SPENDFUSE_")}
        env = {
            **own, **stack.env, "SPENDFUSE_CLICKHOUSE_URL": clickhouse.settings.clickhouse_url,
            "SPENDFUSE_CHECKPOINT_FILE": str(directory / "notes"), "SPENDFUSE_BATCH_WAIT_MS": "50",
            "SPENDFUSE_READY_FILE": str(self.ready_file),
        }  # fmt: skip
        self.process = ChildProcess("audit", [sys.executable, "-m", "spendfuse.audit"], log_path=self._log, env=env)

    def said(self, text: str) -> list[dict[str, Any]]:
        """What it has logged with this in its words."""
        if not self._log.exists():
            return []
        lines = (line for line in self._log.read_text().splitlines() if line.startswith("{"))
        return [found for found in map(json.loads, lines) if text in found["event"]]


def headers_written(stack: EmbeddedStack) -> int:
    """How many batch headers are on Kafka."""

    async def count() -> int:
        async with AIOKafkaConsumer(**consumer_options(stack.broker, "test")) as consumer:
            place = TopicPartition(BATCHES.name, 0)
            return int((await consumer.end_offsets([place]))[place])

    return asyncio.run(count())


def test_an_audit_that_is_started_and_restarted_while_clickhouse_is_away_waits_and_seals_nothing_meanwhile(
    clickhouse: ClickHouse, tmp_path: Path
) -> None:
    clickhouse.faults.away()
    entries = [charge(nth) for nth in range(200)]
    with EmbeddedStack(tmp_path / "stack", partitions=2, audit=False, workers=0) as stack:
        asyncio.run(send(stack.broker, LEDGER.name, [(0, message(entries[:60])), (1, message(entries[120:150]))]))
        audit = AuditProcess(stack, clickhouse, tmp_path)
        with audit.process:  # against a database that does not even exist yet
            audit.process.wait_until(lambda: len(audit.said("waits for ClickHouse")) >= 3, DEADLINE_S)
            assert (audit.process.alive, audit.ready_file.exists(), headers_written(stack)) == (True, False, 0)
            clickhouse.faults.start()
            audit.process.wait_until(lambda: answered(clickhouse, 90), DEADLINE_S)
            clickhouse.faults.away()
            asyncio.run(send(stack.broker, LEDGER.name, [(0, message(entries[50:120]))]))
            audit.process.wait_until(lambda: bool(audit.said("ClickHouse does not take a batch")), DEADLINE_S)
        before = (headers_written(stack), len(audit.said("waits for ClickHouse")))
        with AuditProcess(stack, clickhouse, tmp_path).process as again:  # in the same outage: its last batch is open
            again.wait_until(lambda: len(audit.said("waits for ClickHouse")) >= before[1] + 2, DEADLINE_S)
            assert (again.alive, headers_written(stack)) == (True, before[0])
            asyncio.run(send(stack.broker, LEDGER.name, [(1, message(entries[150:]))]))
            clickhouse.faults.start()
            again.wait_until(lambda: answered(clickhouse, len(entries)), DEADLINE_S)
        waits = audit.said("waits for ClickHouse")
        assert all("SPENDFUSE_CLICKHOUSE_URL" in wait["error"] and wait["retry_s"] <= 30 for wait in waits)
    check(clickhouse, entries, 0)


def test_a_wrong_password_is_not_waited_for(clickhouse: ClickHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_settings: AuditSettings) -> Database:
        raise DatabaseError("Code: 516. DB::Exception: audit: Authentication failed", code=516)

    assert not databases.is_away(DatabaseError("refused", code=516))
    assert databases.is_away(OperationalError("connection refused"))
    monkeypatch.setattr(databases.clickhouse_connect, "get_client", lambda **_given: refuse(clickhouse.settings))
    with pytest.raises(databases.DatabaseUnavailableError) as raised:
        asyncio.run(service.run(clickhouse.settings, BrokerSettings(bootstrap_servers="127.0.0.1:1")))
    assert not isinstance(raised.value, databases.DatabaseAwayError)
