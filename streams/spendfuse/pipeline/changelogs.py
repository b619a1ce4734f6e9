"""The tables' changelogs, read to their ends by a consumer of our own.

A record through Faust's recovery costs some 250 µs, through `getmany` a few: partitions stand still so much longer
whenever they move. A table's changelog holds every write of the last minutes, and those of before once for each key.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from aiokafka import TopicPartition
from aiokafka.structs import ConsumerRecord

from spendfuse.client.connection import Consumer, consumer_options
from spendfuse.settings import BrokerSettings

RECORDS_MAX: Final = 1_000
"""Most records taken in at once: the loop must turn in between, for heartbeats and what is on its way."""
POLL_MS: Final = 100
FETCH_WAIT_MS: Final = 20
"""Longest that a fetch waits at partitions that are read to their ends, while others have more."""
STUCK_S_MAX: Final = 5.0
READ_S_MAX: Final = 60.0
"""Longest that all of it takes; Faust allows 90 s, and reads what is left."""

Apply = Callable[[TopicPartition, Sequence[ConsumerRecord]], None]


async def read_to_end(
    broker: BrokerSettings, spans: Mapping[TopicPartition, tuple[int, int]], apply: Apply
) -> dict[TopicPartition, int]:
    """Hand over the records of partitions, each from a first offset to a last; return the last offset read of each.

    It ends early when nothing comes for `STUCK_S_MAX`, or after `READ_S_MAX`. Raises `KafkaError`.
    """
    options = consumer_options(broker, "spendfuse-changelogs") | {"fetch_max_wait_ms": FETCH_WAIT_MS}
    consumer = Consumer(**options)
    reached = {place: first - 1 for place, (first, _) in spans.items()}
    clock = asyncio.get_running_loop().time
    began_at = moved_at = clock()
    try:
        await consumer.start()
        consumer.assign(list(spans))
        for place, (first, _) in spans.items():
            consumer.seek(place, first)
        while waiting := [place for place, (_, last) in spans.items() if reached[place] < last]:
            if clock() - moved_at > STUCK_S_MAX or clock() - began_at > READ_S_MAX:
                break
            batches = await consumer.getmany(*waiting, timeout_ms=POLL_MS, max_records=RECORDS_MAX)
            for place, records in batches.items():
                apply(place, records)
                reached[place] = records[-1].offset
                moved_at = clock()
                if reached[place] >= spans[place][1]:
                    consumer.pause(place)
            await asyncio.sleep(0)
    finally:
        await consumer.stop()
    return reached
