"""Which keys of a table are looked at for idleness: a few at each flush, each of them once an interval."""

from collections.abc import Callable, Sequence
from typing import Final

from spendfuse.pipeline.routing import split_state_key

KEYS_MAX: Final = 50
"""Most keys looked at at one flush: half a millisecond, and 100,000 keys in under ten minutes."""
INTERVAL_US: Final = 3_600_000_000


class Sweep:
    """Goes through the keys that a table had when it began, and rests until the interval is over."""

    def __init__(self, keys: Callable[[], Sequence[bytes]]) -> None:
        """Take what lists a table's keys."""
        self._keys = keys
        self._left: list[bytes] = []
        self._begun_us = -INTERVAL_US

    def take(self, now_us: int) -> list[tuple[int, str]]:
        """Return the (partition, name) to look at now."""
        if not self._left and now_us - self._begun_us >= INTERVAL_US:
            self._begun_us = now_us
            self._left = list(self._keys())
        taken = [split_state_key(key) for key in self._left[-KEYS_MAX:]]
        del self._left[-KEYS_MAX:]
        return taken
