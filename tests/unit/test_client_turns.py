"""Turns for the last of a cap, in a simulation of several processes that meet."""

from __future__ import annotations

import random

import pytest

from spendfuse.client.turns import WAIT_S_MAX, WAIT_S_MIN, Turns

HEARD_AFTER_S = 0.3
"""How long an announcement takes until the others know of it."""


def test_who_gave_way_waits_longer_after_each_loss_and_not_at_all_after_a_win() -> None:
    turns = Turns()
    assert not turns.must_wait(0.0)
    waits = []
    for _ in range(5):
        turns.lost(10.0, 1.0)
        waits.append(next(ms for ms in range(5_000) if not turns.must_wait(10.0 + ms / 1_000)) / 1_000)
    assert waits == pytest.approx([WAIT_S_MIN, 2 * WAIT_S_MIN, WAIT_S_MAX, WAIT_S_MAX, WAIT_S_MAX], abs=0.002)
    turns.won()
    turns.lost(20.0, 0.5)
    assert turns.must_wait(20.0 + WAIT_S_MIN / 2 - 0.001)
    assert not turns.must_wait(20.0 + WAIT_S_MIN / 2)


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_processes_that_meet_again_and_again_soon_get_through_one_at_a_time(processes: int) -> None:
    dice = random.Random(1)  # noqa: S311 - a simulation
    took = []
    for _ in range(200):
        turns = [Turns() for _ in range(processes)]
        now, announced = 0.0, dict.fromkeys(range(processes), 0.0)
        while True:
            first = min(announced.values())
            meeting = [each for each, at in announced.items() if at < first + HEARD_AFTER_S]
            if len(meeting) == 1:
                break
            now = first + 2 * HEARD_AFTER_S
            for each in meeting:
                turns[each].lost(now, dice.random())
                while turns[each].must_wait(announced[each]):
                    announced[each] += 0.01
                announced[each] = max(announced[each], now)
        took.append(first)
    took.sort()
    assert took[len(took) * 95 // 100] < 15.0
    assert len(took) == 200
