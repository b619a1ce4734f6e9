"""The cures for Faust's defects: each has a test that fails when the cure is taken out."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import aiokafka
import faust
import pytest
from faust.tables.recovery import Recovery
from faust.transport.producer import ProducerBuffer

from faults import recovery
from pipeline import scenario
from pipeline.samples import BOOK
from pipeline.test_stages import RECORDS, SOON_S, SlowPorts, Worker
from spendfuse.client.connection import producer_options
from spendfuse.embedded.tansu import BrokerUnavailableError, EmbeddedBroker
from spendfuse.pipeline import faust_cures
from spendfuse.settings import BrokerSettings
from spendfuse.wire import Packed, PackedUsage, encode
from spendfuse.wire.topics import PACKED
from workers import WorkerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BEFORE, WHILE_DOWN = 300, 1_500
DEADLINE_S = 60.0
QUIET_S = 4.0
AGENTS = 8
FLUSH_S = 1.0
"""Longer than two of Faust's flushes, one after the other, wait for a broker that takes nothing (0.1 s each)."""


@pytest.fixture
def uncured() -> Iterator[None]:
    yield
    faust_cures.uninstall()


class Recovering:
    """A worker that is killed, misses messages of `usage.packed.v1`, and comes back."""

    def __init__(self, broker: BrokerSettings, directory: Path, **more: str) -> None:
        self.deployed = scenario.Deployment(broker, directory)
        book = directory / "book.json"
        book.write_bytes(encode(BOOK))
        settings = {
            "SPENDFUSE_PRICE_BOOK_FILE": str(book),
            "SPENDFUSE_UNSIGNED_COMMANDS": "true",
            "SPENDFUSE_PARTITIONS": "1",
        }
        self.worker = WorkerProcess(directory, "worker", broker, settings | more, module="faults.slow_worker")
        self.sent = 0

    async def produce(self, count: int) -> None:
        """Write what an intake would: one usage a message, of one origin partition."""
        producer = aiokafka.AIOKafkaProducer(**producer_options(self.deployed.broker, "faults"))
        await producer.start()
        deliveries = []
        for number in range(self.sent, self.sent + count):
            usage = scenario.usage("acme", f"a{number % AGENTS}", number)
            packed = Packed(usages=[PackedUsage(p=0, o=number, u=usage)])
            deliveries.append(await producer.send(PACKED.name, encode(packed), partition=0))
        await asyncio.gather(*deliveries)
        await producer.stop()
        self.sent += count

    async def charged_after_recovery(self) -> int:
        """Return how many usages are in the stored sums when the worker has done all that it will do."""
        async with scenario.watching(self.deployed, *scenario.CHANGELOGS) as watch:
            await self.produce(BEFORE)
            await watch.until(lambda: calls(watch) == BEFORE, "the first usages' sums")
            await asyncio.to_thread(self.worker.kill)
            await self.produce(WHILE_DOWN)
            await asyncio.to_thread(self.worker.begin)
            await asyncio.to_thread(self.worker.until_ready)
            seen, changed_at, give_up_at = 0, time.monotonic(), time.monotonic() + DEADLINE_S
            while calls(watch) < self.sent and time.monotonic() < give_up_at:
                if len(watch.records[scenario.CHANGELOGS[0]]) != seen:
                    seen, changed_at = len(watch.records[scenario.CHANGELOGS[0]]), time.monotonic()
                elif time.monotonic() - changed_at > QUIET_S:
                    break  # it is not late: it has forgotten
                await asyncio.sleep(0.05)
            return calls(watch)


def calls(watch: scenario.Watch) -> int:
    return sum(sums[2] for scope, sums in watch.stored("acme").items() if scope.startswith("agent:"))


async def lost_in_a_recovery(directory: Path) -> int:
    """Return how many usages a recovery loses, on a broker of its own."""
    try:
        broker = EmbeddedBroker(directory).start()
    except BrokerUnavailableError as error:
        pytest.skip(str(error))
    with broker:
        settings = BrokerSettings.from_env(
            {},
            bootstrap_servers=broker.bootstrap_servers,
            fetch_max_wait_ms=20,
            producer_max_batch_size=1,
            session_timeout_ms=2_000,
            rebalance_timeout_ms=2_000,
            heartbeat_interval_ms=400,
        )
        recovering = Recovering(settings, directory)
        with recovering.worker:
            return (BEFORE + WHILE_DOWN) - await recovering.charged_after_recovery()


@pytest.mark.broker
async def test_a_worker_that_was_killed_and_comes_back_to_a_backlog_loses_nothing(tmp_path: Path) -> None:
    assert await lost_in_a_recovery(tmp_path) == 0


