"""Defects of faust-streaming 0.15.3, cured from outside, and the proof that this is the version they are for.

1. Recovery loses source events: `Recovery.on_recovery_completed` resumes the source partitions, then awaits a seek,
   then clears the agents' queues; what was queued in between vanishes and is committed. The cure stops the flow
   before it starts; Faust resumes it itself, after its seek.
2. `fetch_max_wait_ms` is written out as 1500 in the worker's consumer: on a broker that does not wake a waiting
   fetch, every event waits up to that long.
3. The timer commits while the group rebalances. The broker refuses the old generation, aiokafka forgets the new one and
   joins again: a second rebalance right after the first, and the partitions stand still for a heartbeat's interval
   more. The cure lets the timer wait until the rebalance is over; what was acknowledged is committed then.
4. Recovery takes a changelog's last record of a key, whoever wrote it. What a worker had sent before it was cut off may
   arrive after what the new owner has written since, and would bring sums back to where they were. The cure keeps the
   value that has counted more; the table writes it again (`FaustTable.heal`), so that compaction keeps it too.
5. After a rebalance Faust seeks back to what is committed, since a fetch on its way may have moved the position while
   its records were dropped. A partition of which nothing was ever committed it leaves where it is: all its first
   records are lost. The cure goes back to its beginning.

6. A recovery takes some 250 µs for a record of a changelog, and whatever was written since the last one is read again.
   The cure reads changelogs to their ends by itself (`changelogs.py`) before Faust looks what is left to be read.

Faust's consumer is aiokafka's, so it is also given what ours have: no record batch can stop it.

And one of aiokafka 0.14: a subscription that changes while the group's coordinator is looked up, as Faust changes it
when a worker starts, fails an assertion in the task that keeps the group, and so ends the worker. The cure lets that
task begin its loop again, where it looks at the subscription anew.
"""

import hashlib
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final

import aiokafka
from aiokafka import TopicPartition
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.errors import KafkaError
from faust.stores.memory import Store
from faust.tables.recovery import Recovery
from faust.transport.consumer import Consumer

from spendfuse.client.connection import read_anything
from spendfuse.pipeline import codec
from spendfuse.pipeline.changelogs import Apply

RECOVERY_SHA256: Final = "6ef567acf072e46da3fccbccc6d662371f634f622c3d510972d5df81f70ae3ac"
"""Of the source of `Recovery.on_recovery_completed` that the first cure was proved on."""
FAUST_FETCH_MAX_WAIT_MS: Final = 1_500
CHANGES_MAX: Final = 10
"""How often one consumer's group may meet a changed subscription; Faust subscribes a few times in a worker's life."""

_log = logging.getLogger(__name__)
_COORDINATION: Final = "_GroupCoordinator__coordination_routine"
_original_coordination = getattr(GroupCoordinator, _COORDINATION)
_original_recovery_completed = Recovery.on_recovery_completed
_original_build_offsets = Recovery._build_offsets  # noqa: SLF001 - there is no public step to wrap
_original_consumer_init = aiokafka.AIOKafkaConsumer.__init__
_original_commit = Consumer.commit
_original_perform_seek = Consumer.perform_seek
_original_apply = Store.apply_changelog_batch
_stale: dict[str, set[bytes]] = {}
OLDER: Final[dict[str, Callable[[bytes, bytes], bool]]] = {
    "scopes": codec.is_older_scope, "ids": codec.is_older_slot, "shared": codec.is_older_shared,
}  # fmt: skip
"""For each table: whether a value is older than another of its key."""

Read = Callable[[Mapping[TopicPartition, tuple[int, int]], Apply], Awaitable[Any]]
"""Reads partitions from a first offset to a last and hands over their records, as `changelogs.read_to_end`."""


class CureMismatchError(Exception):
    """Faust's source differs from the one the cures were proved on."""


def recovery_sha256() -> str:
    """Return the hash of the function that the first cure wraps."""
    return hashlib.sha256(inspect.getsource(_original_recovery_completed).encode()).hexdigest()


async def _recovery_completed(self: Any, generation_id: int = 0) -> None:
    self.app.consumer.stop_flow()
    await _original_recovery_completed(self, generation_id)


async def _coordination(self: Any) -> None:
    for changes in range(CHANGES_MAX + 1):
        try:
            await _original_coordination(self)
        except AssertionError:
            # Nothing was done on it: the assertions stand between a look at the subscription and the first action.
            if changes == CHANGES_MAX:
                raise
            _log.warning("the subscription of group %s changed in a rebalance; joining again", self.group_id)
        else:
            return


async def _commit(self: Any, topics: Any = None, start_new_transaction: bool = True) -> bool:
    if self.app.rebalancing and start_new_transaction:  # False: Faust's own last commit, before it gives up partitions
        return False
    return await _original_commit(self, topics, start_new_transaction)


