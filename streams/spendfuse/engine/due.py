"""Which names must be looked at again, and when: a heap with one entry that counts for each name."""

from heapq import heappop, heappush
from typing import Final

STALE_MAX: Final = 1_000
"""Most entries of the heap, beside as many again as there are names, that an earlier instant has outdated."""


class Due:
    """Names with the instant (microseconds) at which something about them changes by itself."""

    def __init__(self) -> None:
        self._at: dict[str, int] = {}
        self._heap: list[tuple[int, str]] = []

    def watch(self, name: str, at_us: int) -> None:
        """Have a name looked at at an instant, unless it is to be earlier."""
        known = self._at.get(name)
        if known is None or at_us < known:
            self._at[name] = at_us
            heappush(self._heap, (at_us, name))
            if len(self._heap) > 2 * len(self._at) + STALE_MAX:
                self._heap = sorted((at, watched) for watched, at in self._at.items())

    def take(self, now_us: int) -> list[str]:
        """Return the names whose instant has come, and forget them."""
        found = []
        while self._heap and self._heap[0][0] <= now_us:
            at_us, name = heappop(self._heap)
            if self._at.get(name) == at_us:
                del self._at[name]
                found.append(name)
        return found

    def __len__(self) -> int:
        return len(self._at)
