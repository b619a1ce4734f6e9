"""Rollups: one packed partition's cumulative share of a shared scope."""

from typing import Annotated, Literal

from pydantic import Field

from spendfuse.wire.base import NANOS_MAX, Amount, Offset, Partition, Scope, WireModel
from spendfuse.wire.control import Cause

WindowKey = Annotated[str, Field(max_length=96, pattern=r"^(run|(hour|day|week|month)@[A-Za-z0-9_+/-]+@-?\d+)$")]
Step = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=3, max_length=3)]
Sums = Annotated[list[Annotated[int, Field(ge=-NANOS_MAX)]], Field(min_length=3, max_length=3)]
"""Below zero where a correction took more than was charged in the window."""


class Rollup(WireModel):
    """A partition's totals of a scope as of an offset of `usage.packed.v1` (`rollups.v1`, key = scope).

    Totals are cumulative `[nanos, tokens, calls]`: they replace what the partition said before. Holds are a gauge,
    good until `held_until_us` (the last of their deadlines): a partition that falls silent must not hold for ever.
    `held_steps` says how it falls until then, as `[deadline_us, nanos, tokens]`; absent when it falls at once.
    """

    v: Literal[1] = 1
    scope: Scope
    partition: Partition
    as_of: Offset
    windows: Annotated[dict[WindowKey, Sums], Field(max_length=4_096)]
    rolling: Annotated[dict[int, dict[int, Sums]], Field(max_length=64)] = Field(default_factory=dict)
    held_nanos: Amount = 0
    held_tokens: Amount = 0
    held_until_us: Annotated[int, Field(ge=0)] = 0
    held_steps: Annotated[list[Step], Field(max_length=64)] | None = None
    first_us: int = 0
    newest_us: int = 0
    cause: Cause
