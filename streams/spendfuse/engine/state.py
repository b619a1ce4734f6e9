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


class Applied(NamedTuple):
    """Where in `usage.v1` a correction lies that was applied, and when it was stated (microseconds)."""

    partition: int
    position: int
    at_us: int


@dataclass(slots=True)
class Fuse:
    """One cap of one scope: the sequence of its last command, and what fired by window key."""

    seq: int = 0
    fired: dict[str, Fired] = field(default_factory=dict)


@dataclass(slots=True)
class ScopeState:
    """A scope on one packed partition: sums and watermarks under one key, so that they are durable together.

    `marks` holds, for each partition of `usage.v1`, the position up to which its usage is in the sums. `corrected` are
    the corrections of an agent by their id.
    """

    marks: dict[int, int] = field(default_factory=dict)
    spend: Spend = field(default_factory=Spend)
    fuses: dict[str, Fuse] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    corrected: dict[str, Applied] = field(default_factory=dict)


@dataclass(slots=True)
class Part:
    """One packed partition's share of a shared scope, as of an offset of `usage.packed.v1`.

    Its holds count until `held_until_us`; 0 when that is not known. `held_steps` are [deadline, nanos, tokens] of them,
    so that each ends in time, also when the partition's meter has forgotten to say so.
    """

    as_of: int
    spend: Spend
    held_nanos: int = 0
    held_tokens: int = 0
    held_until_us: int = 0
    held_steps: list[list[int]] = field(default_factory=list)

    def held(self, now_us: int) -> tuple[int, int]:
        """Return (nanos, tokens) of the calls in flight that have not passed their deadlines."""
        if self.held_steps:
            alive = [step for step in self.held_steps if step[0] > now_us]
            return sum(step[1] for step in alive), sum(step[2] for step in alive)
        gone = self.held_until_us and self.held_until_us <= now_us
        return (0, 0) if gone else (self.held_nanos, self.held_tokens)

    def deadlines_us(self) -> list[int]:
        """Return when some of the calls in flight run out, in microseconds since the epoch."""
        return [step[0] for step in self.held_steps] or [self.held_until_us]


@dataclass(slots=True)
class SharedState:
    """A team, workspace or run tree: each partition's cumulative share, overwritten and never added."""

    parts: dict[int, Part] = field(default_factory=dict)
    fuses: dict[str, Fuse] = field(default_factory=dict)

    def held_until_us(self, now_us: int) -> int | None:
        """Return when calls in flight of some partition next run out, None when none are held."""
        deadlines = (until_us for part in self.parts.values() for until_us in part.deadlines_us())
        return min((until_us for until_us in deadlines if until_us > now_us), default=None)
