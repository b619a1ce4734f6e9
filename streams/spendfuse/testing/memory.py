"""Topics and tables in memory, with what the pipeline relies on: order, offsets, acknowledgements, changelogs."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

from spendfuse.pipeline.records import Delivery, Headers, SourceRecord
from spendfuse.wire.topics import MESSAGE_BYTES_MAX, TOPICS

RECORDS_MAX: Final = 1_000_000
"""Most records one partition holds: a test that needs more has lost its way."""

Place = tuple[str, int]
"""A topic and a partition."""


class PowerCutError(Exception):
    """The process ends here: nothing more leaves it."""


class ChangelogRecord(NamedTuple):
    """One durable write of a table; without a value it is a tombstone."""

    table: str
    partition: int
    key: bytes
    value: bytes | None


class MemoryTopics:
    """Every topic of wire/topics.py, as lists of records."""

    def __init__(self, partitions: int) -> None:
        """Make the topics of a deployment of `partitions`, empty."""
        self._logs: dict[Place, list[SourceRecord]] = {
            (topic.name, number): [] for topic in TOPICS for number in range(topic.partitions or partitions)
        }

    def append(
        self, topic: str, partition: int, *, key: bytes | None, value: bytes | None, headers: Headers, timestamp_ms: int
    ) -> SourceRecord:
        """Add a record and return it with its offset.

        Raises `ValueError` for a topic or partition that does not exist, and for a record larger than Kafka takes.
        """
        log = self._logs.get((topic, partition))
        if log is None:
            raise ValueError(f"there is no partition {partition} of topic {topic!r}; the topics are in wire/topics.py")
        size = len(key or b"") + len(value or b"") + sum(len(name) + len(said or b"") for name, said in headers)
        if size > MESSAGE_BYTES_MAX:
            raise ValueError(f"a record of {size} bytes for {topic}: Kafka takes {MESSAGE_BYTES_MAX}")
        if len(log) >= RECORDS_MAX:
            raise ValueError(f"{topic}/{partition} holds {RECORDS_MAX} records: use a smaller test")
        record = SourceRecord(topic, partition, len(log), timestamp_ms, key, value, headers=tuple(headers))
        log.append(record)
        return record

    def records(self, topic: str) -> list[SourceRecord]:
        """Return the records of a topic, partition by partition."""
        return [record for (name, _), log in self._logs.items() if name == topic for record in log]

    def places(self, topics: Iterable[str]) -> list[Place]:
        """Return every partition of some topics."""
        wanted = set(topics)
        return [place for place in self._logs if place[0] in wanted]

    def log(self, place: Place) -> Sequence[SourceRecord]:
        """Return the records of one partition."""
        return self._logs[place]


class MemoryReader:
    """A consumer: where it reads, and what it has committed; `rewind` is what a restart does."""

    def __init__(self, topics: MemoryTopics, names: Iterable[str]) -> None:
        """Start at the beginning of every partition."""
        self._topics = topics
        self._committed = dict.fromkeys(topics.places(names), 0)
        self._position = dict(self._committed)

    def take(self, records_max: int) -> list[SourceRecord]:
        """Return the next records of one partition, none when all is read."""
        for place, position in self._position.items():
            records = list(self._topics.log(place)[position : position + records_max])
            if records:
                self._position[place] = position + len(records)
                return [record._replace(ack=self._acknowledgement(record)) for record in records]
        return []

    def commit(self) -> None:
        """Commit all that was taken."""
        self._committed = dict(self._position)

    def rewind(self) -> None:
        """Go back to what is committed."""
        self._position = dict(self._committed)

    def _acknowledgement(self, record: SourceRecord) -> Any:
        def acknowledge() -> None:
            place = (record.topic, record.partition)
            self._committed[place] = max(self._committed[place], record.offset + 1)

        return acknowledge


class Power:
    """Counts the records that leave the process until the moment it dies."""

    def __init__(self) -> None:
        """Start with power for ever."""
        self.left: int | None = None

    def spend(self) -> None:
        """Let one record leave; raises `PowerCutError` when none may any more."""
        if self.left is not None:
            if self.left == 0:
                raise PowerCutError
            self.left -= 1


class MemoryOutbox:
    """Where the stages put what they publish; a record is on its topic at once."""

    def __init__(self, topics: MemoryTopics, power: Power, clock_ms: Callable[[], int]) -> None:
        """Take where records go, and the clock they are stamped by."""
        self._topics = topics
        self._power = power
        self._clock_ms = clock_ms

    async def put(
        self, topic: str, *, key: bytes, value: bytes | None, partition: int | None = None, headers: Headers = ()
    ) -> Delivery:
        """Append a record and return a delivery that is done."""
        self._power.spend()
        at_ms = self._clock_ms()
        return delivered(
            self._topics.append(topic, partition or 0, key=key, value=value, headers=headers, timestamp_ms=at_ms)
        )


class MemoryTable:
    """A table: a dict in memory, and a changelog that outlives it."""

    def __init__(self, name: str, changelog: list[ChangelogRecord], power: Power) -> None:
        """Start with what the changelog says."""
        self._name = name
        self._changelog = changelog
        self._power = power
        latest = {record.key: record.value for record in changelog if record.table == name}
        self._data = {key: value for key, value in latest.items() if value is not None}

    def get(self, key: bytes) -> bytes | None:
        """Return the value of a key."""
        return self._data.get(key)

    def keys(self) -> list[bytes]:
        """Return the keys held."""
        return list(self._data)

    def write(self, partition: int, key: bytes, value: bytes) -> Delivery:
        """Set a key and write its changelog record, durable at once."""
        if len(key) + len(value) > MESSAGE_BYTES_MAX:
            raise ValueError(f"the state {key!r} has {len(value)} bytes: Kafka takes {MESSAGE_BYTES_MAX}")
        self._power.spend()
        self._data[key] = value
        self._changelog.append(ChangelogRecord(self._name, partition, key, value))
        return delivered(None)

    def heal(self, owned: set[int]) -> list[Delivery]:  # noqa: ARG002 - the protocol's signature
        """Return nothing to wait for: nobody else writes this changelog."""
        return []

    def delete(self, partition: int, key: bytes) -> Delivery:
        """Forget a key and write its tombstone, durable at once."""
        self._power.spend()
        self._data.pop(key, None)
        self._changelog.append(ChangelogRecord(self._name, partition, key, None))
        return delivered(None)


def delivered(result: object) -> Delivery:
    """Return a delivery that is done; needs a running loop."""
    done: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    done.set_result(result)
    return done
