"""How far the trail is behind its ledger: what the audit's group has committed against where the ledger ends.

Read without joining the group: looking disturbs nobody, and works while the audit process is dead.
"""

import asyncio
from typing import Final, NamedTuple

from aiokafka import TopicPartition

from spendfuse.client.connection import Consumer, consumer_options
from spendfuse.settings import BrokerSettings
from spendfuse.wire.topics import LEDGER

GROUP: Final = "spendfuse-audit"
"""The consumer group of the writer."""
CLIENT_ID: Final = "spendfuse-audit-lag"
READ_TIMEOUT_S: Final = 20.0
POLL_MS: Final = 200


class LedgerLag(NamedTuple):
    """Ledger messages that are not in ClickHouse yet, and when the first was written (ms since 1970; None: no such)."""

    messages: int
    oldest_ms: int | None


async def ledger_lag(broker: BrokerSettings, *, ledger: str = LEDGER.name, group: str = GROUP) -> LedgerLag:
    """Return how far the writer of a ledger is behind, over all partitions.

    Raises TimeoutError after READ_TIMEOUT_S, and whatever aiokafka raises.
    """
    async with asyncio.timeout(READ_TIMEOUT_S):
        # With a group and partitions of its own choice it may ask for the group's offsets, and is no member.
        consumer = Consumer(**consumer_options(broker, CLIENT_ID), group_id=group)
        try:
            await consumer.start()
            parts = [TopicPartition(ledger, part) for part in await _partitions(consumer, ledger)]
            if not parts:
                return LedgerLag(0, None)
            consumer.assign(parts)
            begins = await consumer.beginning_offsets(parts)
            ends = await consumer.end_offsets(parts)
            at = {part: max(await consumer.committed(part) or 0, begins[part]) for part in parts}
            behind = {part: ends[part] - at[part] for part in parts if at[part] < ends[part]}
            stamps = [await _timestamp(consumer, part, at[part]) for part in behind]
        finally:
            await consumer.stop()
    return LedgerLag(sum(behind.values()), min((each for each in stamps if each is not None), default=None))


async def _partitions(consumer: Consumer, topic: str) -> list[int]:
    await consumer.topics()  # without a subscription nothing else brings the metadata
    return sorted(consumer.partitions_for_topic(topic) or ())


async def _timestamp(consumer: Consumer, part: TopicPartition, offset: int) -> int | None:
    """Return when the message at an offset, or the next one there is, was written."""
    consumer.assign([part])
    consumer.seek(part, offset)
    records = await consumer.getmany(part, timeout_ms=POLL_MS, max_records=1)
    return next((int(record.timestamp) for record in records.get(part, ())), None)
