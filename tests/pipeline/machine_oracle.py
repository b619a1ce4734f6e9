"""What a sequence of events must lead to, event by event, in plain integers: sums, calls in flight, orders that stand.

It imports nothing of the product, and no time zones: the clocks of Amsterdam move by the European rule, written here.
"""

from __future__ import annotations

import calendar
import time
from collections import defaultdict
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

SECOND_US = 1_000_000
HOUR_S, DAY_S = 3_600, 86_400
GRACE_S = HOUR_S
AGE_MAX_S, AHEAD_MAX_S = 7 * DAY_S, 300
HOLD_S = 600
SLOTS = 60
PRICES = {"claude": (3_000, 15_000), "opus": (15_000, 75_000)}
"""Nano-dollars of a token of input and of output."""
ZONES = {"acme": "Europe/Amsterdam", "other": "UTC"}


class Window(NamedTuple):
    """A window's key, and its bounds in seconds."""

    key: str
    start_s: int
    end_s: float


RUN = Window("run", 0, float("inf"))


def utc(text: str) -> int:
    """Return the seconds of an instant written as 2026-03-29T01:00."""
    return calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M"))


def offset_s(zone: str, second: int) -> int:
    """Return how far a zone's clock is ahead of UTC."""
    if zone == "UTC":
        return 0
    year = time.gmtime(second).tm_year
    summer = _last_sunday(year, 3) + HOUR_S <= second < _last_sunday(year, 10) + HOUR_S
    return 2 * HOUR_S if summer else HOUR_S


def _last_sunday(year: int, month: int) -> int:
    last = calendar.timegm((year, month, 31, 0, 0, 0))
    return last - (time.gmtime(last).tm_wday + 1) % 7 * DAY_S