async def _perform_seek(self: Any) -> None:
    await _original_perform_seek(self)
    never = [
        place
        for place in self.assignment()
        if not self._is_changelog_tp(place) and self._read_offset.get(place) is None
    ]
    if never:
        for place, offset in (await self.earliest_offsets(*never)).items():
            await self._seek(place, offset)


def _apply_changelog(
    self: Any, batch: Iterable[Any], to_key: Callable[[Any], bytes], to_value: Callable[[Any], bytes]
) -> None:
    """Apply what a changelog says to a table of bytes, but for values that are older than what is there."""
    _take_in(
        self,
        (
            (to_key(each.key), None if each.message.value is None else to_value(each.value), each.message.partition)
            for each in batch
        ),
    )


def _take_in(store: Any, changes: Iterable[tuple[bytes, bytes | None, int]]) -> None:
    """Apply changes, (key, value, partition), to a table's store; None is a tombstone."""
    is_older = OLDER.get(store.table_name, _never)
    for key, value, partition in changes:
        if value is None:
            store.data.pop(key, None)
            store._key_partition.pop(key, None)  # noqa: SLF001 - as Faust's own store does
            continue
        store._key_partition[key] = partition  # noqa: SLF001 - the same
        held = store.data.get(key)
        if held is not None and is_older(value, held):
            _stale.setdefault(store.table_name, set()).add(key)
        else:
            store.data[key] = value


async def _catch_up(recovery: Any, read: Read, offsets: Any) -> None:
    """Read the changelogs of a recovery to their ends; `offsets`, the last taken in of each, move with it."""
    ends = recovery.active_highwaters
    spans = {place: (offset + 1, ends[place]) for place, offset in offsets.items() if offset < ends.get(place, -1)}

    def apply(place: TopicPartition, records: Any) -> None:
        if place in offsets:  # else it has been taken away meanwhile
            _take_in(recovery.tp_to_table[place].data, ((each.key, each.value, each.partition) for each in records))
            offsets[place] = records[-1].offset

    if spans:
        try:
            await read({TopicPartition(*place): span for place, span in spans.items()}, apply)
        except KafkaError as error:
            _log.warning("changelogs are left to Faust to read: %r", error)


def _never(_value: bytes, _held: bytes) -> bool:
    return False


def take_stale(table: str) -> set[bytes]:
    """Return the keys of which a changelog's last words were found to be older than others, and forget them."""
    return _stale.pop(table, set())


def install(fetch_max_wait_ms: int, listen: Callable[[Any], None] = lambda _: None, read: Read | None = None) -> None:
    """Install the cures; calling it again only changes the fetch wait, who listens to the worker's client, and `read`.

    Without `read` Faust reads the changelogs itself.

    Raises `CureMismatchError` when Faust is not the version they were proved on.
    """
    if recovery_sha256() != RECOVERY_SHA256:
        raise CureMismatchError(
            "Recovery.on_recovery_completed differs from faust-streaming 0.15.3: install that version, "
            "or prove the cure anew (tests/faults) and write down the new hash"
        )

    def consumer_init(self: Any, *topics: str, **options: Any) -> None:
        is_worker = options.get("fetch_max_wait_ms") == FAUST_FETCH_MAX_WAIT_MS
        if is_worker:
            options["fetch_max_wait_ms"] = fetch_max_wait_ms
        _original_consumer_init(self, *topics, **options)
        read_anything(self)
        if is_worker:
            listen(self._client)

    async def build_offsets(self: Any, consumer: Any, tps: Any, offsets: Any, title: str) -> None:
        await _original_build_offsets(self, consumer, tps, offsets, title)
        if title == "active" and read is not None:
            await _catch_up(self, read, offsets)

    Recovery._build_offsets = build_offsets  # type: ignore[method-assign,assignment]  # noqa: SLF001 - the cure itself
    Recovery.on_recovery_completed = _recovery_completed  # type: ignore[method-assign]  # the cure itself
    Consumer.commit = _commit  # type: ignore[method-assign]  # the same
    Consumer.perform_seek = _perform_seek  # type: ignore[method-assign]  # the same
    Store.apply_changelog_batch = _apply_changelog  # type: ignore[method-assign]  # the same
    aiokafka.AIOKafkaConsumer.__init__ = consumer_init
    setattr(GroupCoordinator, _COORDINATION, _coordination)


def uninstall() -> None:
    """Take the cures out, as a test that must fail without them does."""
    Recovery._build_offsets = _original_build_offsets  # type: ignore[method-assign]  # noqa: SLF001 - the same
    Recovery.on_recovery_completed = _original_recovery_completed  # type: ignore[method-assign]  # the same
    Consumer.commit = _original_commit  # type: ignore[method-assign]  # the same
    Consumer.perform_seek = _original_perform_seek  # type: ignore[method-assign]  # the same
    Store.apply_changelog_batch = _original_apply  # type: ignore[method-assign]  # the same
    aiokafka.AIOKafkaConsumer.__init__ = _original_consumer_init
    setattr(GroupCoordinator, _COORDINATION, _original_coordination)
