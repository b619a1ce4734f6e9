"""Which lines of a cap what is committed has reached, in each of its windows. Pure; decides nothing."""

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from spendfuse.engine.policies import Limit
from spendfuse.engine.spend import NANOS, TOKENS, Spend, Totals
from spendfuse.engine.windows import (
    FOREVER_US,
    ROLLING_SLOTS,
    RUN_WINDOW,
    SECOND_US,
    Window,
    calendar_window,
    oldest_slot,
    slot_of,
    slot_us,
    window_of_key,
)
from spendfuse.wire.budget import BASIS_POINTS
from spendfuse.wire.control import Action


class Held(NamedTuple):
    """The calls in flight of a scope: nano-units and tokens."""

    nanos: int = 0
    tokens: int = 0


NOTHING_HELD: Final = Held()


class Crossing(NamedTuple):
    """One cap in one window: what was spent, and the highest threshold reached."""

    limit: Limit
    window: Window
    spend: int
    committed: int
    fraction: int
    action: Action | None
    until_us: int


def crossings_of(
    limit: Limit, spend: Spend, held: Held, ts_us: int, now_us: int, *, every_window: bool
) -> Iterator[Crossing]:
    """Return what a cap's windows have reached: the one of an instant and the running one, or all that are kept."""
    cap = limit.cap
    if cap.window.rolling_s is not None:
        key = f"rolling@{cap.window.rolling_s}"
        totals = spend.in_rolling(cap.window.rolling_s, now_us)
        yield _crossing(limit, Window(key, now_us, FOREVER_US), totals, held, spend, now_us)
    elif cap.window.kind == "run":
        yield _crossing(limit, RUN_WINDOW, spend.in_window(RUN_WINDOW.key), held, spend, now_us)
    else:
        kind, zone = cap.window.kind, limit.budget.timezone
        running = calendar_window(kind, zone, now_us)
        if every_window:
            windows = [window_of_key(key) for key in spend.windows if key.startswith(f"{kind}@{zone}@")]
            if running.key not in spend.windows:
                windows.append(running)  # nothing charged yet, and calls in flight count
        else:
            windows = [calendar_window(kind, zone, ts_us)]
            if held != NOTHING_HELD and windows[0] != running:
                windows.append(running)
        closed_us = now_us - limit.budget.grace_s * SECOND_US
        for window in windows:
            if window.end_us > closed_us:
                yield _crossing(limit, window, spend.in_window(window.key), held, spend, now_us)


def crossing_of_key(key: str, limit: Limit, spend: Spend, held: Held, now_us: int) -> Crossing:
    """Return what the window of a key has reached."""
    rolling_s = limit.cap.window.rolling_s
    if rolling_s is not None:
        return _crossing(
            limit, Window(key, now_us, FOREVER_US), spend.in_rolling(rolling_s, now_us), held, spend, now_us
        )
    return _crossing(limit, window_of_key(key), spend.in_window(key), held, spend, now_us)


def wanted_of(crossings: Iterable[Crossing], now_us: int) -> Crossing | None:
    """Return the strictest of what the windows that have not ended call for."""
    running = [crossing for crossing in crossings if crossing.action is not None and crossing.window.end_us > now_us]
    return max(running, key=lambda crossing: (crossing.fraction, crossing.until_us), default=None)


def _crossing(limit: Limit, window: Window, totals: Totals, held: Held, spend: Spend, now_us: int) -> Crossing:
    spent = totals[TOKENS] if limit.in_tokens else totals[NANOS]
    committed = spent
    if limit.budget.count_holds and window.end_us > now_us:
        committed += held.tokens if limit.in_tokens else held.nanos
    scaled = committed * BASIS_POINTS
    fraction, action = 0, None
    for threshold in limit.thresholds:
        if scaled < threshold.fraction * limit.cap.amount:
            break
        fraction, action = threshold.fraction, threshold.action
    until_us = window.end_us
    rolling_s = limit.cap.window.rolling_s
    if rolling_s is not None and action is not None:
        until_us = _falls_below(fraction * limit.cap.amount, spend, committed - spent, limit, now_us)
    return Crossing(limit, window, spent, committed, fraction, action, until_us)


def _falls_below(scaled_line: int, spend: Spend, in_flight: int, limit: Limit, now_us: int) -> int:
    """Return when a rolling sum will be below a line if nothing more is spent; calls in flight count as spent now."""
    rolling_s = limit.cap.window.rolling_s or 0
    index = TOKENS if limit.in_tokens else NANOS
    oldest = oldest_slot(rolling_s, now_us)
    slots = {slot: totals[index] for slot, totals in spend.rolling.get(rolling_s, {}).items() if slot >= oldest}
    running = slot_of(rolling_s, now_us)
    slots[running] = slots.get(running, 0) + in_flight
    left = sum(slots.values())
    last = running
    for slot in sorted(slots):
        left -= slots[slot]
        if left * BASIS_POINTS < scaled_line:
            last = slot
            break
    return (last + ROLLING_SLOTS + 1) * slot_us(rolling_s)
