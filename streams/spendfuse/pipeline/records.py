"""A record as the stages see it, whatever carried it: Kafka, or the test driver."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, Protocol

Headers = Sequence[tuple[str, bytes]]
Delivery = Awaitable[Any]
"""Done when the broker has the record on all its replicas; failed when it never will."""


class SourceRecord(NamedTuple):
    """One record of a topic; `ack` says that all it led to is durable."""

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    ack: Callable[[], object] = lambda: None
    headers: Headers = ()


class Outbox(Protocol):
    """Where stages put what they publish. Records of one partition are delivered in the order they were put."""

    async def put(
        self,
        topic: str,
        *,
        key: bytes,
        value: bytes | None,
        partition: int | None = None,
        headers: Headers = (),
    ) -> Delivery:
        """Hand over a record and return at once with its delivery."""
        ...


class Table(Protocol):
    """Keyed state with a changelog: a dict in memory, and writes that are durable when awaited."""

    def get(self, key: bytes) -> bytes | None:
        """Return the value of a key."""
        ...

    def keys(self) -> Sequence[bytes]:
        """Return the keys held now, of every partition."""
        ...

    def write(self, partition: int, key: bytes, value: bytes) -> Delivery:
        """Set a key and return the delivery of its changelog record."""
        ...

    def delete(self, partition: int, key: bytes) -> Delivery:
        """Forget a key and return the delivery of the tombstone that says so in the changelog."""
        ...

    def heal(self, owned: set[int]) -> list[Delivery]:
        """Write again what a recovery found overwritten by an older value, on the partitions owned."""
        ...
