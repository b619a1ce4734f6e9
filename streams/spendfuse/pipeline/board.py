"""Which scopes' remaining is to be published: those touched, each at most so often, and so many at a time."""

from typing import Final

from spendfuse.wire.base import from_us
from spendfuse.wire.remaining import Remaining

INTERVAL_US: Final = 250_000
"""Least time between two publications of one scope: a guard adds its own calls meanwhile."""
SCOPES_PER_FLUSH_MAX: Final = 100
"""Most scopes published at one flush: a signature costs 40 microseconds, and commands must not wait for many."""
PUBLISHED_MAX: Final = 50_000
"""Most scopes whose last publication is remembered; what is forgotten may be published earlier than its interval."""

Name = tuple[int, str]
"""A partition and a scope."""


class Board:
    """What guards are told of what is left; the one touched longest ago comes first."""

    def __init__(self) -> None:
        self._waiting: dict[Name, None] = {}
        self._published: dict[Name, tuple[int, dict[str, Remaining]]] = {}

    def touch(self, name: Name) -> None:
        """Note that what is left of a scope's caps may have changed."""
        self._waiting.setdefault(name)

    def knows(self, name: Name) -> bool:
        """Say whether something about a scope was published."""
        return name in self._published

    def take(self, now_us: int) -> list[Name]:
        """Return the scopes to publish now."""
        found: list[Name] = []
        for name in self._waiting:
            at_us = self._published[name][0] if name in self._published else -INTERVAL_US
            if not 0 <= now_us - at_us < INTERVAL_US:
                found.append(name)
                if len(found) == SCOPES_PER_FLUSH_MAX:
                    break
        for name in found:
            del self._waiting[name]
        return found

    def publish(self, name: Name, left: list[Remaining], now_us: int) -> list[Remaining]:
        """Return what to say of a scope: what is left, and which caps told of before are no longer in force."""
        _, before = self._published.pop(name, (0, {}))
        told = {each.key: each for each in left}
        gone = [
            each.model_copy(update={"withdrawn": True, "at": from_us(now_us)})
            for key, each in before.items()
            if key not in told
        ]
        if told:
            if len(self._published) >= PUBLISHED_MAX:
                del self._published[next(iter(self._published))]
            self._published[name] = (now_us, told)
        return left + gone
