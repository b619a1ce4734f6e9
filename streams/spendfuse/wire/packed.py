"""The intake's output: validated usages with their origin, one agent always on one partition."""

from typing import Annotated, Final, Literal, NamedTuple

from pydantic import Field

from spendfuse.wire.base import Offset, Partition, WireModel
from spendfuse.wire.usage import Usage

PACKED_MAX: Final = 2_000
"""Most usages in one message of `usage.packed.v1`."""
INDEX_BITS: Final = 16


class Origin(NamedTuple):
    """Where a usage came from in `usage.v1`; `nth` counts inside a packed message."""

    partition: int
    offset: int
    nth: int

    @property
    def position(self) -> int:
        """Return offset and nth as one growing integer, the unit of every watermark."""
        return (self.offset << INDEX_BITS) | self.nth


class PackedUsage(WireModel):
    """A usage, and where it came from: partition, offset, index in the message, Kafka timestamp (ms)."""

    p: Partition = Field(description="partition in usage.v1")
    o: Offset = Field(description="offset in that partition")
    i: Annotated[int, Field(ge=0, lt=1 << INDEX_BITS)] = Field(
        default=0, description="place in a packed message, from 0"
    )
    t: Annotated[int, Field(ge=-1)] = Field(
        default=-1, description="Kafka timestamp in ms since the epoch; -1 when unknown"
    )
    u: Usage = Field(description="the usage")

    @property
    def origin(self) -> Origin:
        """Return the origin."""
        return Origin(self.p, self.o, self.i)


class Packed(WireModel):
    """One message of `usage.packed.v1`, in the order of the origin offsets."""

    v: Literal[1] = Field(default=1, description="version of this message")
    usages: Annotated[list[PackedUsage], Field(min_length=1, max_length=PACKED_MAX)] = Field(
        description="usages in the order of their origin offsets"
    )
