"""`spendfuse state rebuild` against real processes: changelogs are lost, then Kafka as a whole, and no cent is."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient

from chaos import oracle
from chaos.stage import TOPICS, _read
from kraft import KraftBroker, kraft_missing
from pipeline import scenario
from pipeline.samples import BOOK, budget, cap
from spendfuse.client.connection import admin_options, producer_options
from spendfuse.embedded.processes import ChildProcess
from spendfuse.pipeline.refusal import EXIT_REFUSED
from spendfuse.pipeline.topics import ensure_topics
from spendfuse.settings import PREFIX, BrokerSettings
from spendfuse.wire import encode
from spendfuse.wire.topics import BUDGETS, USAGE
from workers import ROOT, WorkerProcess, broker_env

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(420)]
SPACE = "lost"
PARTITIONS = 4
CALLS = 400
DEADLINE_S = 90.0
LIMITS = [
    budget(f"agent:{SPACE}/*/*", cap(150, unit="tokens", window="month"), name="agents"),
    budget(f"team:{SPACE}/*", cap(1_200, unit="tokens", window="month", warn=[5_000]), name="teams"),
    budget(f"workspace:{SPACE}", cap(2_500, unit="tokens", window="month"), name="space"),
]


def settings(kafka: KraftBroker) -> BrokerSettings:
    return BrokerSettings.from_env(
        {},
        bootstrap_servers=kafka.bootstrap_servers,
        session_timeout_ms=6_000,
        rebalance_timeout_ms=6_000,
        heartbeat_interval_ms=1_000,
    )


class Deployed:
    """A Kafka, a worker, an audit, and what was sent."""

    def __init__(self, directory: Path, kafka: KraftBroker) -> None:
        self.directory = directory
        self.sent: list[tuple[int, bytes]] = []
        (directory / "book.json").write_bytes(encode(BOOK))
        self.env = {
            f"{PREFIX}PRICE_BOOK_FILE": str(directory / "book.json"),
            f"{PREFIX}SIGNING_KEY": scenario.PRIVATE,
            f"{PREFIX}PARTITIONS": str(PARTITIONS),
            f"{PREFIX}CHDB_DIR": str(directory / "chdb"),
            f"{PREFIX}HTTP_PORT": "0",
            f"{PREFIX}BATCH_WAIT_MS": "200",
        }
        self.use(kafka)

    def use(self, kafka: KraftBroker) -> None:
        """Go on with a Kafka; the worker and the audit are of that one."""
        self.kafka, self.broker = kafka, settings(kafka)
        self.worker = WorkerProcess(self.directory, "worker", self.broker, self.env)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(PREFIX)}
        env = {**inherited, **broker_env(self.broker), **self.env, "PYTHONPATH": str(ROOT / "streams")}
        argv = [sys.executable, "-m", "spendfuse.audit"]
        self.audit = ChildProcess("audit", argv, log_path=self.directory / "audit.log", env=env)
        asyncio.run(ensure_topics(self.broker, partitions=PARTITIONS, replication=1))

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(PREFIX)}
        env = {**inherited, **broker_env(self.broker), **self.env, "PYTHONPATH": str(ROOT / "streams")}
        return subprocess.run(
            [sys.executable, "-c", "from spendfuse.cli import main; main()", "state", "rebuild", *arguments],
            env=env, cwd=self.directory, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    def send(self, records: Iterable[tuple[int, bytes]], topic: str = USAGE.name) -> None:
        asyncio.run(self._send(list(records), topic))

    async def _send(self, records: list[tuple[int, bytes]], topic: str) -> None:
        producer = AIOKafkaProducer(**producer_options(self.broker, "test-rebuild"))
        await producer.start()
        try:
            keys = [json.loads(value)["id"].encode() if topic == BUDGETS.name else None for _, value in records]
            sends = [
                await producer.send(topic, value, key=key, partition=number)
                for key, (number, value) in zip(keys, records, strict=True)
            ]
            await asyncio.gather(*sends)
        finally:
            await producer.stop()

    def apply_limits(self) -> None:
        self.send(((0, encode(each)) for each in LIMITS), BUDGETS.name)

    def emit(self, numbers: Iterable[int]) -> None:
        usages = [scenario.usage(SPACE, f"a{number % 7}", number) for number in numbers]
        records = [(nth % PARTITIONS, encode(usage)) for nth, usage in enumerate(usages)]
        self.sent += records
        self.send(records)

    def read(self) -> oracle.Topics:
        return asyncio.run(self._read())

    async def _read(self) -> oracle.Topics:
        from aiokafka import AIOKafkaConsumer

        from spendfuse.client.connection import consumer_options

        consumer = AIOKafkaConsumer(**consumer_options(self.broker, "test-oracle"))
        await consumer.start()
        try:
            return oracle.Topics(**{name: await _read(consumer, topic) for name, topic in TOPICS.items()})
        finally:
            await consumer.stop()

    def settled(self) -> oracle.Verdict:
        """Wait until nothing differs from what the raw usage topic says; return the last comparison."""
        give_up_at = time.monotonic() + DEADLINE_S
        while True:
            verdict = oracle.judge(self.read(), (self.directory / "book.json").read_bytes())
            if not verdict.differences or time.monotonic() > give_up_at:
                return verdict
            time.sleep(0.5)

    def delete(self, *topics: str) -> None:
        async def work() -> None:
            admin = AIOKafkaAdminClient(**admin_options(self.broker, "test-rebuild"))
            await admin.start()
            await admin.delete_topics(list(topics))
            for _ in range(200):
                if not set(topics) & set(await admin.list_topics()):
                    break
                await asyncio.sleep(0.1)
            await admin.close()

        asyncio.run(work())

    def stop(self) -> None:
        self.worker.kill()
        self.audit.kill()


@pytest.fixture
def deployed(tmp_path: Path) -> Iterator[Deployed]:
    reason = kraft_missing()
    if reason is not None:
        pytest.skip(reason)
    with KraftBroker() as kafka:
        made = Deployed(tmp_path, kafka)
        try:
            made.apply_limits()
            made.worker.begin()
            made.worker.until_ready()
            yield made
        finally:
            made.stop()


def sequences(commands: list[oracle.Record]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for _, _, key, value in commands:
        found.setdefault((key or b"").decode(), []).append(json.loads(value or b"")["seq"])
    return found


def refused(worker: WorkerProcess) -> str:
    worker.begin()
    assert worker.wait(DEADLINE_S) == EXIT_REFUSED, worker.log_tail()
    return worker.log


@pytest.mark.parametrize("lost", [("scopes",), ("scopes", "ids", "shared")], ids=["sums", "every table"])
def test_lost_changelogs_are_rebuilt_from_the_ledger_and_nothing_is_lost_or_twice(
    deployed: Deployed, lost: tuple[str, ...]
) -> None:
    deployed.emit(range(CALLS))
    assert deployed.settled().differences == []
    said = deployed.cli()
    assert said.returncode == 1
    assert "a worker of spendfuse is alive" in said.stderr
    deployed.emit(range(CALLS, CALLS + 60))
    deployed.worker.kill()  # in the middle of those
    commands = deployed.read().commands
    deployed.delete(*(f"spendfuse-{name}-changelog" for name in lost))
    assert "spendfuse state rebuild" in refused(deployed.worker)

    planned = deployed.cli("--plan", "--json")
    assert planned.returncode == 0, planned.stderr
    assert refused(deployed.worker), "a plan writes nothing"
    for _ in range(2):  # and once more, over itself
        written = deployed.cli("--json")
        assert written.returncode == 0, written.stderr
        assert json.loads(written.stdout)["charges"] >= CALLS
    for name in ("scopes", "shared"):
        assert json.loads(written.stdout)["records"][name] == json.loads(planned.stdout)["records"][name]
    deployed.worker.begin()
    deployed.worker.until_ready()
    deployed.send(((number + 1) % PARTITIONS, value) for number, value in deployed.sent[:100])  # a spool, sent again
    deployed.emit(range(CALLS + 60, CALLS + 200))
    verdict = deployed.settled()
    assert verdict.differences == []
    assert verdict.truth.calls == CALLS + 200
    assert verdict.truth.duplicates == 100
    assert verdict.halts > 2
    before, after = sequences(commands), sequences(deployed.read().commands)
    assert before, "something was halted before the loss"
    for key, known in before.items():
        assert after[key][: len(known)] == known
        assert after[key] == sorted(set(after[key])), "no command again under a sequence that is not greater"
    assert all(len(after[key]) == len(known) for key, known in before.items() if "agents" in key), "still halted"


def test_a_rebuild_that_was_killed_in_the_middle_lets_no_worker_start_until_it_is_run_again(
    deployed: Deployed,
) -> None:
    deployed.emit(range(CALLS))
    assert deployed.settled().differences == []
    assert deployed.worker.stop(20.0) == 0
    deployed.delete("spendfuse-scopes-changelog")
    half = (
        "import os, sys\n"
        "from spendfuse.pipeline import rebuild_write\n"
        "rows = rebuild_write.rows_of\n"
        "def few(prepared):\n"
        "    for nth, row in enumerate(rows(prepared)):\n"
        "        if nth == 3: os.kill(os.getpid(), 9)\n"
        "        yield row\n"
        "rebuild_write.rows_of = few\n"
        "from spendfuse.cli.app import app\n"
        "app(['state', 'rebuild'])\n"
    )
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(PREFIX)}
    env = {**inherited, **broker_env(deployed.broker), **deployed.env, "PYTHONPATH": str(ROOT / "streams")}
    killed = subprocess.run([sys.executable, "-c", half], env=env, cwd=deployed.directory, timeout=120, check=False)
    assert killed.returncode == -9
    assert "a rebuild of the state from ledger began at" in refused(deployed.worker)
    assert deployed.cli().returncode == 0
    deployed.worker.begin()
    deployed.worker.until_ready()
    deployed.emit(range(CALLS, CALLS + 50))
    assert deployed.settled().differences == []


def test_a_lost_kafka_goes_on_from_clickhouse_and_an_emitters_spool_is_charged_once(deployed: Deployed) -> None:
    pytest.importorskip("chdb", reason="the embedded ClickHouse needs the chdb package")
    deployed.audit.start()
    deployed.emit(range(CALLS))
    assert deployed.settled().differences == []
    before = deployed.read()
    stored(deployed, [CALLS, len(before.commands)])
    assert deployed.worker.stop(20.0) == 0
    said = deployed.cli("--from", "clickhouse")
    assert said.returncode == 1
    assert "a worker has counted on this Kafka" in said.stderr, "its usage is in the trail, and would count twice"
    deployed.stop()
    deployed.kafka.stop()
    with KraftBroker() as another:
        deployed.use(another)
        deployed.audit.start()
        stored(deployed, [CALLS, len(before.commands)])
        taken = deployed.cli("--from", "clickhouse", "--json")
        assert taken.returncode == 0, taken.stderr
        records = json.loads(taken.stdout)["records"]
        assert records["budgets written back"] == len(LIMITS)
        assert records["commands written back"] == len(sequences(before.commands))
        assert sequences(deployed.read().commands) == {
            key: [max(known)] for key, known in sequences(before.commands).items()
        }
        deployed.worker.begin()
        deployed.worker.until_ready()
        spool = deployed.sent[-150:]
        deployed.send(((number + 2) % PARTITIONS, value) for number, value in spool)
        deployed.emit(range(CALLS, CALLS + 100))
        check_sums_over_both(deployed, before.usage, CALLS + 100)

        deployed.worker.kill()  # and then the new Kafka's changelogs are lost, which the old one's sums were in
        deployed.delete(*(f"spendfuse-{name}-changelog" for name in ("scopes", "ids", "shared")))
        refused(deployed.worker)
        said = deployed.cli()
        assert said.returncode == 1
        assert "--from clickhouse`, which reads both" in said.stderr
        again = deployed.cli("--from", "clickhouse", "--json")
        assert again.returncode == 0, again.stderr
        assert "commands written back" not in json.loads(again.stdout)["records"]
        deployed.worker.begin()
        deployed.worker.until_ready()
        deployed.emit(range(CALLS + 100, CALLS + 150))
        check_sums_over_both(deployed, before.usage, CALLS + 150)


def check_sums_over_both(deployed: Deployed, lost: list[oracle.Record], calls: int) -> None:
    """The tables hold what both raw usage topics say together, each call once."""
    book = (deployed.directory / "book.json").read_bytes()
    give_up_at = time.monotonic() + DEADLINE_S
    while True:
        topics = deployed.read()
        fact = oracle.truth([*lost, *topics.usage], book)
        found = oracle.tables(topics.scopes, shared=False)
        wrong = oracle._compare("scopes", fact.sums, found)
        public = {scope: sums for scope, sums in fact.sums.items() if not scope.startswith("agent:")}
        wrong += oracle._compare("shared", public, oracle.tables(topics.shared, shared=True))
        due = oracle.expected_halts(fact.sums, topics.budgets)
        halted = {
            (key or b"").decode()
            for _, _, key, value in topics.commands
            if json.loads(value or b"")["action"] == "halt"
        }
        wrong += sorted(due ^ halted)
        if not wrong:
            break
        assert time.monotonic() < give_up_at, wrong[:10]
        time.sleep(0.5)
    said = oracle.ledger(topics.ledger)
    assert (fact.duplicates, said.duplicates) == (150, 150)
    assert fact.calls == calls


def stored(deployed: Deployed, rows: list[int]) -> None:
    """Wait until the trail has so many charges and commands."""
    from spendfuse.audit.queries import connect
    from spendfuse.settings import AuditSettings

    give_up_at = time.monotonic() + DEADLINE_S
    last: Any = None
    while time.monotonic() < give_up_at:
        try:
            client = connect(AuditSettings.from_env(deployed.env))
            last = list(
                client.query(
                    "SELECT countIf(kind = 'charge'), (SELECT count() FROM commands) FROM usage_events"
                ).result_rows[0]
            )
            client.close()
            if last == rows:
                return
        except Exception as error:  # noqa: BLE001 - not up yet
            last = error
        time.sleep(0.3)
    raise AssertionError(f"the trail has {last}; {deployed.audit.log_tail()}")
