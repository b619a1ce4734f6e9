"""The state of a scope: what it spent, how far each source was read, and its fuses."""

from dataclasses import dataclass, field
from typing import Final, NamedTuple

from spendfuse.engine.spend import Spend

NOTED_MAX: Final = 256
"""Most unknown models that one agent's state remembers having reported."""


class Fired(NamedTuple):
    """The highest threshold that fired in one window (1/10,000 of the cap), until when it stands, and what was ordered.

    `order` is the action, with a digest of what degrading means; `shadow ...` when it was decided and not sent. `held`
    says that spend alone was below the threshold: calls in flight tripped it, and their end may rearm it.
    """

    fraction: int
    until_us: int
    order: str = ""
    held: bool = False


@dataclass(slots=True)
class Fuse:
    """One cap of one scope: the sequence of its last command, and what fired by window key."""

    seq: int = 0
    fired: dict[str, Fired] = field(default_factory=dict)


@dataclass(slots=True)
class ScopeState:
    """A scope on one packed partition: sums and watermarks under one key, so that they are durable together.

    `marks` holds, for each partition of `usage.v1`, the position up to which its usage is in the sums.
    """

    marks: dict[int, int] = field(default_factory=dict)
    spend: Spend = field(default_factory=Spend)
    fuses: dict[str, Fuse] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Part:
    """One packed partition's share of a shared scope, as of an offset of `usage.packed.v1`.

    Its holds count until `held_until_us`; 0 when that is not known.
    """

    as_of: int
    spend: Spend
    held_nanos: int = 0
    held_tokens: int = 0
    held_until_us: int = 0


@dataclass(slots=True)
class SharedState:
    """A team, workspace or run tree: each partition's cumulative share, overwritten and never added."""

    parts: dict[int, Part] = field(default_factory=dict)
    fuses: dict[str, Fuse] = field(default_factory=dict)

    def held_until_us(self, now_us: int) -> int | None:
        """Return when calls in flight of some partition next run out, None when none are held."""
        return min((part.held_until_us for part in self.parts.values() if part.held_until_us > now_us), default=None)
