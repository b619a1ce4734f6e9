"""What a scope has spent: sums by window, and the holds of calls in flight.

Totals are lists of three integers, `[nanos, tokens, calls]`: they are added to at every usage.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from spendfuse.engine.windows import (
    QUARTER_US,
    RUN_KEY,
    RUN_WINDOW,
    calendar_windows,
    oldest_slot,
    slot_of,
    slot_us,
    window_of_key,
)
from spendfuse.wire.base import NANOS_MAX

NANOS: Final = 0
TOKENS: Final = 1
CALLS: Final = 2
Totals = list[int]
HELD_STEPS_MAX: Final = 64
"""Most deadlines that a share tells of its calls in flight; beyond it, neighbours take the later one's."""
HOLDS_MAX: Final = 10_000
"""Most calls in flight that one scope remembers on one partition; the next ones are charged, not held."""


class Plan(NamedTuple):
    """Which windows a scope keeps: (kind, zone) pairs, rolling lengths in seconds, and whether it is a run."""

    calendar: tuple[tuple[str, str], ...]
    rolling: tuple[int, ...]
    is_run: bool
    grace_us: int


class Hold(NamedTuple):
    """The most a call in flight may use, until its deadline (microseconds since the epoch)."""

    nanos: int
    tokens: int
    deadline_us: int


