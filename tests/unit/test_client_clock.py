"""The clocks."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spendfuse.client.clock import ScaledClock, parse_clock, wall_clock

START_US = 1_795_445_087_000_000
STREAMS = Path(__file__).parents[2] / "streams"


def test_the_wall_clock_is_the_machines_in_microseconds() -> None:
    before = time.time_ns() // 1_000
    assert before <= parse_clock("wall")() <= time.time_ns() // 1_000


def test_a_scaled_clock_runs_its_factor_faster() -> None:
    clock = parse_clock(f"scaled:{wall_clock()}:{START_US}:3600")
    wall_ns, event_us = time.monotonic_ns(), clock()
    time.sleep(0.05)
    passed_us, wall_us = clock() - event_us, (time.monotonic_ns() - wall_ns) / 1_000
    assert 0.05e6 * 3_600 <= passed_us <= wall_us * 3_600
    assert event_us >= START_US


def test_two_processes_with_the_same_numbers_read_the_same_time() -> None:
    text = f"scaled:{wall_clock()}:{START_US}:100"
    clock = parse_clock(text)
    before = clock()
    code = f"from spendfuse.client.clock import parse_clock; print(parse_clock({text!r})())"
    other = int(
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONPATH": str(STREAMS)}, capture_output=True, check=True, timeout=60
        ).stdout
    )
    slack_us = 100_000  # the wall clock is slewed by a millisecond or less between the two starts, times 100
    assert before - slack_us <= other <= clock() + slack_us


@given(st.integers(0, 10**9), st.integers(1, 100_000))
def test_wall_us_is_the_first_moment_that_shows_an_event_time(ahead_us: int, factor: int) -> None:
    clock = ScaledClock(START_US, 0, factor)
    wall_us = clock.wall_us(ahead_us)
    assert (wall_us - START_US) * factor >= ahead_us
    assert (wall_us - START_US - 1) * factor < ahead_us


@pytest.mark.parametrize("text", ["", "walls", "scaled:1:2", "scaled:1:2:x", "scaled:1:2:3:4", "scaled:1:-2:3"])
def test_another_text_is_no_clock(text: str) -> None:
    with pytest.raises(ValueError, match="unknown clock"):
        parse_clock(text)


@pytest.mark.parametrize("factor", [0, 1_000_001])
def test_a_clock_that_stands_still_or_leaps_is_refused(factor: int) -> None:
    with pytest.raises(ValueError, match="factor"):
        parse_clock(f"scaled:1:2:{factor}")
