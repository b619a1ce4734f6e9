"""A ledger topic, writers of it, and what a reader of the database sees: for the audit's tests against a broker."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from typing import TYPE_CHECKING, Any

from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from audit_samples import COUNTERS, charge, message
from spendfuse.audit.writer import LedgerWriter
from spendfuse.client.connection import admin_options, producer_options

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from spendfuse.audit.database import Database
    from spendfuse.settings import BrokerSettings
    from spendfuse.wire.ledger import LedgerEntry

DEADLINE_S = 60.0


async def create(broker: BrokerSettings, ledger: str, *single: str) -> None:
    admin = AIOKafkaAdminClient(**admin_options(broker, "test"))
    await admin.start()
    try:
        await admin.create_topics([NewTopic(ledger, 2, 1), *(NewTopic(name, 1, 1) for name in single)])
    finally:
        await admin.close()


async def send(broker: BrokerSettings, ledger: str, values: Sequence[tuple[int, bytes]]) -> None:
    async with AIOKafkaProducer(**producer_options(broker, "test")) as producer:
        for partition, value in values:
            await producer.send_and_wait(ledger, value, partition=partition)


def replayed(entries: int, seed: int) -> tuple[list[LedgerEntry], list[tuple[int, bytes]]]:
    """What a meter that is killed now and then writes to two partitions: its entries in order, some of them again."""
    dice = random.Random(seed)  # noqa: S311 - the same dice in every run
    everything = [charge(nth) for nth in range(entries)]
    values: list[tuple[int, bytes]] = []
    for partition in (0, 1):
        mine = [entry for entry in everything if entry.offset % 2 == partition]
        at = 0
        while at < len(mine):
            length = dice.randint(1, 40)
            values.append((partition, message(mine[at : at + length])))
            at += length
            if dice.random() < 0.2:
                at = max(at - dice.randint(0, 60), 0)
    return everything, values


def base_and_rollups(database: Database) -> list[dict[tuple[str, str], tuple[int, ...]]]:
    found = []
    columns = ", ".join(f"sum({name}_tokens)" for name in COUNTERS)
    for table, calls in (("usage_events", "count()"), ("spend_1m", "sum(calls)"), ("spend_1d", "sum(calls)")):
        rows = database.query(
            f"SELECT team, agent, {calls}, {columns}, sum(cost_nanos) "  # noqa: S608 - names of this test's own
            f"FROM {{db:Identifier}}.{table} GROUP BY team, agent"
        )
        found.append({(row[0], row[1]): tuple(int(value) for value in row[2:]) for row in rows})
    return found


async def until(condition: Any, what: str) -> None:
    give_up_at = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < give_up_at, f"not {what} after {DEADLINE_S:g} s"
        await asyncio.sleep(0.05)


def rows(database: Database, table: str = "usage_events") -> int:
    return int(database.query(f"SELECT count() FROM {{db:Identifier}}.{table}")[0][0])  # noqa: S608


class Topics:
    """The topics and the group of one test on the shared broker."""

    def __init__(self, broker: BrokerSettings, name: str) -> None:
        self.broker = broker
        self.ledger, self.batches, self.group = f"{name}.ledger", f"{name}.batches", f"{name}.group"

    def writer(self, database: Database, **given: Any) -> LedgerWriter:
        names = {"ledger": self.ledger, "batches": self.batches, "group": self.group}
        return LedgerWriter(self.broker, database, **{"rows_max": 50, "wait_ms": 50, **names, **given})

    async def send(self, values: Sequence[tuple[int, bytes]]) -> None:
        await send(self.broker, self.ledger, values)


@contextlib.asynccontextmanager
async def running(writer: LedgerWriter) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(writer.run())
    try:
        yield task
    finally:
        writer.stop()
        await asyncio.wait({task}, timeout=DEADLINE_S)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    if not task.cancelled():
        task.result()
