"""Windows of every kind in zones that make it hard, against a walk through the minutes with zoneinfo."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factories import HOUR, at
from spendfuse.engine.windows import RUN_WINDOW, calendar_window, window_of_key
from spendfuse.wire.base import from_us, to_us

LABELS: dict[str, Callable[[datetime], object]] = {
    # A repeated hour is two hours: the clock shows the same, and its offset differs.
    "hour": lambda local: (local.utcoffset(), local.date(), local.hour),
    "day": lambda local: local.date(),
    "week": lambda local: local.isocalendar()[:2],
    "month": lambda local: (local.year, local.month),
}


def walked(kind: str, zone: str, first: datetime, days: int, step_min: int) -> list[tuple[int, int]]:
    """Return the whole windows of some days, found by looking at the clock every few minutes."""
    label, tz = LABELS[kind], ZoneInfo(zone)
    starts, before = [], None
    for minutes in range(0, days * 1_440, step_min):
        moment = first + timedelta(minutes=minutes)
        now = label(moment.astimezone(tz))
        if now != before:
            starts.append(to_us(moment))
        before = now
    return list(pairwise(starts[1:]))


PLACES = [
    ("UTC", "2026-11-20"),
    ("Europe/Amsterdam", "2026-03-27"),  # 23 hours on the 29th
    ("Europe/Amsterdam", "2026-10-23"),  # 25 hours on the 25th
    ("America/Sao_Paulo", "2018-11-02"),  # no midnight on the 4th
    ("America/Sao_Paulo", "2018-02-16"),  # 23 o'clock twice on the 17th
    ("America/Havana", "2026-10-30"),  # midnight twice on the 1st
    ("Asia/Kathmandu", "2026-11-20"),
    ("Australia/Lord_Howe", "2026-04-03"),  # half an hour back
    ("Australia/Lord_Howe", "2026-10-02"),  # half an hour forward
    ("Pacific/Apia", "2011-12-28"),  # no 30th at all
    ("America/St_Johns", "2026-03-06"),
    ("Pacific/Chatham", "2026-04-03"),
    ("Europe/Amsterdam", "2024-02-27"),  # a leap day
    ("Antarctica/Troll", "2026-03-27"),  # two hours forward
]


@pytest.mark.parametrize(("zone", "first"), PLACES, ids=[f"{zone} {first}" for zone, first in PLACES])
@pytest.mark.parametrize(("kind", "days", "step_min"), [("hour", 5, 1), ("day", 6, 5), ("week", 25, 15)])
def test_windows_are_what_the_clock_on_the_wall_shows(
    kind: str, days: int, step_min: int, zone: str, first: str
) -> None:
    windows = walked(kind, zone, datetime.fromisoformat(first).replace(tzinfo=UTC), days, step_min)
    assert len(windows) >= 2
    for start, end in windows:
        for ts_us in {start, start + 1, (start + end) // 2, end - 1}:
            window = calendar_window(kind, zone, ts_us)
            assert (window.start_us, window.end_us) == (start, end)
        assert window_of_key(window.key) == window


@pytest.mark.parametrize(("zone", "first"), PLACES, ids=[f"{zone} {first}" for zone, first in PLACES])
def test_months_are_what_the_clock_on_the_wall_shows(zone: str, first: str) -> None:
    start = datetime.fromisoformat(first).replace(tzinfo=UTC) - timedelta(days=33)
    windows = walked("month", zone, start, 100, 15)
    assert len(windows) >= 2
    for begin, end in windows:
        assert {calendar_window("month", zone, ts_us)[1:] for ts_us in (begin, end - 1)} == {(begin, end)}


@pytest.mark.parametrize(
    ("kind", "zone", "instant", "start", "end"),
    [
        ("day", "Europe/Amsterdam", "2026-03-29T12:00:00Z", "2026-03-28T23:00:00Z", "2026-03-29T22:00:00Z"),
        ("day", "Europe/Amsterdam", "2026-10-25T12:00:00Z", "2026-10-24T22:00:00Z", "2026-10-25T23:00:00Z"),
        ("day", "America/Sao_Paulo", "2018-11-04T03:00:00Z", "2018-11-04T03:00:00Z", "2018-11-05T02:00:00Z"),
        ("day", "America/Sao_Paulo", "2018-11-04T02:59:59Z", "2018-11-03T03:00:00Z", "2018-11-04T03:00:00Z"),
        ("day", "Asia/Kathmandu", "2026-11-23T18:14:59Z", "2026-11-22T18:15:00Z", "2026-11-23T18:15:00Z"),
        ("hour", "Asia/Kathmandu", "2026-11-23T18:14:59Z", "2026-11-23T17:15:00Z", "2026-11-23T18:15:00Z"),
        ("hour", "Europe/Amsterdam", "2026-10-25T00:30:00Z", "2026-10-25T00:00:00Z", "2026-10-25T01:00:00Z"),
        ("hour", "Europe/Amsterdam", "2026-10-25T01:30:00Z", "2026-10-25T01:00:00Z", "2026-10-25T02:00:00Z"),
        ("hour", "Australia/Lord_Howe", "2026-10-03T15:40:00Z", "2026-10-03T15:30:00Z", "2026-10-03T16:00:00Z"),
        ("hour", "Australia/Lord_Howe", "2026-04-04T15:10:00Z", "2026-04-04T15:00:00Z", "2026-04-04T15:30:00Z"),
        ("week", "Europe/Amsterdam", "2026-03-29T21:59:59Z", "2026-03-22T23:00:00Z", "2026-03-29T22:00:00Z"),
        ("week", "UTC", "2027-01-01T00:00:00Z", "2026-12-28T00:00:00Z", "2027-01-04T00:00:00Z"),
        ("month", "UTC", "2024-02-29T23:59:59Z", "2024-02-01T00:00:00Z", "2024-03-01T00:00:00Z"),
        ("month", "UTC", "2026-12-31T23:59:59Z", "2026-12-01T00:00:00Z", "2027-01-01T00:00:00Z"),
        ("month", "Europe/Amsterdam", "2026-10-31T23:00:00Z", "2026-10-31T23:00:00Z", "2026-11-30T23:00:00Z"),
        ("day", "Pacific/Apia", "2011-12-30T10:00:00Z", "2011-12-30T10:00:00Z", "2011-12-31T10:00:00Z"),
    ],
)
def test_windows_at_the_hard_places_of_the_calendar(kind: str, zone: str, instant: str, start: str, end: str) -> None:
    window = calendar_window(kind, zone, at(instant))
    assert (from_us(window.start_us), from_us(window.end_us)) == (
        datetime.fromisoformat(start),
        datetime.fromisoformat(end),
    )


ZONES = st.sampled_from(
    sorted({zone for zone, _ in PLACES} | {"America/New_York", "Asia/Kolkata", "Africa/Casablanca"})
)
INSTANTS = st.integers(at("2012-01-01T00:00:00Z"), at("2040-01-01T00:00:00Z"))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(LABELS)), ZONES, INSTANTS)
def test_windows_follow_each_other_without_gap_or_overlap_and_are_named_by_their_start(
    kind: str, zone: str, ts_us: int
) -> None:
    window = calendar_window(kind, zone, ts_us)
    assert window.start_us <= ts_us < window.end_us
    assert window_of_key(window.key) == window
    assert calendar_window(kind, zone, window.end_us - 1) == window
    assert calendar_window(kind, zone, window.end_us).start_us == window.end_us
    assert calendar_window(kind, zone, window.start_us - 1).end_us == window.start_us
    local = from_us(ts_us).astimezone(ZoneInfo(zone))
    assert LABELS[kind](from_us(window.start_us).astimezone(ZoneInfo(zone))) == LABELS[kind](local)


@settings(max_examples=50, deadline=None)
@given(ZONES, st.sampled_from([0, at("9998-12-31T23:59:59Z"), at("9999-01-01T12:00:00Z")]))
def test_every_instant_that_a_message_may_carry_has_windows(zone: str, ts_us: int) -> None:
    for kind in LABELS:
        window = calendar_window(kind, zone, ts_us)
        assert window.start_us <= ts_us < window.end_us


def test_a_run_is_one_window_that_never_ends() -> None:
    assert window_of_key("run") == RUN_WINDOW
    assert RUN_WINDOW.end_us > at("9998-12-31T00:00:00Z") + HOUR
