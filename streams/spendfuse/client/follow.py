"""Reading a whole topic without a consumer group: from its beginning to what it held at the start, then live."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Self
from zlib import crc32

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from spendfuse.client.connection import Consumer, close, consumer_options
from spendfuse.settings import BrokerSettings

BACKOFF_S_MIN: Final = 0.1
BACKOFF_S_MAX: Final = 5.0
TOPIC_POLL_S: Final = 0.5
"""How often a topic that does not exist yet is looked for."""
ROUND_RECORDS_MAX: Final = 500
ROUND_WAIT_MS: Final = 1_000
ANSWER_TIMEOUT_S: Final = 15.0
"""Longest wait for an answer on topics or offsets; aiokafka alone may wait for ever."""
STOP_TIMEOUT_S: Final = 2.0

_log = logging.getLogger("spendfuse")


class Record(NamedTuple):
    """One record of a topic; `timestamp_ms` is its Kafka timestamp, a `value` of None is a tombstone."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()

    def header(self, name: str) -> bytes | None:
        """Return the last value of a header, None without it."""
        return next((value for key, value in reversed(self.headers) if key == name), None)


class _Anchor(NamedTuple):
    """The last record of a partition that was delivered, to be known again."""

    offset: int
    timestamp_ms: int
    digest: int


