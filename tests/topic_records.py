"""All that a topic holds now, read without a group: what a test looks at when it is no part of an event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiokafka import AIOKafkaConsumer, TopicPartition

from spendfuse.client.connection import consumer_options

if TYPE_CHECKING:
    from spendfuse.settings import BrokerSettings

READ_S_MAX = 30.0


def values_of(broker: BrokerSettings, topic: str) -> list[bytes]:
    """Return the values of every record of a topic, by partition and offset; none when the topic does not exist."""

    async def read() -> list[bytes]:
        async with asyncio.timeout(READ_S_MAX), AIOKafkaConsumer(**consumer_options(broker, "test")) as consumer:
            await consumer.topics()
            places = [TopicPartition(topic, each) for each in sorted(consumer.partitions_for_topic(topic) or ())]
            consumer.assign(places)
            await consumer.seek_to_beginning(*places)
            ends = await consumer.end_offsets(places)
            found: dict[TopicPartition, list[bytes]] = {place: [] for place in places}
            while any([await consumer.position(place) < ends[place] for place in places]):
                for place, records in (await consumer.getmany(timeout_ms=200)).items():
                    found[place] += [record.value for record in records if record.value is not None]
            return [value for values in found.values() for value in values]

    return asyncio.run(read())
