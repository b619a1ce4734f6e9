"""The clocks: the machine's own, and one that runs faster from a start (demos and replays)."""

import time
from collections.abc import Callable
from typing import Final

Clock = Callable[[], int]
"""Returns the present event time in microseconds since the epoch."""

SCALED: Final = "scaled:"
CLOCK_SLACK_US: Final = 5_000_000
"""How far a clock may be ahead of the workers' before it is not believed: a heartbeat may be that long on its way."""
FACTOR_MAX: Final = 1_000_000
"""Fastest clock: a million event seconds in one of the machine's."""


def wall_clock() -> int:
    """Return the machine's time in microseconds since the epoch."""
    return time.time_ns() // 1_000


class ScaledClock:
    """A clock that read `event_start_us` at the wall time `wall_start_us`, and runs `factor` times as fast.

    All processes of one machine that are given the same three numbers read the same time. Each anchors the wall
    clock once, when it makes its clock, and counts on with the monotonic one: a step of the wall clock (NTP, a
    laptop's sleep) would otherwise be multiplied by the factor, or run event time backwards.
    Raises ValueError for a factor outside 1..1,000,000.
    """

    __slots__ = ("_anchor_us", "_event_start_us", "_wall_start_us", "factor")

    def __init__(self, wall_start_us: int, event_start_us: int, factor: int) -> None:
        if not 1 <= factor <= FACTOR_MAX:
            raise ValueError(f"a clock's factor is 1 to {FACTOR_MAX:,}, not {factor}")
        self.factor = factor
        self._wall_start_us = wall_start_us
        self._event_start_us = event_start_us
        self._anchor_us = (time.time_ns() - time.monotonic_ns()) // 1_000

    def __call__(self) -> int:
        """Return the present event time in microseconds since the epoch."""
        wall_us = self._anchor_us + time.monotonic_ns() // 1_000
        return self._event_start_us + (wall_us - self._wall_start_us) * self.factor

    def wall_us(self, event_us: int) -> int:
        """Return the first wall time, in microseconds, at which this clock shows `event_us` or later."""
        return self._wall_start_us - (self._event_start_us - event_us) // self.factor

    def __repr__(self) -> str:
        return f"ScaledClock({self._wall_start_us}, {self._event_start_us}, {self.factor})"


class TrustedTime:
    """The time by which a halt may lapse: a clock that was set forward must not end one early.

    A clock is checked against the workers' (their heartbeats say what it is there), counted on by the monotonic
    clock; without any, against itself at the start. Where they differ by more than a heartbeat's way explains, the
    earlier time counts: a halt may last too long then, never too short.
    """

    __slots__ = ("_anchor_ns", "_anchor_us", "_clock", "_factor")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._factor = getattr(clock, "factor", 1)
        self._anchor_us = clock()
        self._anchor_ns = time.monotonic_ns()

    def hear(self, worker_us: int) -> None:
        """Take in what a worker's clock says now, in microseconds since the epoch."""
        self._anchor_us = worker_us
        self._anchor_ns = time.monotonic_ns()

    def now_us(self) -> int:
        """Return the time in microseconds since the epoch."""
        said_us = self._clock()
        elapsed_us = (time.monotonic_ns() - self._anchor_ns) // 1_000
        counted_us = self._anchor_us + elapsed_us * self._factor
        return said_us if said_us - counted_us <= CLOCK_SLACK_US * self._factor else counted_us


def parse_clock(text: str) -> Clock:
    """Return the clock a setting names: `wall`, or `scaled:<wall start us>:<event start us>:<factor>`.

    Raises ValueError for anything else.
    """
    if text == "wall":
        return wall_clock
    if text.startswith(SCALED):
        parts = text.removeprefix(SCALED).split(":")
        if len(parts) == 3 and all(part.isascii() and part.isdigit() for part in parts):  # noqa: PLR2004 - the form
            return ScaledClock(*(int(part) for part in parts))
    raise ValueError(f"unknown clock {text!r}: use wall, or scaled:<wall start us>:<event start us>:<factor>")
