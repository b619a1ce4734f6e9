"""Windows in event time: calendar units of a zone, a run's whole life, and rolling slots.

A calendar window is named by its start instant, so a day of 23 or 25 hours is one window like any other.
A rolling window of d seconds is 60 slots of d/60; a sum takes the running slot and the 60 before it, so it covers
between d and d + d/60: it may count a usage one slot too long, never one too short.
"""

from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final, NamedTuple
from zoneinfo import ZoneInfo

from spendfuse.wire.base import from_us, to_us

SECOND_US: Final = 1_000_000
HOUR_US: Final = 3_600 * SECOND_US
QUARTER_US: Final = 900 * SECOND_US
"""Every zone's offset is a multiple of a quarter of an hour (since 1972), so no window starts inside one."""
ROLLING_SLOTS: Final = 60
RUN_KEY: Final = "run"
WINDOW_CACHE_MAX: Final = 16_384
FOREVER_US: Final = 2**62


class Window(NamedTuple):
    """One window: its key, and its bounds in microseconds since the epoch (end is exclusive)."""

    key: str
    start_us: int
    end_us: int


RUN_WINDOW: Final = Window(RUN_KEY, 0, FOREVER_US)


def calendar_window(kind: str, zone: str, ts_us: int) -> Window:
    """Return the window of an instant; kind is hour, day, week or month."""
    return _window_of_quarter(kind, zone, ts_us // QUARTER_US)


@lru_cache(maxsize=WINDOW_CACHE_MAX)
def _window_of_quarter(kind: str, zone: str, quarter: int) -> Window:
    start, end = _bounds(kind, ZoneInfo(zone), quarter * QUARTER_US)
    return Window(f"{kind}@{zone}@{start // SECOND_US}", start, end)


def calendar_windows(calendar: tuple[tuple[str, str], ...], ts_us: int) -> "Windows":
    """Return the windows of an instant, of each (kind, zone), and when the first of them ends."""
    return _windows_of_quarter(calendar, ts_us // QUARTER_US)


class Windows(NamedTuple):
    """Some windows of one instant, and the end of the one that ends first (`FOREVER_US` of none)."""

    windows: tuple[Window, ...]
    first_end_us: int


@lru_cache(maxsize=WINDOW_CACHE_MAX)
def _windows_of_quarter(calendar: tuple[tuple[str, str], ...], quarter: int) -> Windows:
    windows = tuple(_window_of_quarter(kind, zone, quarter) for kind, zone in calendar)
    return Windows(windows, min((window.end_us for window in windows), default=FOREVER_US))


def _bounds(kind: str, zone: ZoneInfo, ts_us: int) -> tuple[int, int]:
    if kind == "hour":
        return _hour_bounds(zone, ts_us)
    first = from_us(ts_us).astimezone(zone).date()
    if kind == "week":
        first -= timedelta(days=first.weekday())
        after = first + timedelta(days=7)
    elif kind == "month":
        first = first.replace(day=1)
        after = (first + timedelta(days=32)).replace(day=1)
    else:
        after = first + timedelta(days=1)
    start, end = (to_us(datetime(day.year, day.month, day.day, tzinfo=zone).astimezone(UTC)) for day in (first, after))
    return start, end


def _hour_bounds(zone: ZoneInfo, ts_us: int) -> tuple[int, int]:
    # By the offset in force, so that the hour a clock repeats in autumn is two windows. Where a clock moves by less
    # than an hour (Lord Howe), the hour it moves in is cut there: windows never overlap.
    offset_us = _offset_us(zone, ts_us)
    start = (ts_us + offset_us) // HOUR_US * HOUR_US - offset_us
    end = start + HOUR_US
    while _offset_us(zone, start) != offset_us:
        start += QUARTER_US
    while _offset_us(zone, end - 1) != offset_us:
        end -= QUARTER_US
    return start, end


def _offset_us(zone: ZoneInfo, ts_us: int) -> int:
    return to_us(from_us(ts_us).astimezone(zone).replace(tzinfo=UTC)) - ts_us


def window_of_key(key: str) -> Window:
    """Return the window a key names; `run` never ends."""
    if key == RUN_KEY:
        return RUN_WINDOW
    kind, zone, start_s = key.split("@")
    return calendar_window(kind, zone, int(start_s) * SECOND_US)


def slot_us(rolling_s: int) -> int:
    """Return the length of one slot of a rolling window, in microseconds."""
    return rolling_s * SECOND_US // ROLLING_SLOTS


def slot_of(rolling_s: int, ts_us: int) -> int:
    """Return the slot an instant falls into."""
    return ts_us // slot_us(rolling_s)


def oldest_slot(rolling_s: int, now_us: int) -> int:
    """Return the oldest slot that still counts at an instant."""
    return slot_of(rolling_s, now_us) - ROLLING_SLOTS
