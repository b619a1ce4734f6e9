"""Where the worker puts what it publishes: one aiokafka producer for all of it."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, KafkaTimeoutError

from spendfuse.client.connection import close, producer_options
from spendfuse.pipeline.awake import Awake
from spendfuse.pipeline.records import Delivery, Headers
from spendfuse.settings import BrokerSettings

DELIVERY_S: Final = 120.0
"""Longest a record is tried anew while a broker refuses it for now (too few replicas, no leader, a failed disk).

Less than the 300 s after which a group takes a reader that does not come back for dead.
"""
AGAIN_S: Final = 0.1
STOP_S: Final = 10.0


class KafkaOutbox:
    """An outbox over one aiokafka producer; records of one partition go out in the order they were put.

    What a broker refuses for now is tried again for `delivery_s`; then, and at once for what it will never take, the
    delivery fails.
    """

    def __init__(self, broker: BrokerSettings, awake: Awake | None = None, delivery_s: float = DELIVERY_S) -> None:
        """Take how to reach the broker, and what knows whether a request may go; `start` connects."""
        self._broker = broker
        self._delivery_s = delivery_s
        self.on_failed: Callable[[str, KafkaError], None] = lambda _topic, _error: None
        self._awake = awake
        self._producer: AIOKafkaProducer | None = None

    async def start(self) -> None:
        """Connect; raises a `KafkaError` when the broker is away."""
        producer = AIOKafkaProducer(**producer_options(self._broker, "spendfuse-worker"))
        # Its own bound for both is that of one request, which is less than a broker takes to come back.
        producer._message_accumulator._batch_ttl = self._delivery_s  # noqa: SLF001 - it has no option for this
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
        """Send what is waiting and close; what a broker does not take by then is done again by who comes next."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await close(producer, STOP_S)

    async def put(
        self, topic: str, *, key: bytes, value: bytes | None, partition: int | None = None, headers: Headers = ()
    ) -> Delivery:
        """Hand over a record; the result is done when all replicas have it."""
        producer = self._running()
        delivery: Delivery = await self._patiently(
            topic, lambda: producer.send(topic, value, key=key, partition=partition, headers=list(headers))
        )
        return delivery

    async def put_all(self, topic: str, partition: int, records: Sequence[tuple[bytes, bytes | None]]) -> None:
        """Hand over records, (key, value), of one partition, and return when all replicas have them.

        They go in batches made here, since a record by itself costs several times as much; None is a tombstone.
        """
        producer = self._running()
        sent: list[Delivery] = []

        async def send(batch: Any) -> None:
            sent.append(await self._patiently(topic, lambda: producer.send_batch(batch, topic, partition=partition)))

        batch = producer.create_batch()
        for key, value in records:
            if batch.append(timestamp=None, key=key, value=value) is None:  # full, and closed by that
                await send(batch)
                batch = producer.create_batch()
                if batch.append(timestamp=None, key=key, value=value) is None:
                    raise RuntimeError(f"a record of {len(value or b'')} bytes for {topic} does not fit an empty batch")
        batch.close()
        await send(batch)
        await asyncio.gather(*sent)

    def _running(self) -> AIOKafkaProducer:
        if self._producer is None:
            raise RuntimeError("the worker's producer is not running")
        return self._producer

    async def _patiently(self, topic: str, hand_over: Callable[[], Awaitable[Any]]) -> Delivery:
        """Hand over once there is room: a partition whose records are refused for now keeps a batch and no more."""
        give_up_at = time.monotonic() + self._delivery_s
        while True:
            try:
                delivery: asyncio.Future[Any] = await hand_over()
            except KafkaError as error:
                # A topic is also "unknown" to a producer whose question about it got no answer, as under a quota.
                for_now = isinstance(error, KafkaTimeoutError) or error.retriable
                if for_now and time.monotonic() < give_up_at:
                    await asyncio.sleep(AGAIN_S)
                    continue
                self.on_failed(topic, error)
                raise
            delivery.add_done_callback(lambda done: self._look(topic, done))
            return delivery

    def _look(self, topic: str, done: Any) -> None:
        error = None if done.cancelled() else done.exception()
        if isinstance(error, KafkaError):
            self.on_failed(topic, error)
