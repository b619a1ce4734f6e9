"""The stages against ports that are slow, fail, or change hands: nothing is acknowledged before it is durable."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.samples import BOOK, budget, call, cap, driver
from spendfuse.pipeline.codec import decode_scope, decode_shared
from spendfuse.pipeline.feed import PolicyFeed, budget_key
from spendfuse.pipeline.meter import UNACKED_MAX, MeterStage, MeterTables
from spendfuse.pipeline.publish import Publisher
from spendfuse.pipeline.rollup import RollupStage
from spendfuse.pipeline.violations import Halts, Violations
from spendfuse.wire import Budget, encode
from spendfuse.wire.topics import ALERTS, COMMANDS, DEAD_LETTERS, LEDGER, PACKED, ROLLUPS

if TYPE_CHECKING:
    from collections.abc import Callable

    from spendfuse.pipeline.records import SourceRecord

SOON_S = 5.0
"""Longest anything here waits for what must come."""


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not condition():  # noqa: ASYNC110 - the condition belongs to code that signals nobody
            await asyncio.sleep(0)


@dataclass
class SlowPorts:
    """An outbox and tables whose deliveries end when the test says so; `gates` delay the handing over itself."""

    puts: list[tuple[str, bytes]] = field(default_factory=list)
    writes: list[bytes] = field(default_factory=list)
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    delivered: list[asyncio.Future[None]] = field(default_factory=list)
    hold: bool = False

    def __post_init__(self) -> None:
        self.scopes, self.ids, self.shared = (SlowTable(self) for _ in range(3))

    async def put(self, topic: str, *, value: bytes, **_: Any) -> asyncio.Future[None]:
        if topic in self.gates:
            await self.gates[topic].wait()
        self.puts.append((topic, value))
        return self.delivery()

    def delivery(self) -> asyncio.Future[None]:
        delivery: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.delivered.append(delivery)
        if not self.hold:
            delivery.set_result(None)
        return delivery

    def topics(self) -> list[str]:
        return [topic for topic, _ in self.puts]

    def release(self) -> None:
        self.hold = False
        for delivery in self.delivered:
            if not delivery.done():
                delivery.set_result(None)


class SlowTable:
    """A table of `SlowPorts`."""

    def __init__(self, ports: SlowPorts) -> None:
        self.data: dict[bytes, bytes] = {}
        self.ports = ports

    def get(self, key: bytes) -> bytes | None:
        return self.data.get(key)

    def keys(self) -> list[bytes]:
        return list(self.data)

    def write(self, _partition: int, key: bytes, value: bytes) -> asyncio.Future[None]:
        self.data[key] = value
        self.ports.writes.append(key)
        return self.ports.delivery()


@dataclass
class Worker:
    """A meter and a rollup over given ports."""

    ports: SlowPorts
    generation: int = 1
    acked: list[int] = field(default_factory=list)
    budgets: tuple[Budget, ...] = ()

    def __post_init__(self) -> None:
        feed = PolicyFeed(BOOK)
        for each in self.budgets:
            assert feed.budget_record(budget_key(each).encode(), encode(each)) is None
        common: dict[str, Any] = {
            "publisher": Publisher(self.ports, None, 1),
            "feed": feed,
            "clock": lambda: SAMPLE.now_us,
            "generation": lambda: self.generation,
        }
        tables = MeterTables(self.ports.scopes, self.ports.ids)
        self.meter = MeterStage(tables=tables, violations=Violations(Halts(), 60_000_000), **common)
        self.rollup = RollupStage(table=self.ports.shared, **common)

    def record(self, source: SourceRecord) -> SourceRecord:
        return source._replace(ack=lambda: self.acked.append(source.offset))


SAMPLE = driver(partitions=1)
for _ in range(4):
    SAMPLE.emit(call(SAMPLE, "acme/t/a", input=1))
RECORDS = SAMPLE.records(PACKED.name)
SHARES = [record for record in SAMPLE.records(ROLLUPS.name) if record.key == b"team:acme/t"]
TEAM = b"0/team:acme/t"
AGENT = b"0/agent:acme/t/a"
ANY_TOKEN = budget("agent:acme/*/*", cap(1, unit="tokens"))
ANY_TEAM_TOKEN = budget("team:acme/*", cap(1, unit="tokens"))


@pytest.mark.parametrize("stage", ["meter", "rollup"])
async def test_nothing_is_acknowledged_until_the_broker_has_the_state(stage: str) -> None:
    worker = Worker(SlowPorts())
    source = RECORDS[0] if stage == "meter" else SHARES[0]
    await getattr(worker, stage).on_record(worker.record(source))
    worker.ports.hold = True
    flush = asyncio.ensure_future(getattr(worker, stage).flush())
    if stage == "meter":
        await until(lambda: ROLLUPS.name in worker.ports.topics())
        assert worker.ports.writes == [], "the state waits until all it led to is delivered"
        worker.ports.release()
        worker.ports.hold = True
    await until(lambda: worker.ports.writes != [])
    for _ in range(50):
        await asyncio.sleep(0)
    assert worker.acked == []
    assert not flush.done()
    worker.ports.release()
    await flush
    assert worker.acked == [source.offset]


@pytest.mark.parametrize("gated", [LEDGER.name, COMMANDS.name, ALERTS.name])
async def test_a_flush_in_the_middle_of_a_message_does_not_make_half_of_it_durable(gated: str) -> None:
    worker = Worker(SlowPorts(gates={gated: asyncio.Event()}), budgets=(ANY_TOKEN,))
    reading = asyncio.ensure_future(worker.meter.on_record(worker.record(RECORDS[0])))
    flushing = asyncio.ensure_future(worker.meter.flush())
    for _ in range(50):
        await asyncio.sleep(0)
    assert (worker.ports.writes, worker.acked) == ([], []), f"the state would be durable and its {gated} lost"
    worker.ports.gates[gated].set()
    await reading
    await flushing
    await worker.meter.flush()
    assert gated in worker.ports.topics()
    assert worker.acked == [0]
    assert AGENT in worker.ports.writes


async def test_a_flush_in_the_middle_of_a_rollup_does_not_lose_its_command() -> None:
    worker = Worker(SlowPorts(gates={COMMANDS.name: asyncio.Event()}), budgets=(ANY_TEAM_TOKEN,))
    reading = asyncio.ensure_future(worker.rollup.on_record(worker.record(SHARES[0])))
    flushing = asyncio.ensure_future(worker.rollup.flush())
    for _ in range(50):
        await asyncio.sleep(0)
    assert (worker.ports.writes, worker.acked) == ([], [])
    worker.ports.gates[COMMANDS.name].set()
    await reading
    await flushing
    await worker.rollup.flush()
    assert worker.acked == [SHARES[0].offset]
    assert COMMANDS.name in worker.ports.topics()


@pytest.mark.parametrize("stage", ["meter", "rollup"])
async def test_a_delivery_that_fails_is_raised_and_nothing_is_acknowledged(stage: str) -> None:
    worker = Worker(SlowPorts())
    await getattr(worker, stage).on_record(worker.record(RECORDS[0] if stage == "meter" else SHARES[0]))
    worker.ports.hold = True
    flush = asyncio.ensure_future(getattr(worker, stage).flush())
    held = lambda: [delivery for delivery in worker.ports.delivered if not delivery.done()]  # noqa: E731 - said once
    await until(lambda: held() != [])
    held()[0].set_exception(ConnectionError("the broker is gone"))
    with pytest.raises(ConnectionError):
        await flush
    worker.ports.release()
    assert worker.acked == []


async def test_the_meter_stops_reading_when_too_much_is_not_durable() -> None:
    worker = Worker(SlowPorts())
    bad = RECORDS[0]._replace(value=b"{")
    for offset in range(UNACKED_MAX - 1):
        await worker.meter.on_record(worker.record(bad._replace(offset=offset)))
    assert worker.acked == []
    worker.ports.hold = True
    reading = asyncio.ensure_future(worker.meter.on_record(worker.record(bad._replace(offset=UNACKED_MAX))))
    for _ in range(50):
        await asyncio.sleep(0)
    assert not reading.done()
    worker.ports.release()
    await reading
    assert len(worker.acked) == UNACKED_MAX
    assert set(worker.ports.topics()) == {DEAD_LETTERS.name}


async def test_what_another_worker_wrote_meanwhile_is_not_overwritten() -> None:
    ports = SlowPorts()
    first, second = Worker(ports), Worker(ports)

    async def fold(worker: Worker, number: int) -> None:
        await worker.meter.on_record(worker.record(RECORDS[number]))
        await worker.meter.flush()
        await worker.rollup.on_record(worker.record(SHARES[number]))
        await worker.rollup.flush()

    await fold(first, 0)
    await fold(second, 1)
    first.generation = second.generation = 2
    await fold(first, 2)
    assert next(iter(decode_scope(ports.scopes.data[AGENT]).spend.windows.values()))[1] == 3
    assert decode_shared(ports.shared.data[TEAM]).parts[0].as_of == RECORDS[2].offset


@pytest.mark.parametrize("stage", ["meter", "rollup"])
async def test_a_flush_overtaken_by_a_rebalance_writes_and_acknowledges_nothing(stage: str) -> None:
    worker = Worker(SlowPorts(hold=True))
    await getattr(worker, stage).on_record(worker.record(RECORDS[0] if stage == "meter" else SHARES[0]))
    if stage == "rollup":
        worker.rollup._deliveries.append(worker.ports.delivery())
    flush = asyncio.ensure_future(getattr(worker, stage).flush())
    for _ in range(20):
        await asyncio.sleep(0)
    worker.generation = 2
    worker.ports.release()
    await flush
    assert (worker.ports.writes, worker.acked) == ([], [])


async def test_judging_again_ends_when_the_partitions_change_hands() -> None:
    ports = SlowPorts()
    worker = Worker(ports, budgets=(ANY_TOKEN,))
    await worker.meter.on_record(worker.record(RECORDS[0]))
    await worker.meter.flush()
    ports.puts.clear()
    other = Worker(ports, budgets=(budget("agent:acme/*/*", cap(99, unit="tokens"), version=2),))
    judging = other.meter.reconsider({0})
    ports.gates[COMMANDS.name] = asyncio.Event()
    task = asyncio.ensure_future(judging)
    await asyncio.sleep(0)
    other.generation = 2
    ports.gates[COMMANDS.name].set()
    await task
    before = list(ports.writes)
    await other.meter.flush()
    assert ports.writes == before, "what was judged for the partitions lost is not written"


async def test_two_flushes_at_once_write_in_their_order() -> None:
    worker = Worker(SlowPorts())
    await worker.meter.on_record(worker.record(RECORDS[0]))
    worker.ports.hold = True
    first = asyncio.ensure_future(worker.meter.flush())
    await until(lambda: ROLLUPS.name in worker.ports.topics())
    await worker.meter.on_record(worker.record(RECORDS[1]))
    second = asyncio.ensure_future(worker.meter.flush())
    for _ in range(50):
        await asyncio.sleep(0)
    assert worker.ports.writes == []
    worker.ports.release()
    await first
    assert worker.acked == [0]
    await second
    assert worker.acked == [0, 1]
    tokens = next(iter(decode_scope(worker.ports.scopes.data[AGENT]).spend.windows.values()))[1]
    assert tokens == 2
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(first, second)


@pytest.mark.parametrize("stage", ["meter", "rollup"])
async def test_a_record_that_waited_while_its_partition_was_given_to_another_leads_to_nothing(stage: str) -> None:
    worker = Worker(SlowPorts(), budgets=(ANY_TOKEN if stage == "meter" else ANY_TEAM_TOKEN,))
    source = RECORDS[0] if stage == "meter" else SHARES[0]
    async with getattr(worker, stage)._changing:  # as while a command waits for a broker that is away
        taking = asyncio.ensure_future(getattr(worker, stage).on_record(worker.record(source)))
        await asyncio.sleep(0)
        worker.generation += 1
    async with asyncio.timeout(SOON_S):
        await taking
        await getattr(worker, stage).flush()
    assert (worker.ports.puts, worker.ports.writes, worker.acked) == ([], [], [])
    await getattr(worker, stage).on_record(worker.record(source))  # its owner is given it again
    await getattr(worker, stage).flush()
    assert COMMANDS.name in worker.ports.topics()
    assert worker.acked == [source.offset]