class Follower:
    """A task that gives every record of every partition of one topic to `on_record`, from the first, for ever.

    It waits for a topic that does not exist yet (and never creates it), survives the loss of the broker, and goes
    on where it was. After each new connection it looks whether the last record is still the same one: a topic that
    was made anew meanwhile (the embedded broker forgets all) is read from the beginning, else its first commands
    would be taken for old ones. So `on_record` must bear a record twice. An exception from `on_record` is logged and
    counted in `faults`; the next record follows.

    On the embedded broker the end of a topic is known rightly only if its producers send batches of one record.
    """

    def __init__(
        self,
        broker: BrokerSettings,
        topic: str,
        on_record: Callable[[Record], None],
        *,
        client_id: str = "spendfuse-follower",
        on_caught_up: Callable[[], None] | None = None,
    ) -> None:
        """`on_caught_up` is called once, in the task, after the last record the topic held at the start."""
        self.topic = topic
        self.records = 0
        self.faults = 0
        self._broker = broker
        self._client_id = client_id
        self._on_record = on_record
        self._on_caught_up = on_caught_up
        self._caught_up = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._anchors: dict[TopicPartition, _Anchor] = {}
        self._unproven: set[TopicPartition] = set()
        self._links: frozenset[Any] = frozenset()
        self._ends: dict[TopicPartition, int] | None = None

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.stop()

    def start(self) -> None:
        """Start following, in the running loop."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self.run(), name=f"follow {self.topic}")

    @property
    def is_caught_up(self) -> bool:
        """Whether everything the topic held at the start has been given to `on_record`."""
        return self._caught_up.is_set()

    async def caught_up(self) -> None:
        """Return once everything the topic held at the start was given to `on_record`; at once if it was empty."""
        await self._caught_up.wait()

    async def stop(self) -> None:
        """End the task."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            # Not `await task` with its cancellation suppressed: whoever cancels us meanwhile would not be heard.
            await asyncio.wait({task})

    async def run(self) -> None:
        """Follow until cancelled."""
        backoff_s = BACKOFF_S_MIN
        while True:
            before = self.records
            try:
                await self._follow_until_it_fails()
            except (KafkaError, OSError, TimeoutError) as error:
                _log.warning("spendfuse lost %s (%s); trying again in %.1f s", self.topic, error, backoff_s)
            except Exception:  # noqa: BLE001 - a guard that stopped following would never be told to stop
                _log.exception("spendfuse lost %s; trying again in %.1f s", self.topic, backoff_s)
            await asyncio.sleep(backoff_s)
            backoff_s = BACKOFF_S_MIN if self.records > before else min(2 * backoff_s, BACKOFF_S_MAX)

    async def _follow_until_it_fails(self) -> None:
        consumer = Consumer(**consumer_options(self._broker, self._client_id))
        try:
            await asyncio.wait_for(consumer.start(), ANSWER_TIMEOUT_S)
            partitions = await self._existing_partitions(consumer)
            consumer.assign(partitions)
            await self._take_position(consumer, partitions)
            while True:
                await self._deliver_round(consumer, partitions)
        finally:
            await close(consumer, STOP_TIMEOUT_S)

    async def _existing_partitions(self, consumer: Any) -> list[TopicPartition]:
        # All topics are asked for: asking for one by its name would create it, with the broker's partition count.
        while True:
            cluster = await asyncio.wait_for(consumer._client.fetch_all_metadata(), ANSWER_TIMEOUT_S)  # noqa: SLF001 - aiokafka has no public way to the partitions of a topic it does not follow
            found = cluster.partitions_for_topic(self.topic)
            if found:
                return [TopicPartition(self.topic, partition) for partition in sorted(found)]
            await asyncio.sleep(TOPIC_POLL_S)

    async def _take_position(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        """Go to the last record delivered, where the topic may still hold it, else to the beginning."""
        self._links = _links(consumer)
        ends = dict(await asyncio.wait_for(consumer.end_offsets(partitions), ANSWER_TIMEOUT_S))
        if self._ends is None:
            self._ends = ends
        for partition in partitions:
            anchor = self._anchors.get(partition)
            if anchor is not None and anchor.offset < ends[partition]:
                consumer.seek(partition, anchor.offset)
                self._unproven.add(partition)
            else:
                await self._begin_again(consumer, partition)

    async def _begin_again(self, consumer: Any, partition: TopicPartition) -> None:
        self._anchors.pop(partition, None)
        self._unproven.discard(partition)
        await asyncio.wait_for(consumer.seek_to_beginning(partition), ANSWER_TIMEOUT_S)

    async def _deliver_round(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        if not self.is_caught_up and await self._has_reached_the_ends(consumer):
            self._caught_up.set()
            if self._on_caught_up is not None:
                self._on_caught_up()
        rounds = await consumer.getmany(*partitions, timeout_ms=ROUND_WAIT_MS, max_records=ROUND_RECORDS_MAX)
        if not _links(consumer) <= self._links:
            # Before anything is delivered: what was just fetched may be of another topic of the same name.
            if await self._existing_partitions(consumer) != partitions:
                raise KafkaError("its partitions have changed")
            await self._take_position(consumer, partitions)
            return
        for partition, records in rounds.items():
            if partition in self._unproven:
                if _anchor(records[0]) != self._anchors[partition]:
                    await self._begin_again(consumer, partition)
                    continue
                self._unproven.discard(partition)
                del records[0]
            for record in records:
                self._deliver(record)
                self._anchors[partition] = _anchor(record)

    async def _has_reached_the_ends(self, consumer: Any) -> bool:
        # The consumer's position, not the last record's offset: compaction may have taken the last records.
        for partition, end in (self._ends or {}).items():
            if await asyncio.wait_for(consumer.position(partition), ANSWER_TIMEOUT_S) < end:
                return False
        return True

    def _deliver(self, raw: Any) -> None:
        self.records += 1
        record = Record(raw.topic, raw.partition, raw.offset, raw.timestamp, raw.key, raw.value, tuple(raw.headers))
        try:
            self._on_record(record)
        except Exception:  # noqa: BLE001 - one record at fault must not hide those behind it
            self.faults += 1
            _log.exception("spendfuse cannot use %s/%d@%d", record.topic, record.partition, record.offset)


def _anchor(record: Any) -> _Anchor:
    return _Anchor(record.offset, record.timestamp, crc32(record.value or b"", crc32(record.key or b"")))


def _links(consumer: Any) -> frozenset[Any]:
    # aiokafka connects anew by itself and tells nobody. The objects are kept, so that no two share an identity.
    return frozenset(consumer._client._conns.values())  # noqa: SLF001 - the only trace a new connection leaves
