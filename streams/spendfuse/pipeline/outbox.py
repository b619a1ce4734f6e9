"""Where the worker puts what it publishes: one aiokafka producer for all of it."""

import asyncio
from collections.abc import Sequence
from typing import Any

from aiokafka import AIOKafkaProducer

from spendfuse.client.connection import close, producer_options
from spendfuse.pipeline.awake import Awake
from spendfuse.pipeline.records import Delivery, Headers
from spendfuse.settings import BrokerSettings


class KafkaOutbox:
    """An outbox over one aiokafka producer; records of one partition go out in the order they were put."""

    def __init__(self, broker: BrokerSettings, awake: Awake | None = None) -> None:
        """Take how to reach the broker, and what knows whether a request may go; `start` connects."""
        self._broker = broker
        self._awake = awake
        self._producer: AIOKafkaProducer | None = None

    async def start(self) -> None:
        """Connect; raises a `KafkaError` when the broker is away."""
        producer = AIOKafkaProducer(**producer_options(self._broker, "spendfuse-worker"))
        try:
            await producer.start()
        except BaseException:  # told to stop meanwhile, too
            await close(producer)
            raise
        self._guard(producer)
        self._producer = producer

    def _guard(self, producer: AIOKafkaProducer) -> None:
        """Have each request look first: what waited in a process that was frozen is older than its new owner's."""
        send, awake = producer.client.send, self._awake
        if awake is None:
            return

        async def look_and_send(node_id: Any, request: Any, **options: Any) -> Any:
            await awake.before(request)
            return await send(node_id, request, **options)

        producer.client.send = look_and_send

    async def stop(self) -> None:
        """Send what is waiting and close."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await close(producer)

    async def put(
        self, topic: str, *, key: bytes, value: bytes | None, partition: int | None = None, headers: Headers = ()
    ) -> Delivery:
        """Hand over a record; the result is done when all replicas have it."""
        if self._producer is None:
            raise RuntimeError("the worker's producer is not running")
        delivery: Delivery = await self._producer.send(
            topic, value, key=key, partition=partition, headers=list(headers)
        )
        return delivery

    async def put_all(self, topic: str, partition: int, records: Sequence[tuple[bytes, bytes | None]]) -> None:
        """Hand over records, (key, value), of one partition, and return when all replicas have them.

        They go in batches made here, since a record by itself costs several times as much; None is a tombstone.
        """
        if self._producer is None:
            raise RuntimeError("the worker's producer is not running")
        sent: list[Delivery] = []
        batch = self._producer.create_batch()
        for key, value in records:
            if batch.append(timestamp=None, key=key, value=value) is None:  # full, and closed by that
                sent.append(await self._producer.send_batch(batch, topic, partition=partition))
                batch = self._producer.create_batch()
                if batch.append(timestamp=None, key=key, value=value) is None:
                    raise RuntimeError(f"a record of {len(value or b'')} bytes for {topic} does not fit an empty batch")
        batch.close()
        sent.append(await self._producer.send_batch(batch, topic, partition=partition))
        await asyncio.gather(*sent)
