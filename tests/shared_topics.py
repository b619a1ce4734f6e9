"""Topics of the product on the brokers that tests share: made alike by whichever comes first; and usage read back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import TopicAlreadyExistsError

from spendfuse.wire import decode_usages
from spendfuse.wire.topics import USAGE

if TYPE_CHECKING:
    from aiokafka import ConsumerRecord

    from spendfuse.wire.topics import Topic

USAGE_PARTITIONS = 4
DEADLINE_S = 60.0
POLL_MS = 200


def make_topics(bootstrap: str, *topics: Topic) -> None:
    """Create those that are not there yet: `usage.v1` with four partitions, any other with one."""

    async def create() -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
        await admin.start()
        try:
            for topic in topics:
                with contextlib.suppress(TopicAlreadyExistsError):
                    partitions = USAGE_PARTITIONS if topic == USAGE else 1
                    await admin.create_topics([NewTopic(topic.name, partitions, 1)])
        finally:
            await admin.close()

    asyncio.run(create())


def usage_records(bootstrap: str, agent_path: str, usages: int) -> list[ConsumerRecord[bytes, bytes]]:
    """Return an agent's records in `usage.v1`, read until they hold so many usages (or the deadline passes)."""

    async def read() -> list[ConsumerRecord[bytes, bytes]]:
        consumer = AIOKafkaConsumer(
            USAGE.name, bootstrap_servers=bootstrap, fetch_max_wait_ms=20, auto_offset_reset="earliest"
        )
        async with consumer:
            found: list[ConsumerRecord[bytes, bytes]] = []
            give_up_at = time.monotonic() + DEADLINE_S
            while time.monotonic() < give_up_at:
                polled = await consumer.getmany(timeout_ms=POLL_MS)
                found += [record for records in polled.values() for record in records if record.key == key]
                # One more empty round after the last expected one, so that a repetition would be seen.
                if not polled and sum(len(decode_usages(record.value)) for record in found) >= usages:
                    break
            return found

    key = agent_path.encode()
    return asyncio.run(read())
