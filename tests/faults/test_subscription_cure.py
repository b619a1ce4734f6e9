"""A subscription that changes while the coordinator is looked up: aiokafka's consumer ends without our cure."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError

from spendfuse.client.connection import consumer_options, producer_options
from spendfuse.pipeline import faust_cures
from workers import quick_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spendfuse.embedded.tansu import EmbeddedBroker

pytestmark = pytest.mark.broker
DEADLINE_S = 30.0
FIRST, SECOND = "subscription-first", "subscription-second"


@pytest.fixture(params=[True, False], ids=["cured", "uncured"])
def cured(request: pytest.FixtureRequest) -> Iterator[bool]:
    if request.param:
        faust_cures.install(20)
    yield request.param
    faust_cures.uninstall()


async def test_a_consumer_outlives_a_subscription_that_changes_in_a_lookup(tansu: EmbeddedBroker, cured: bool) -> None:
    broker = quick_settings(tansu)
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)
    await admin.start()
    topics = [f"{topic}-{cured}" for topic in (FIRST, SECOND)]
    await admin.create_topics([NewTopic(topic, 1, 1) for topic in topics])
    await admin.close()
    async with AIOKafkaProducer(**producer_options(broker, "test")) as producer:
        for topic in topics:
            await producer.send_and_wait(topic, topic.encode())
    consumer = AIOKafkaConsumer(**consumer_options(broker, "test"), group_id=f"subscription-{cured}")
    consumer.subscribe(topics[:1])
    await consumer.start()
    try:
        async with asyncio.timeout(DEADLINE_S):
            assert (await consumer.getone()).topic == topics[0]
            subscribe_in_the_next_lookup(consumer, topics)
            if cured:
                while (await consumer.getone()).topic != topics[1]:
                    pass  # the first topic again: nothing was committed
            else:
                with pytest.raises(KafkaError, match="Unexpected error during coordination AssertionError"):
                    await consumer.getone()
    finally:
        await asyncio.gather(consumer.stop(), consumer._coordinator._coordination_task, return_exceptions=True)


def subscribe_in_the_next_lookup(consumer: AIOKafkaConsumer, topics: list[str]) -> None:
    client, coordinator = consumer._client, consumer._coordinator
    lookup = client.coordinator_lookup

    async def slow_lookup(*arguments: Any) -> Any:
        client.coordinator_lookup = lookup
        consumer.subscribe(topics)
        return await lookup(*arguments)

    client.coordinator_lookup = slow_lookup
    coordinator.coordinator_dead()
