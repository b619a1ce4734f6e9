"""Topics of the product on the brokers that tests share: whichever test comes first makes them, and all alike."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import TopicAlreadyExistsError

from spendfuse.wire.topics import USAGE

if TYPE_CHECKING:
    from spendfuse.wire.topics import Topic

USAGE_PARTITIONS = 4


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
