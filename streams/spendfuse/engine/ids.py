"""Usage ids remembered with their origin: the same id from the same place is a replay, from another a duplicate.

The memory is a ring of slots for each packed partition: bounded, and written a slot at a time. The horizon is at
least `(SLOTS - 1) * IDS_PER_SLOT` ids of a partition.
"""

import hashlib
import struct
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from spendfuse.wire.packed import INDEX_BITS

DIGEST_BYTES: Final = 12
SLOTS: Final = 256
IDS_PER_SLOT: Final = 1_024
FORMER: Final = (65_535, 0)
"""The origin of ids taken over from another Kafka: a partition that `usage.v1` cannot have (a deployment has at most
1,000), so that whatever comes under such an id is a duplicate, and never passes for a replay."""
_RECORD: Final = struct.Struct(f">{DIGEST_BYTES}sHQ")
_HEADER: Final = struct.Struct(">Q")

Verdict = Literal["new", "replay", "duplicate"]


def call_digest(path: str, call_id: str, kind: str) -> bytes:
    """Return the digest of a call id within an agent's path, and of the kind: each kind of a call has its own."""
    return hashlib.blake2b(f"{path}\n{call_id}\n{kind}".encode(), digest_size=DIGEST_BYTES).digest()


class Placed(Protocol):
    """What came from a place in `usage.v1`: an `Origin`, or a call."""

    @property
    def partition(self) -> int: ...  # noqa: D102 - as in Origin
    @property
    def position(self) -> int: ...  # noqa: D102 - as in Origin


@dataclass(slots=True)
class SeenIds:
    """The ids one packed partition has seen, newest `SLOTS * IDS_PER_SLOT` at the most."""

    origins: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    slots: dict[int, list[bytes]] = field(default_factory=dict)
    sequence: int = 0
    dirty: set[int] = field(default_factory=set)

    def judge(self, digest: bytes, origin: Placed) -> Verdict:
        """Return whether a usage is new, seen from this very place, or seen from another."""
        known = self.origins.get(digest)
        if known is None:
            return "new"
        return "replay" if known == (origin.partition, origin.position) else "duplicate"

    def remember(self, digest: bytes, origin: Placed) -> None:
        """Remember a new id; the oldest slot is forgotten when the ring is full."""
        self._keep(digest, (origin.partition, origin.position))

    def take_over(self, digest: bytes) -> None:
        """Remember an id that was charged from another Kafka: it is charged no more, wherever it comes from."""
        self._keep(digest, FORMER)

    def _keep(self, digest: bytes, origin: tuple[int, int]) -> None:
        slot = self.slots.setdefault(self.sequence, [])
        if len(slot) >= IDS_PER_SLOT:
            self.sequence += 1
            self._forget_stale()
            slot = self.slots.setdefault(self.sequence, [])
        slot.append(digest)
        self.origins[digest] = origin
        self.dirty.add(self.sequence)

    def _forget_stale(self) -> None:
        # All of them, not only the one whose place is taken: after a crash a place may hold a slot of the last round.
        for sequence in [sequence for sequence in self.slots if sequence <= self.sequence - SLOTS]:
            for digest in self.slots.pop(sequence):
                self.origins.pop(digest, None)
            self.dirty.discard(sequence)

    def reached(self) -> dict[int, int]:
        """Return, for each partition of `usage.v1` that ids are remembered of, the last offset."""
        last: dict[int, int] = {}
        for partition, position in self.origins.values():
            last[partition] = max(last.get(partition, 0), position)
        last.pop(FORMER[0], None)
        return {partition: position >> INDEX_BITS for partition, position in last.items()}

    def take_dirty(self) -> dict[int, bytes]:
        """Return the slots that changed, by their place in the ring, encoded; they count as written from now on."""
        written = {sequence % SLOTS: self._encode(sequence) for sequence in sorted(self.dirty)}
        self.dirty.clear()
        return written

    def _encode(self, sequence: int) -> bytes:
        records = [_HEADER.pack(sequence)]
        records += [_RECORD.pack(digest, *self.origins[digest]) for digest in self.slots[sequence]]
        return b"".join(records)

    def restore(self, value: bytes) -> None:
        """Take in one slot as `take_dirty` wrote it.

        Raises `ValueError` when the bytes are not such a slot.
        """
        if len(value) < _HEADER.size or (len(value) - _HEADER.size) % _RECORD.size:
            raise ValueError(f"a slot of remembered ids has {len(value)} bytes, which is no whole number of records")
        (sequence,) = _HEADER.unpack_from(value)
        if sequence <= self.sequence - SLOTS:
            return
        self.sequence = max(self.sequence, sequence)
        self._forget_stale()
        slot: list[bytes] = []
        for digest, partition, position in _RECORD.iter_unpack(value[_HEADER.size :]):
            slot.append(digest)
            self.origins[digest] = (partition, position)
        self.slots[sequence] = slot