def window(kind: str, zone: str, second: int) -> Window:
    """Return the hour, day or month of an instant."""
    ahead = offset_s(zone, second)
    local = second + ahead
    if kind == "hour":
        start = local // HOUR_S * HOUR_S - ahead
        return Window(f"hour@{zone}@{start}", start, start + HOUR_S)
    date = time.gmtime(local)
    if kind == "day":
        first, after = local // DAY_S * DAY_S, local // DAY_S * DAY_S + DAY_S
    else:
        first = calendar.timegm((date.tm_year, date.tm_mon, 1, 0, 0, 0))
        after = calendar.timegm((date.tm_year + date.tm_mon // 12, date.tm_mon % 12 + 1, 1, 0, 0, 0))
    start, end = (_at_midnight(zone, midnight) for midnight in (first, after))
    return Window(f"{kind}@{zone}@{start}", start, end)


def _at_midnight(zone: str, local: int) -> int:
    return next(local - ahead for ahead in (0, HOUR_S, 2 * HOUR_S) if offset_s(zone, local - ahead) == ahead)


@dataclass
class Line:
    """One budget with one cap; `window` is a kind, or the length of a rolling window in seconds."""

    name: str
    scope: str
    unit: str
    window: str | int
    amount: int = 0
    shadow: bool = False
    in_force: bool = False

    def applies(self, scope: str) -> bool:
        """Say whether the budget speaks to a scope."""
        return self.in_force and fnmatchcase(scope, self.scope) and scope.count("/") == self.scope.count("/")

    def of(self, sums: list[int]) -> int:
        """Return what counts of [nanos, tokens, ...]."""
        return sums[1] if self.unit == "tokens" else sums[0]


class Hold(NamedTuple):
    """A call in flight."""

    nanos: int
    tokens: int
    deadline_us: int


@dataclass
class Oracle:
    """Fed with each usage once, in its order, at the clock of that moment."""

    now_us: int
    lines: dict[str, Line]
    sums: dict[str, dict[str, list[int]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(lambda: [0, 0, 0]))
    )
    slots: dict[str, dict[int, list[int]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(lambda: [0, 0]))
    )
    ends: dict[str, float] = field(default_factory=dict)
    holds: dict[str, dict[tuple[str, str], Hold]] = field(default_factory=lambda: defaultdict(dict))
    touched_us: dict[str, int] = field(default_factory=dict)
    charged: dict[tuple[str, str], bool] = field(default_factory=dict)
    corrected: set[tuple[str, str]] = field(default_factory=set)
    fixes: set[tuple[str, str]] = field(default_factory=set)
    duplicates: int = 0
    dead: int = 0

    def correct(self, fix: dict[str, Any], ts_us: int) -> None:
        """Add a correction's differences to the windows of its usage that are open; of an agent's id only once."""
        path = f"{fix['workspace']}/{fix['team']}/{fix['agent']}"
        if (path, fix["id"]) in self.fixes:
            self.dead += 1
            return
        self.fixes.add((path, fix["id"]))
        tokens = fix["tokens"].get("input", 0) + fix["tokens"].get("output", 0)
        for scope in scopes(fix):
            self.touched_us[scope] = self.now_us
            self._add(scope, fix["workspace"], ts_us, fix["cost_nanos"], tokens, calls=0)
            self.corrected |= {(scope, key) for key in self.sums[scope]}

    def take(self, usage: dict[str, Any], ts_us: int, deadline_us: int | None) -> None:
        """Count one usage, whatever it is: `ts_us` and `deadline_us` are its times."""
        age_us = self.now_us - ts_us
        if age_us > AGE_MAX_S * SECOND_US or -age_us > AHEAD_MAX_S * SECOND_US:
            self.dead += 1
            return
        path = f"{usage['workspace']}/{usage['team']}/{usage['agent']}"
        call = (path, usage["id"])
        finished = usage["kind"] == "finished"
        if call in self.charged:
            self.duplicates += finished
            return
        rates = PRICES[usage["model"]]
        tokens = usage["tokens"]["input"] + usage["tokens"]["output"]
        nanos = usage["tokens"]["input"] * rates[0] + usage["tokens"]["output"] * rates[1]
        late = False
        for scope in scopes(usage):
            self.touched_us[scope] = self.now_us
            if finished:
                self.holds[scope].pop(call, None)
                late |= self._add(scope, usage["workspace"], ts_us, nanos, tokens)
            else:
                self._hold(scope, call, nanos, tokens, deadline_us)
        if finished:
            self.charged[call] = late

    def _add(self, scope: str, workspace: str, ts_us: int, nanos: int, tokens: int, calls: int = 1) -> bool:
        late = False
        found = [window(kind, ZONES[workspace], ts_us // SECOND_US) for kind in ("hour", "day", "month")]
        for each in [*found, RUN] if scope.startswith("run:") else found:
            self.ends[each.key] = each.end_s
            if (each.end_s + GRACE_S) * SECOND_US <= self.now_us:
                late = True
                continue
            sums = self.sums[scope][each.key]
            sums[0] += nanos
            sums[1] += tokens
            sums[2] += calls
        for rolling_s in {line.window for line in self.lines.values() if isinstance(line.window, int)}:
            slot_us = rolling_s * SECOND_US // SLOTS
            if ts_us // slot_us >= self.now_us // slot_us - SLOTS:
                slot = self.slots[scope][ts_us // slot_us]
                slot[0] += nanos
                slot[1] += tokens
        return late

    def _hold(self, scope: str, call: tuple[str, str], nanos: int, tokens: int, deadline_us: int | None) -> None:
        until_us = self.now_us + HOLD_S * SECOND_US if deadline_us is None else deadline_us
        until_us = min(until_us, self.now_us + DAY_S * SECOND_US)
        known = self.holds[scope].get(call)
        if known is not None and known.deadline_us > self.now_us:
            until_us = known.deadline_us if deadline_us is None else max(until_us, known.deadline_us)
            nanos, tokens = max(nanos, known.nanos), max(tokens, known.tokens)
        self.holds[scope][call] = Hold(nanos, tokens, until_us)

    def held(self, scope: str) -> list[int]:
        """Return [nanos, tokens] of a scope's calls in flight."""
        alive = [hold for hold in self.holds[scope].values() if hold.deadline_us > self.now_us]
        return [sum(hold.nanos for hold in alive), sum(hold.tokens for hold in alive)]

    def stands(self, line: Line, scope: str) -> bool | None:
        """Say whether a halt must stand; None where calls in flight alone ask for it and nobody has spoken since."""
        if not line.applies(scope) or line.shadow or scope not in self.touched_us:
            return False
        if isinstance(line.window, int):
            oldest = self.now_us // (line.window * SECOND_US // SLOTS) - SLOTS
            return sum(line.of(sums) for slot, sums in self.slots[scope].items() if slot >= oldest) >= line.amount
        running = {
            key: line.of(sums)
            for key, sums in self.sums[scope].items()
            if key.partition("@")[0] == line.window and self.ends[key] * SECOND_US > self.now_us
        }
        spent = max((0, *running.values()))
        held = line.of(self.held(scope))
        if spent >= line.amount:
            return True
        if spent + held < line.amount:
            return False
        zone = ZONES[scope.partition(":")[2].partition("/")[0]]
        here = RUN if line.window == "run" else window(line.window, zone, self.now_us // SECOND_US)
        spoken = self.touched_us[scope] >= here.start_s * SECOND_US
        return True if spoken and max(running.get(here.key, 0), 0) + held >= line.amount else None

    def due(self, kind: str = "") -> dict[str, bool | None]:
        """Return `stands` of each `scope|budget`, of one kind of scope or of all."""
        return {
            f"{scope}|{line.name}": self.stands(line, scope)
            for scope in self.touched_us
            if scope.startswith(kind)
            for line in self.lines.values()
        }


def scopes(usage: dict[str, Any]) -> list[str]:
    """Return whose money a usage is."""
    space, team = usage["workspace"], usage["team"]
    return [
        f"agent:{space}/{team}/{usage['agent']}",
        f"team:{space}/{team}",
        f"workspace:{space}",
        f"run:{space}/{usage['run']}",
    ]
