"""Which heartbeats are signs of life, and which were said before: a recorded one proves nothing about now."""

from datetime import datetime, timedelta
from typing import Final

from spendfuse.wire.control import Heartbeat

EMITTERS_MAX: Final = 1_000
"""Most emitters remembered; the one heard longest ago is forgotten first."""
SPREAD: Final = timedelta(hours=1)
"""How far behind the newest of all heartbeats the first one of an emitter may be: workers' clocks differ by less."""


class Signs:
    """The last heartbeat of each emitter. An emitter's times only grow, whatever becomes of its clock."""

    def __init__(self) -> None:
        self._last: dict[str, datetime] = {}
        self._newest: datetime | None = None

    def is_news(self, heartbeat: Heartbeat) -> bool:
        """Take in a genuine heartbeat; say whether it was not said before."""
        last = self._last.pop(heartbeat.emitter, None)
        self._last[heartbeat.emitter] = heartbeat.ts if last is None else max(last, heartbeat.ts)
        if len(self._last) > EMITTERS_MAX:
            del self._last[next(iter(self._last))]
        # Without a last one it is new, or ended long ago and this guard has never seen its record.
        floor = last if last is not None else self._newest and self._newest - SPREAD
        if floor is not None and heartbeat.ts <= floor:
            return False
        self._newest = heartbeat.ts if self._newest is None else max(self._newest, heartbeat.ts)
        return True
