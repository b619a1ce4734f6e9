"""The journal of batch headers in `batches.v1`: written before the rows, read when a partition is taken over."""

import asyncio
from collections.abc import Iterable
from typing import Final

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import UnknownTopicOrPartitionError
from pydantic import ValidationError

from spendfuse.audit.batches import BatchHeader
from spendfuse.client.connection import Consumer, close, consumer_options
from spendfuse.settings import BrokerSettings
from spendfuse.wire.base import encode

CLIENT_ID: Final = "spendfuse-audit-headers"
READ_TIMEOUT_S: Final = 60.0
POLL_MS: Final = 200
STOP_S: Final = 2.0
RECORDS_PER_POLL: Final = 100

_log = structlog.get_logger(__name__)


async def append(producer: AIOKafkaProducer, topic: str, header: BatchHeader) -> None:
    """Write a header and return once every replica has it."""
    await producer.send_and_wait(topic, encode(header), key=str(header.partition).encode())


async def last_headers(broker: BrokerSettings, topic: str, partitions: Iterable[int]) -> dict[int, BatchHeader]:
    """Return the last header of each of these ledger partitions that has one.

    The last is that of the newest generation, and in it of the highest number: a former owner's late word loses.
    Raises TimeoutError after READ_TIMEOUT_S, and whatever aiokafka raises.
    """
    wanted = set(partitions)
    found: dict[int, BatchHeader] = {}
    consumer = Consumer(topic, **consumer_options(broker, CLIENT_ID))
    async with asyncio.timeout(READ_TIMEOUT_S):
        try:
            await consumer.start()
            # Without a group all partitions are assigned at once. None at all would read as "no header yet".
            assigned = consumer.assignment()
            if not assigned:
                raise UnknownTopicOrPartitionError(f"the broker does not say which partitions {topic} has")
            await consumer.seek_to_beginning(*assigned)
            ends = await consumer.end_offsets(assigned)
            while any([await consumer.position(part) < end for part, end in ends.items()]):
                for records in (await consumer.getmany(timeout_ms=POLL_MS, max_records=RECORDS_PER_POLL)).values():
                    for record in records:
                        _keep_last(found, wanted, record.value, record.offset)
        finally:
            await close(consumer, STOP_S)
    return found


def _keep_last(found: dict[int, BatchHeader], wanted: set[int], value: bytes | None, offset: int) -> None:
    if value is None:
        return
    try:
        header = BatchHeader.model_validate_json(value)
    except ValidationError as error:
        _log.error("a batch header cannot be read and does not count", offset=offset, faults=error.error_count())
        return
    known = found.get(header.partition)
    if header.partition in wanted and (
        known is None or (header.generation, header.seq) >= (known.generation, known.seq)
    ):
        found[header.partition] = header
