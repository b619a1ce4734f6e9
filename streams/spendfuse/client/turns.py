"""Taking turns for the last of a cap. Pure: times and dice are arguments.

Near a cap several processes find room for the same call at the same time, and none can know of the others before all
have announced theirs. Then each gives way. Trying again at once they would meet again, and what is left would stay
unused: so each waits a random time, longer after each loss in a row, as stations on a shared cable do.
"""

from typing import Final

WAIT_S_MIN: Final = 0.5
"""The most a process waits after its first loss: about as long as an announcement needs to be heard by all."""
WAIT_S_MAX: Final = 2.0


class Turns:
    """One process's turns."""

    def __init__(self) -> None:
        self._losses = 0
        self._again_at = float("-inf")

    def lost(self, now: float, dice: float) -> None:
        """Note that a call gave way to others' at `now` (seconds); `dice` is from 0 to 1."""
        self._again_at = now + dice * min(WAIT_S_MIN * 2**self._losses, WAIT_S_MAX)
        self._losses = min(self._losses + 1, 10)

    def won(self) -> None:
        """Note that a call went through."""
        self._losses = 0

    def must_wait(self, now: float) -> bool:
        """Say whether it is too early for another call that needs much of what is left."""
        return now < self._again_at
