"""A Faust table as the stages see it."""

import asyncio
from typing import Any

from spendfuse.pipeline import faust_cures
from spendfuse.pipeline.awake import Awake
from spendfuse.pipeline.outbox import KafkaOutbox
from spendfuse.pipeline.records import Delivery
from spendfuse.pipeline.routing import split_state_key


class FaustTable:
    """A plain Faust table as the stages use it; its changelog records go out by the worker's own producer.

    Faust's producer costs five times as much for a record, and its `flush` is no barrier; recovery reads the topic,
    whoever wrote it.
    """

    def __init__(self, table: Any, outbox: KafkaOutbox, awake: Awake) -> None:
        """Wrap a table of bytes to bytes."""
        self._awake = awake
        self._table = table
        self._outbox = outbox
        self._topic: str = table.changelog_topic.get_topic_name()
        self._waiting: dict[int, tuple[list[tuple[bytes, bytes | None]], asyncio.Task[None]]] = {}

    def get(self, key: bytes) -> bytes | None:
        """Return the value of a key."""
        value: bytes | None = self._table.data.get(key)
        return value

    def keys(self) -> list[bytes]:
        """Return the keys held, of every partition."""
        return list(self._table.data.keys())

    def write(self, partition: int, key: bytes, value: bytes) -> Delivery:
        """Set a key, and send its changelog record, unless the process was frozen: then it ends."""
        self._awake.check()
        self._table.data[key] = value
        return self._change(partition, key, value)

    def delete(self, partition: int, key: bytes) -> Delivery:
        """Forget a key, and send its tombstone; as `write`, not of a process that was frozen."""
        self._awake.check()
        data = self._table.data
        data.pop(key, None)
        data._key_partition.pop(key, None)  # noqa: SLF001 - of a recovered key the store would keep this for ever
        return self._change(partition, key, None)

    def heal(self, owned: set[int]) -> list[Delivery]:
        """Write again what a recovery preferred to a changelog's last words, on the partitions owned."""
        held = [(key, self.get(key)) for key in faust_cures.take_stale(self._table.name)]
        known = [(split_state_key(key)[0], key, value) for key, value in held if value is not None]
        return [self.write(partition, key, value) for partition, key, value in known if partition in owned]

    def _change(self, partition: int, key: bytes, value: bytes | None) -> Delivery:
        """Return the delivery of all that changes on a partition before the loop next turns: it leaves together."""
        waiting = self._waiting.get(partition)
        if waiting is None:
            changes: list[tuple[bytes, bytes | None]] = []
            waiting = self._waiting[partition] = changes, asyncio.ensure_future(self._send(partition, changes))
        waiting[0].append((key, value))
        return waiting[1]

    async def _send(self, partition: int, changes: list[tuple[bytes, bytes | None]]) -> None:
        del self._waiting[partition]
        await self._outbox.put_all(self._topic, partition, changes)