@pytest.mark.parametrize("cured", [True, False], ids=["cured", "as Faust is"])
async def test_what_is_queued_while_a_recovery_ends_arrives_and_vanishes_without_the_cure(
    uncured: None, *, cured: bool
) -> None:
    faust_cures.uninstall()
    if cured:
        faust_cures.install(20)
    arrived, committed = await recovery.after_a_recovery(SOON_S)
    vanished = 0 if cured else recovery.QUEUED
    assert arrived == list(range(recovery.COMMITTED + vanished, recovery.END))
    assert committed == recovery.END, "what vanished is committed with the rest: no replay brings it back"


class FaustPorts(SlowPorts):
    """Ports whose records go out by Faust's own buffer; `as_barrier` takes its `flush` for their delivery."""

    def __init__(self, *, as_barrier: bool) -> None:
        super().__init__()
        self.as_barrier = as_barrier
        self.open = asyncio.Event()
        self.on_broker: list[Any] = []
        self.buffer = ProducerBuffer()
        self.buffer.app = SimpleNamespace(conf=SimpleNamespace(producer_threaded=False))
        self.buffer._send_pending = self.send  # type: ignore[method-assign]

    async def send(self, delivery: Any) -> None:
        await self.open.wait()
        self.on_broker.append(delivery)
        delivery.set_result(None)

    def delivery(self) -> asyncio.Future[None]:
        delivery: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.delivered.append(delivery)
        self.buffer.put(delivery)  # type: ignore[arg-type]  # it only hands it on
        return asyncio.ensure_future(self.buffer.flush()) if self.as_barrier else delivery


@pytest.mark.parametrize("cured", [True, False], ids=["cured", "as Faust is"])
async def test_a_broker_that_has_nothing_yet_delays_the_acknowledgement_and_fausts_flush_would_not(
    *, cured: bool
) -> None:
    ports = FaustPorts(as_barrier=not cured)
    worker = Worker(ports)
    async with ports.buffer:
        await worker.meter.on_record(worker.record(RECORDS[0]))
        flushing = asyncio.ensure_future(worker.meter.flush())
        await asyncio.wait({flushing}, timeout=FLUSH_S)
        assert ports.on_broker == []
        assert worker.acked == ([] if cured else [0]), "acknowledged, and a kill now would lose it"
        ports.open.set()
        async with asyncio.timeout(SOON_S):
            await flushing
            await asyncio.gather(*ports.delivered)
    assert worker.acked == [0]
    assert len(ports.on_broker) == len(ports.puts) + len(ports.writes)


@pytest.mark.parametrize("cured", [True, False], ids=["cured", "as Faust is"])
async def test_the_timer_commits_nothing_while_the_group_rebalances_and_would_without_the_cure(
    uncured: None, *, cured: bool
) -> None:
    faust_cures.uninstall()
    if cured:
        faust_cures.install(20)
    app = faust.App("commit", store="memory://", web_enabled=False, broker_commit_interval=1)
    consumer = recovery.MemoryConsumer(app, None)
    commits: list[bool] = []

    async def force_commit(_topics: Any, *, start_new_transaction: bool) -> bool:
        commits.append(start_new_transaction)
        return True

    consumer.force_commit = force_commit  # type: ignore[method-assign,assignment]
    app.rebalancing = True
    await consumer.commit()
    assert commits == ([] if cured else [True])
    await consumer.commit_and_end_transactions()  # Faust's last, before it gives up its partitions
    app.rebalancing = False
    await consumer.commit()
    assert commits[-2:] == [False, True]


def test_another_version_of_faust_is_refused_with_what_to_do(uncured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Recovery.on_recovery_completed
    monkeypatch.setattr(faust_cures, "RECOVERY_SHA256", "0" * 64)
    with pytest.raises(
        faust_cures.CureMismatchError, match=r"differs from faust-streaming 0\.15\.3: install that version"
    ):
        faust_cures.install(20)
    assert Recovery.on_recovery_completed is original


def test_the_installed_faust_is_the_one_the_cures_were_proved_on() -> None:
    assert faust_cures.recovery_sha256() == faust_cures.RECOVERY_SHA256


async def test_only_fausts_own_fetch_wait_is_shortened_and_all_its_consumers_read_anything(
    uncured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []
    monkeypatch.setattr(
        faust_cures,
        "_original_consumer_init",
        lambda _self, *_topics, **options: waits.append(options["fetch_max_wait_ms"]),
    )
    faust_cures.install(20)
    faust_cures.install(30)
    for wait_ms in (1_500, 500):
        consumer = SimpleNamespace(_client=SimpleNamespace(send=None))
        aiokafka.AIOKafkaConsumer.__init__(consumer, fetch_max_wait_ms=wait_ms)
        assert consumer._client.send.reads_anything
    assert waits == [30, 500]
