"""What the worker's outbox hands over together arrives as it was given: every record, in order, on its partition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from spendfuse.client.connection import admin_options, consumer_options
from spendfuse.pipeline.outbox import KafkaOutbox
from spendfuse.settings import BrokerSettings
from workers import quick_settings

if TYPE_CHECKING:
    from kraft import KraftBroker
    from spendfuse.embedded.tansu import EmbeddedBroker

TOPIC = "outbox-batches"
RECORDS: list[tuple[bytes, bytes | None]] = [
    (b"%d" % nth, None if nth % 7 == 3 else b"x" * (nth * 997 % 3_000)) for nth in range(300)
]
LARGE: list[tuple[bytes, bytes | None]] = [(b"large", b"y" * 300_000), (b"small", b"z"), (b"gone", None)]


async def written_and_read(broker: BrokerSettings) -> None:
    admin = AIOKafkaAdminClient(**admin_options(broker, "test"))
    await admin.start()
    await admin.create_topics([NewTopic(TOPIC, 2, 1)])
    await admin.close()
    outbox = KafkaOutbox(broker)
    await outbox.start()
    try:
        for records in (RECORDS, LARGE, RECORDS[:1]):
            await outbox.put_all(TOPIC, 1, records)
    finally:
        await outbox.stop()
    consumer = AIOKafkaConsumer(**consumer_options(broker, "test"))
    await consumer.start()
    try:
        place = TopicPartition(TOPIC, 1)
        consumer.assign([place])
        found: list[tuple[bytes, bytes | None]] = []
        wanted = [*RECORDS, *LARGE, RECORDS[0]]
        for _ in range(200):  # each waits 0.1 s for more
            for records in (await consumer.getmany(timeout_ms=100)).values():
                found += [(record.key, record.value) for record in records]
            if len(found) >= len(wanted):
                break
        assert found == wanted
    finally:
        await consumer.stop()


@pytest.mark.broker
async def test_records_handed_over_together_arrive_one_by_one_where_a_batch_holds_one(tansu: EmbeddedBroker) -> None:
    broker = quick_settings(tansu)
    assert broker.producer_max_batch_size == 1, "the embedded broker's batches hold one record"
    await written_and_read(broker)


@pytest.mark.kafka
async def test_records_handed_over_together_arrive_on_a_real_kafka(kraft: KraftBroker) -> None:
    broker = BrokerSettings.from_env({}, bootstrap_servers=kraft.bootstrap_servers)
    await written_and_read(broker)
