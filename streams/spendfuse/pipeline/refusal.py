"""State and topics that do not fit each other: the worker says which, with both numbers, and ends; it never guesses.

A watermark beyond the end of its topic means that the topic was made anew or cut off: what comes next would be taken
for what was counted long ago. A group that has read far, beside a changelog that holds nothing, means that the
changelog was lost: caps would be judged on sums that begin at zero.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

from aiokafka import TopicPartition

from spendfuse.client.connection import Consumer, close, consumer_options
from spendfuse.pipeline.codec import UnreadableStateError
from spendfuse.pipeline.rebuild_mark import RebuildMark, mark_topic, read_mark
from spendfuse.settings import BrokerSettings
from spendfuse.wire.base import from_us, rfc3339
from spendfuse.wire.topics import PACKED, ROLLUPS

EXIT_REFUSED: Final = 65
CLIENT_ID: Final = "spendfuse-refusal"
TRIES: Final = 5
"""How often an end is asked for before it is believed: after a change of leaders it may lag behind for a moment."""
TRY_AGAIN_S: Final = 1.0
FETCH_MS: Final = 2_000
ANSWER_S: Final = 30.0
STOP_S: Final = 2.0
WAY_ON: Final = "see streams/README.md, 'When state and topics do not fit'"
REBUILD: Final = "`spendfuse state rebuild` writes the state anew from the ledger"
TABLES: Final = {"scopes": PACKED.name, "shared": ROLLUPS.name}
"""Tables, and the topic whose reading fills them. Remembered ids are not among them: a call in flight leaves none."""

EndOf = Callable[[str, int], Awaitable[int]]


class StateMismatchError(Exception):
    """The stored state and the topics do not fit each other; the message says where, and what to do."""


class Ends:
    """Vouches that the offsets which a state was counted up to exist; asks the broker only when it must."""

    def __init__(self, end_of: EndOf, try_again_s: float = TRY_AGAIN_S) -> None:
        """Take what asks for the end of a topic's partition (the offset of the next record)."""
        self._end_of = end_of
        self._try_again_s = try_again_s
        self._known: dict[tuple[str, int], int] = {}

    async def vouch(self, topic: str, partition: int, offset: int) -> None:
        """Return when a partition holds an offset, or has held it; raises `StateMismatchError`."""
        for nth in range(TRIES):
            if offset < self._known.get((topic, partition), 0):
                return
            if nth:
                await asyncio.sleep(self._try_again_s)
            self._known[(topic, partition)] = await self._end_of(topic, partition)
        end = self._known[(topic, partition)]
        if offset >= end:
            raise StateMismatchError(
                f"the state has counted {topic} partition {partition} up to offset {offset}, and it ends before offset "
                f"{end}: the topic was made anew or cut off, and its next records would be taken for old ones. {WAY_ON}"
            )


class KafkaEnds:
    """Asks a Kafka for the end of a partition."""

    def __init__(self, broker: BrokerSettings) -> None:
        """Take how to reach it."""
        self._broker = broker

    async def __call__(self, topic: str, partition: int) -> int:
        """Return the offset of the next record; raises a `KafkaError` when the broker is away."""
        consumer = Consumer(**consumer_options(self._broker, CLIENT_ID))
        async with asyncio.timeout(ANSWER_S):
            await consumer.start()
            try:
                return await end_of(consumer, TopicPartition(topic, partition))
            finally:
                await stop(consumer)


async def stop(consumer: Any) -> None:
    """Stop a consumer, and wait no longer than a while: with a fetch on its way aiokafka may wait for ever."""
    await close(consumer, STOP_S)


async def end_of(consumer: Any, place: TopicPartition) -> int:
    """Return the offset of a partition's next record."""
    consumer.assign([place])
    end: int = (await consumer.end_offsets([place]))[place]
    if not end:
        return 0
    # The embedded broker answers with the base of the last batch; what a fetch says is right everywhere.
    consumer.seek(place, max(0, end - 1))
    await consumer.getmany(place, timeout_ms=FETCH_MS, max_records=1)
    return max(end, consumer.highwater(place) or 0)


async def check_changelogs(broker: BrokerSettings, app_id: str, partitions: int) -> None:
    """Return when no table has lost its changelog; raises `StateMismatchError`, and a `KafkaError`."""
    # One consumer asks the group, and never assigns: aiokafka's coordination ends with an error when an assignment is
    # replaced while it looks for its coordinator. The other reads, of no group.
    group = Consumer(group_id=app_id, **consumer_options(broker, CLIENT_ID))
    consumer = Consumer(**consumer_options(broker, CLIENT_ID))
    async with asyncio.timeout(ANSWER_S):
        try:
            await group.start()
            await consumer.start()
            existing = await consumer.topics()
            if mark_topic(app_id) in existing:
                refuse_half_rebuilt(await read_mark(consumer, app_id))
            # Ids are written with the sums of their call: where they are and sums are not, those were lost. That is
            # known without the group's offsets, which a broker may forget.
            ids = f"{app_id}-ids-changelog"
            remembers = ids in existing and await _written(consumer, ids, partitions)
            for table, source in TABLES.items():
                changelog = f"{app_id}-{table}-changelog"
                read = await _read_so_far(group, source, partitions)
                if not (read or (remembers and table == "scopes")):
                    continue
                if changelog not in existing or not await _written(consumer, changelog, partitions):
                    lost = "holds no record" if changelog in existing else "does not exist"
                    proof = f"the group {app_id} has read {source} up to offset {read}" if read else f"{ids} holds ids"
                    raise StateMismatchError(
                        f"{proof}, and {changelog} {lost}: the changelog was lost, and every sum would begin at zero. "
                        f"{REBUILD}; {WAY_ON}"
                    )
        finally:
            await stop(group)
            await stop(consumer)


def refuse_half_rebuilt(mark: RebuildMark | None) -> None:
    """Return unless a rebuild began and did not end; raises `StateMismatchError`."""
    if mark is not None and mark.phase == "writing":
        raise StateMismatchError(
            f"a rebuild of the state from {mark.source} began at {rfc3339(from_us(mark.at_us))} and has not ended: "
            f"the tables hold a part of it. Run `spendfuse state rebuild --from {mark.source}` again; {WAY_ON}"
        )


async def _read_so_far(group: Any, topic: str, partitions: int) -> int:
    places = [TopicPartition(topic, number) for number in range(partitions)]
    return max([await group.committed(place) or 0 for place in places])


async def _written(consumer: Any, topic: str, partitions: int) -> bool:
    places = [TopicPartition(topic, number) for number in range(partitions)]
    consumer.assign(places)
    await consumer.seek_to_beginning(*places)
    return bool(await consumer.getmany(timeout_ms=FETCH_MS, max_records=1))


@contextlib.contextmanager
def ending(end: Callable[[str], None]) -> Iterator[None]:
    """Give the sentence of a refusal to what ends the process."""
    try:
        yield
    except (StateMismatchError, UnreadableStateError) as error:
        end(str(error))
        raise
