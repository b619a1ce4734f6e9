"""How far behind its usage a worker decides, and when that is too far: it says so once, and again when it is over.

Lag is measured in time and without anybody's timestamps, which emitters choose: the end of the topic is noted with the
time of this clock, and a stage that has not reached what was the end then is at least so far behind. Of partitions
just assigned nobody knows for how long their records have waited: until what was their end then is reached, the worker
is not current, or one that a broker refuses, started again and again, would be new, and live, each time.
"""

import hashlib
from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from spendfuse.wire.base import from_us
from spendfuse.wire.control import Alert

SECOND_US: Final = 1_000_000
NOTES_MAX: Final = 4_096
"""Most ends remembered of one stage; beyond it the oldest are kept, since they say how far behind it is."""
OVER_PART: Final = 2
"""It is over when the lag is below half of the bound: at the bound itself, a worker would say both in turns."""
SCOPE: Final = "workspace:spendfuse"
"""Alerts need a scope, and lag is nobody's own."""


class Reading(NamedTuple):
    """A stage at an instant: the partitions it owns, what it has done of them and where they end, in records.

    `is_known` is False while the broker has not yet said where they all end.
    """

    partitions: Hashable
    position: int
    end: int
    is_known: bool = True

    @property
    def records(self) -> int:
        """Return how many records wait."""
        return max(0, self.end - self.position)


@dataclass(slots=True)
class _Notes:
    partitions: Hashable = None
    ends: deque[tuple[int, int]] = field(default_factory=deque)
    first_end: int | None = None
    is_current: bool = False

    def lag_us(self, reading: Reading, now_us: int) -> int:
        if reading.partitions != self.partitions:
            self.partitions = reading.partitions
            self.ends.clear()
            self.first_end, self.is_current = None, False
        if self.first_end is None and reading.is_known:
            self.first_end = reading.end
        self.is_current = self.is_current or (self.first_end is not None and reading.position >= self.first_end)
        while self.ends and self.ends[0][1] <= reading.position:
            self.ends.popleft()
        if reading.end > reading.position and len(self.ends) < NOTES_MAX:
            self.ends.append((now_us, reading.end))
        return now_us - self.ends[0][0] if self.ends else 0


@dataclass(slots=True)
class Staleness:
    """Whether decisions are older than a bound; `observe` it regularly."""

    bound_us: int
    stale: bool = False
    lag_us: int = 0
    _notes: dict[str, _Notes] = field(default_factory=dict)

    @property
    def is_current(self) -> bool:
        """Whether every stage has done what lay in its partitions when it was given them."""
        return bool(self._notes) and all(notes.is_current for notes in self._notes.values())

    def observe(self, stages: Mapping[str, Reading], now_us: int) -> bool | None:
        """Return True when it has become stale, False when that is over, None when nothing changed."""
        lags = [self._notes.setdefault(name, _Notes()).lag_us(reading, now_us) for name, reading in stages.items()]
        self.lag_us = max(lags, default=0)
        if not self.stale and self.lag_us > self.bound_us:
            self.stale = True
            return True
        if self.stale and self.lag_us <= self.bound_us // OVER_PART:
            self.stale = False
            return False
        return None


def lag_alert(emitter: str, lag_us: int, records: int, now_us: int, *, over: bool) -> Alert:
    """Return the alert that a worker has fallen behind, or that this is over."""
    name = f"lag\n{emitter}\n{now_us}\n{over}"
    behind = f"{lag_us // SECOND_US} s and {records} records behind its usage"
    return Alert(
        id=hashlib.blake2b(name.encode(), digest_size=16).hexdigest(),
        ts=from_us(now_us),
        kind="lag",
        severity="info" if over else "critical",
        scope=SCOPE,
        message=(
            f"worker {emitter} is live again: {behind}."
            if over
            else f"worker {emitter} is {behind}: its decisions are stale until it has caught up. Start more workers."
        )[:512],
    )
