"""How far the trail is behind its ledger: what the audit's group has committed against where the ledger ends.

Read without joining the group: looking disturbs nobody, and works while the audit process is dead.
"""

import asyncio
from typing import Final, NamedTuple

from aiokafka import TopicPartition

from spendfuse.client.connection import Consumer, close, consumer_options
from spendfuse.settings import BrokerSettings
from spendfuse.wire.topics import LEDGER

GROUP: Final = "spendfuse-audit"
"""The consumer group of the writer."""
CLIENT_ID: Final = "spendfuse-audit-lag"
READ_TIMEOUT_S: Final = 20.0
POLL_MS: Final = 200
STOP_S: Final = 2.0
MS_PER_S: Final = 1_000


class LedgerLag(NamedTuple):
    """Ledger messages that are not in ClickHouse yet, and when the first was written (ms since 1970; None: no such).

    `begun`: the group has committed something once. Where no audit was ever run, nobody is behind.
    """

    messages: int
    oldest_ms: int | None
    begun: bool = True

    def age_s(self, now_ms: int) -> int:
        """Return for how many seconds the oldest of them has waited at an instant of the wall's clock."""
        return 0 if self.oldest_ms is None else max(now_ms - self.oldest_ms, 0) // MS_PER_S


async def ledger_lag(broker: BrokerSettings, *, ledger: str = LEDGER.name, group: str = GROUP) -> LedgerLag:
    """Return how far the writer of a ledger is behind, over all partitions.

    Raises TimeoutError after READ_TIMEOUT_S, and whatever aiokafka raises.
    """
    async with asyncio.timeout(READ_TIMEOUT_S):
        # One asks for the group's offsets, is no member and never assigns: aiokafka's coordination ends with an error
        # when an assignment is replaced while it looks for its coordinator. The other reads, of no group.
        asking = Consumer(**consumer_options(broker, CLIENT_ID), group_id=group)
        consumer = Consumer(**consumer_options(broker, CLIENT_ID))
        try:
            await asking.start()
            await consumer.start()
            parts = [TopicPartition(ledger, part) for part in await _partitions(consumer, ledger)]
            if not parts:
                return LedgerLag(0, None)
            consumer.assign(parts)
            begins = await consumer.beginning_offsets(parts)
            ends = await consumer.end_offsets(parts)
            committed = {part: await asking.committed(part) for part in parts}
            at = {part: max(offset or 0, begins[part]) for part, offset in committed.items()}
            behind = {part: ends[part] - at[part] for part in parts if at[part] < ends[part]}
            stamps = [await _timestamp(consumer, part, at[part]) for part in behind]
        finally:
            await close(asking, STOP_S)
            await close(consumer, STOP_S)
    oldest_ms = min((each for each in stamps if each is not None), default=None)
    return LedgerLag(sum(behind.values()), oldest_ms, any(offset is not None for offset in committed.values()))


async def _partitions(consumer: Consumer, topic: str) -> list[int]:
    await consumer.topics()  # without a subscription nothing else brings the metadata
    return sorted(consumer.partitions_for_topic(topic) or ())


async def _timestamp(consumer: Consumer, part: TopicPartition, offset: int) -> int | None:
    """Return when the message at an offset, or the next one there is, was written."""
    consumer.assign([part])
    consumer.seek(part, offset)
    records = await consumer.getmany(part, timeout_ms=POLL_MS, max_records=1)
    return next((int(record.timestamp) for record in records.get(part, ())), None)
