"""The command line's few words with Kafka: which topics there are, read them to their end, send some records."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError

from spendfuse.cli.faults import EXIT_UNAVAILABLE, CliError
from spendfuse.cli.target import Target
from spendfuse.client.connection import Consumer, client_options, close, consumer_options, producer_options
from spendfuse.client.follow import Follower, Record
from spendfuse.settings import BrokerSettings

CLIENT_ID: Final = "spendfuse-cli"
CONNECT_TIMEOUT_S: Final = 8.0
READ_TIMEOUT_S: Final = 60.0
SEND_TIMEOUT_S: Final = 30.0
CLOSE_TIMEOUT_S: Final = 2.0
TAIL_RECORDS_MAX: Final = 500

T = TypeVar("T")
Headers = Sequence[tuple[str, bytes]]


class Placed(NamedTuple):
    """Where a record lies."""

    partition: int
    offset: int


class Send(Protocol):
    """Sends one record and returns once every replica has it; the partition is the key's unless given."""

    def __call__(
        self, topic: str, value: bytes | None, key: bytes | None, headers: Headers, partition: int | None = None
    ) -> Awaitable[Placed]:
        """Return where it lies."""
        ...


class BrokerAwayError(CliError):
    """Nobody answers as Kafka would at the servers asked."""

    def __init__(self, target: Target, why: object) -> None:
        super().__init__(
            f"the broker at {target.servers} (from {target.known_by}) does not answer: {why}. "
            "Start one with `spendfuse up`, or name yours with --bootstrap-servers or SPENDFUSE_BOOTSTRAP_SERVERS",
            EXIT_UNAVAILABLE,
        )


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine; Kafka's own log lines are left out, since what matters of them is in the error."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL + 1)
    logging.getLogger("spendfuse").addHandler(logging.NullHandler())
    logging.getLogger("spendfuse").propagate = False
    return asyncio.run(work)


@contextlib.asynccontextmanager
async def reaching(target: Target) -> AsyncIterator[None]:
    """Turn Kafka's errors, and a wait that took too long, into BrokerAwayError."""
    try:
        yield
    except TimeoutError as error:
        raise BrokerAwayError(target, "it took too long") from error
    except (KafkaError, OSError) as error:
        raise BrokerAwayError(target, _why(error)) from error


def _why(error: Exception) -> str:
    text = " ".join(str(error).split())
    # aiokafka's own words are a list of tuples.
    return "no connection" if "Unable to bootstrap" in text or not text else text


async def partition_counts(target: Target) -> dict[str, int]:
    """Return the partition count of every topic; raises BrokerAwayError. Creates none."""
    async with reaching(target):
        client = AIOKafkaClient(**client_options(target.broker, CLIENT_ID))
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await client.bootstrap()
                cluster = await client.fetch_all_metadata()
            return {topic: len(cluster.partitions_for_topic(topic) or ()) for topic in cluster.topics()}
        finally:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(client.close(), CLOSE_TIMEOUT_S)


async def check_topics(target: Target, *wanted: str) -> dict[str, int]:
    """Return the partition counts; raises CliError when a topic that is needed does not exist."""
    counts = await partition_counts(target)
    missing = [topic for topic in wanted if topic not in counts]
    if missing:
        raise CliError(
            f"there is no topic {', '.join(missing)} at {target.servers}: create the topics with "
            "`spendfuse topics create`, or start a worker, which does it"
        )
    return counts


async def read_to_end(target: Target, readers: Mapping[str, Callable[[Record], None]]) -> None:
    """Give every record that some existing topics hold now to their readers; raises BrokerAwayError."""
    async with contextlib.AsyncExitStack() as stack, reaching(target), asyncio.timeout(READ_TIMEOUT_S):
        followers = [
            await stack.enter_async_context(Follower(target.broker, topic, reader, client_id=CLIENT_ID))
            for topic, reader in readers.items()
        ]
        for follower in followers:
            await follower.caught_up()


@contextlib.asynccontextmanager
async def sending(target: Target) -> AsyncIterator[Send]:
    """Give a function that sends one record and returns once every replica has it; raises BrokerAwayError."""
    async with reaching(target):
        producer = await _producer(target.broker)

        async def send(
            topic: str, value: bytes | None, key: bytes | None, headers: Headers, partition: int | None = None
        ) -> Placed:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                placed = await producer.send_and_wait(topic, value, key, partition, headers=list(headers))
            return Placed(placed.partition, placed.offset)

        try:
            yield send
        finally:
            await close(producer, CLOSE_TIMEOUT_S)


async def _producer(broker: BrokerSettings) -> Any:
    producer = AIOKafkaProducer(**producer_options(broker, CLIENT_ID))
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await producer.start()
    except BaseException:
        await close(producer, CLOSE_TIMEOUT_S)
        raise
    return producer


@contextlib.asynccontextmanager
async def tail(target: Target, topic: str) -> AsyncIterator[Callable[[int], Awaitable[list[bytes | None]]]]:
    """Give a function that returns the values of what is written to a topic from now on, waiting some ms for any."""
    async with reaching(target):
        consumer = Consumer(**consumer_options(target.broker, CLIENT_ID))
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await consumer.start()
                partitions = [TopicPartition(topic, 0)]
                consumer.assign(partitions)
                ends = await consumer.end_offsets(partitions)
                for partition, end in ends.items():
                    consumer.seek(partition, end)

            async def poll(wait_ms: int) -> list[bytes | None]:
                rounds = await consumer.getmany(timeout_ms=wait_ms, max_records=TAIL_RECORDS_MAX)
                return [record.value for records in rounds.values() for record in records]

            yield poll
        finally:
            await close(consumer, CLOSE_TIMEOUT_S)
