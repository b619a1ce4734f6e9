"""Whether this process was frozen so long that what it knows is no longer its own to write."""

import time
from collections.abc import Callable


class Awake:
    """Knows whether this process was frozen (SIGSTOP, a paused machine) for so long that others own its partitions.

    Such a process does not know it yet, and would write older states after the new owner's: it must end instead.
    """

    def __init__(self, bound_s: float, on_frozen: Callable[[float], None]) -> None:
        """Take the longest pause between two ticks, in seconds, and what ends the process."""
        self._bound_s = bound_s
        self._on_frozen = on_frozen
        self._ticked_at: float | None = None

    def tick(self) -> None:
        """Say that the loop runs; call it far more often than the bound."""
        self.check()
        self._ticked_at = time.monotonic()

    def check(self) -> None:
        """Call `on_frozen` with the seconds since the last tick when these are too many."""
        if self._ticked_at is not None and time.monotonic() - self._ticked_at > self._bound_s:
            self._on_frozen(time.monotonic() - self._ticked_at)