@dataclass(slots=True)
class Spend:
    """Sums of one scope; `first_us` and `newest_us` bound the event times seen."""

    windows: dict[str, Totals] = field(default_factory=dict)
    rolling: dict[int, dict[int, Totals]] = field(default_factory=dict)
    holds: dict[str, Hold] = field(default_factory=dict)
    first_us: int = 0
    newest_us: int = 0
    summed: dict[int, tuple[int, Totals]] = field(default_factory=dict, compare=False, repr=False)
    """Of each rolling length the sum from its oldest slot on, as last asked for and kept up since; never stored."""

    def add(self, plan: Plan, ts_us: int, now_us: int, nanos: int, tokens: int) -> bool:
        """Add one charge to every window of its event time; say whether one was missed because it had closed."""
        self._add_to_windows(plan, ts_us, now_us, nanos, tokens, 1)
        for rolling_s in plan.rolling:
            self._add_to_slot(rolling_s, slot_of(rolling_s, ts_us), now_us, nanos, tokens, 1)
        self._saw(ts_us, ts_us)
        return misses(plan, ts_us, now_us)

    def add_all(self, plan: Plan, charges: Sequence[tuple[int, int, int]], now_us: int) -> None:
        """Add many charges, each (event time in microseconds, nanos, tokens), as `add` would one by one."""
        for quarter, sums in _sums_by(charges, QUARTER_US):
            self._add_to_windows(plan, quarter * QUARTER_US, now_us, *sums)
        for rolling_s in plan.rolling:
            for slot, sums in _sums_by(charges, slot_us(rolling_s)):
                self._add_to_slot(rolling_s, slot, now_us, *sums)
        if charges:
            self._saw(min(charges)[0], max(charges)[0])

    def correct(self, plan: Plan, ts_us: int, at_us: int, now_us: int, nanos: int, tokens: int) -> None:
        """Add a signed difference to every open window of an event time; no call is counted.

        `at_us` is when it was stated: a scope that is corrected is in use, however old the usage is.
        """
        self._add_to_windows(plan, ts_us, now_us, nanos, tokens, 0)
        for rolling_s in plan.rolling:
            self._add_to_slot(rolling_s, slot_of(rolling_s, ts_us), now_us, nanos, tokens, 0)
        self._saw(at_us, at_us)

    def is_below_zero(self) -> bool:
        """Say whether corrections took more from some window than was charged in it."""
        return any(totals[NANOS] < 0 or totals[TOKENS] < 0 for totals in self.windows.values())

    def _saw(self, first_us: int, last_us: int) -> None:
        if not self.first_us or first_us < self.first_us:
            self.first_us = first_us
        self.newest_us = max(self.newest_us, last_us)

    def _add_to_windows(self, plan: Plan, ts_us: int, now_us: int, nanos: int, tokens: int, calls: int) -> None:
        windows, first_end_us = calendar_windows(plan.calendar, ts_us)
        closed_us = now_us - plan.grace_us
        if first_end_us <= closed_us:
            windows = tuple(window for window in windows if window.end_us > closed_us)
        if plan.is_run:
            windows = (*windows, RUN_WINDOW)
        for window in windows:
            totals = self.windows.get(window.key)
            if totals is None:
                self.prune(plan, now_us)
                self.windows[window.key] = [nanos, tokens, calls]
            else:
                _add(totals, nanos, tokens, calls)

    def _add_to_slot(self, rolling_s: int, slot: int, now_us: int, nanos: int, tokens: int, calls: int) -> None:
        oldest = oldest_slot(rolling_s, now_us)
        if slot < oldest:
            return
        slots = self.rolling.setdefault(rolling_s, {})
        totals = slots.get(slot)
        if totals is None:
            for old in [key for key in slots if key < oldest]:
                del slots[old]
                self.summed.pop(rolling_s, None)
            slots[slot] = [nanos, tokens, calls]
        else:
            _add(totals, nanos, tokens, calls)
        summed = self.summed.get(rolling_s)
        if summed is not None and slot >= summed[0]:
            _add(summed[1], nanos, tokens, calls)

    def prune(self, plan: Plan, now_us: int) -> None:
        """Drop the windows that have closed for good; the hour before the running one stays, for the burn rate."""
        if not self.windows and not self.rolling:
            return
        keep_us = max(plan.grace_us, 3_600_000_000)
        for key in [key for key in self.windows if window_of_key(key).end_us + keep_us <= now_us]:
            del self.windows[key]
        for rolling_s in [rolling_s for rolling_s in self.rolling if rolling_s not in plan.rolling]:
            del self.rolling[rolling_s]  # its budget was withdrawn
            self.summed.pop(rolling_s, None)

    def hold(self, call_id: str, hold: Hold, now_us: int) -> bool:
        """Remember a call in flight; say whether there was room."""
        if call_id not in self.holds and len(self.holds) >= HOLDS_MAX:
            self.release_expired(now_us)
            if len(self.holds) >= HOLDS_MAX:
                return False
        self.holds[call_id] = hold
        return True

    def settle(self, call_id: str) -> None:
        """Forget the hold of a call that has finished."""
        self.holds.pop(call_id, None)

    def release_expired(self, now_us: int) -> None:
        """Forget holds whose deadline has passed."""
        for call_id in [key for key, hold in self.holds.items() if hold.deadline_us <= now_us]:
            del self.holds[call_id]

    def held(self, now_us: int) -> tuple[int, int]:
        """Return (nanos, tokens) of the calls in flight."""
        nanos = tokens = 0
        for hold in self.holds.values():
            if hold.deadline_us > now_us:
                nanos += hold.nanos
                tokens += hold.tokens
        return min(nanos, NANOS_MAX), tokens

    def held_until(self) -> int:
        """Return the last deadline of the calls in flight, in microseconds since the epoch; 0 when there are none."""
        return max((hold.deadline_us for hold in self.holds.values()), default=0)

    def held_steps(self, now_us: int) -> list[list[int]]:
        """Return [deadline, nanos, tokens] of the calls in flight by their deadlines, in microseconds and in order."""
        alive = sorted((hold for hold in self.holds.values() if hold.deadline_us > now_us), key=lambda hold: hold[2])
        each = -(-len(alive) // HELD_STEPS_MAX) or 1
        groups = [alive[start : start + each] for start in range(0, len(alive), each)]
        return [
            [group[-1].deadline_us, sum(hold.nanos for hold in group), sum(hold.tokens for hold in group)]
            for group in groups
        ]

    def in_window(self, key: str) -> Totals:
        """Return the sums of a calendar window or of the run; zeros when it has none, and never less."""
        return _not_below_zero(self.windows.get(key) or [0, 0, 0])

    def in_rolling(self, rolling_s: int, now_us: int) -> Totals:
        """Return the sums of the last `rolling_s` seconds; they are the caller's to read, not to change."""
        oldest = oldest_slot(rolling_s, now_us)
        summed = self.summed.get(rolling_s)
        if summed is not None and summed[0] == oldest:
            return _not_below_zero(summed[1])
        sums = [0, 0, 0]
        for slot, totals in self.rolling.get(rolling_s, {}).items():
            if slot >= oldest:  # a slot ahead of the clock counts too: an emitter's skew must not hide spend
                _add(sums, *totals)
        self.summed[rolling_s] = (oldest, sums)
        return _not_below_zero(sums)


def _sums_by(charges: Sequence[tuple[int, int, int]], length_us: int) -> Iterable[tuple[int, Totals]]:
    """Return (slot, sums) of charges by slots of a length; neighbours mostly share one."""
    slots: dict[int, Totals] = {}
    slot, sums = -1, [0, 0, 0]
    for ts_us, nanos, tokens in charges:
        if ts_us // length_us != slot:
            slot = ts_us // length_us
            sums = slots.setdefault(slot, [0, 0, 0])
        sums[NANOS] += nanos
        sums[TOKENS] += tokens
        sums[CALLS] += 1
    return slots.items()


def misses(plan: Plan, ts_us: int, now_us: int) -> bool:
    """Say whether a window of an event time had closed by now, so that a charge of then does not count in it."""
    return calendar_windows(plan.calendar, ts_us).first_end_us + plan.grace_us <= now_us


def _add(totals: Totals, nanos: int, tokens: int, calls: int) -> None:
    # Money stops at what the audit can store (9.2 thousand million units): absurd usage must not stop a partition.
    # Such an addition is still associative, so no order or split of the usage changes the sum. A correction of a sum
    # that has stopped there is one of what can be stored, not of what was spent.
    nanos += totals[NANOS]
    totals[NANOS] = nanos if -NANOS_MAX <= nanos <= NANOS_MAX else _stopped(nanos)
    totals[TOKENS] += tokens
    totals[CALLS] += calls


def _stopped(nanos: int) -> int:
    return max(-NANOS_MAX, min(nanos, NANOS_MAX))


def _not_below_zero(totals: Totals) -> Totals:
    # What is stored stays signed: a correction may come before its usage, and their sum must not depend on that.
    if totals[NANOS] >= 0 and totals[TOKENS] >= 0:
        return totals
    return [max(totals[NANOS], 0), max(totals[TOKENS], 0), totals[CALLS]]


def fell(before: Spend, after: Spend) -> bool:
    """Say whether some sum that both have is lower in the later one, which only a correction can bring about."""
    pairs = [(totals, after.windows.get(key)) for key, totals in before.windows.items()]
    pairs += [
        (totals, after.rolling.get(rolling_s, {}).get(slot))
        for rolling_s, slots in before.rolling.items()
        for slot, totals in slots.items()
    ]
    return any(now is not None and (now[NANOS] < then[NANOS] or now[TOKENS] < then[TOKENS]) for then, now in pairs)


def merged(parts: Iterable[Spend]) -> Spend:
    """Return the sum of several partitions' spend of one scope; holds are not summed."""
    whole = Spend()
    for part in parts:
        for key, totals in part.windows.items():
            _add(whole.windows.setdefault(key, [0, 0, 0]), *totals)
        for rolling_s, slots in part.rolling.items():
            whole_slots = whole.rolling.setdefault(rolling_s, {})
            for slot, totals in slots.items():
                _add(whole_slots.setdefault(slot, [0, 0, 0]), *totals)
        if part.first_us and (not whole.first_us or part.first_us < whole.first_us):
            whole.first_us = part.first_us
        whole.newest_us = max(whole.newest_us, part.newest_us)
    return whole


__all__ = ["CALLS", "NANOS", "RUN_KEY", "TOKENS", "Hold", "Plan", "Spend", "Totals", "fell", "merged", "misses"]
