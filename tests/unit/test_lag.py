"""Lag in time: a worker behind its usage says so once, and once more when it has caught up."""

from __future__ import annotations

import random

from spendfuse.pipeline.lag import NOTES_MAX, Reading, Staleness, lag_alert

SECOND_US = 1_000_000


def test_a_stage_that_reads_nothing_becomes_stale_at_the_bound_and_says_so_once() -> None:
    staleness = Staleness(30 * SECOND_US)
    turns = [staleness.observe({"intake": Reading("p0", 5, 6)}, now * SECOND_US) for now in range(0, 100, 2)]
    assert turns.index(True) == 16, "the first look beyond 30 s is the one at 32 s"
    assert turns.count(True) == 1
    assert staleness.stale


def test_it_is_over_when_the_backlog_is_read_and_not_before() -> None:
    staleness = Staleness(10 * SECOND_US)
    for now in range(20):
        staleness.observe({"meter": Reading("p0", 0, now + 1)}, now * SECOND_US)
    assert staleness.stale
    assert staleness.observe({"meter": Reading("p0", 5, 21)}, 20 * SECOND_US) is None, "still 15 s behind"
    assert staleness.observe({"meter": Reading("p0", 19, 22)}, 21 * SECOND_US) is False
    assert not staleness.stale


def test_a_busy_stage_that_keeps_up_is_never_stale() -> None:
    staleness = Staleness(3 * SECOND_US)
    for now in range(1_000):  # always a thousand records before it, none of them older than a second
        turned = staleness.observe({"intake": Reading("p0", 1_000 * now, 1_000 * (now + 1))}, now * SECOND_US)
        assert turned is None


def test_the_slowest_stage_decides() -> None:
    staleness = Staleness(3 * SECOND_US)
    for now in range(6):
        staleness.observe({"intake": Reading("p0", now, now), "meter": Reading("p0", 0, 9)}, now * SECOND_US)
    assert staleness.stale


def test_partitions_that_come_or_go_start_the_measure_anew() -> None:
    staleness = Staleness(3 * SECOND_US)
    for now in range(20):
        turned = staleness.observe({"intake": Reading(now // 3, 0, 9)}, now * SECOND_US)
        assert turned is None


def test_the_lag_is_what_a_recount_of_every_record_says() -> None:
    chance = random.Random(5)  # noqa: S311 - it must repeat
    staleness, written, position = Staleness(10**15), [], 0
    for now in range(2_000):
        written += [now] * chance.randrange(3)
        position = min(len(written), position + chance.randrange(3))
        staleness.observe({"intake": Reading("p", position, len(written))}, now)
        oldest = written[position] if position < len(written) else now
        assert staleness.lag_us == now - oldest


def test_its_memory_is_bounded_and_keeps_the_oldest() -> None:
    staleness = Staleness(10**15)
    for now in range(3 * NOTES_MAX):
        staleness.observe({"intake": Reading("p", 0, now + 1)}, now)
    assert staleness.lag_us == 3 * NOTES_MAX - 1
    assert len(staleness._notes["intake"].ends) == NOTES_MAX


def test_the_alert_says_who_how_far_and_what_to_do() -> None:
    alert = lag_alert("spendfuse/host/1", 45 * SECOND_US, 1_200, 1_767_603_600_000_000, over=False)
    assert (alert.kind, alert.severity) == ("lag", "critical")
    assert alert.message == (
        "worker spendfuse/host/1 is 45 s and 1200 records behind its usage: its decisions are stale until it has "
        "caught up. Start more workers."
    )
    over = lag_alert("spendfuse/host/1", 0, 0, 1_767_603_600_000_000, over=True)
    assert over.severity == "info"
    assert over.id != alert.id


def test_it_is_not_current_before_what_lay_there_at_first_is_done() -> None:
    staleness = Staleness(30 * SECOND_US)
    assert not staleness.is_current, "nothing is known"
    for now, (position, end) in enumerate([(0, 9), (5, 20), (8, 30)]):
        staleness.observe({"intake": Reading("p", position, end), "meter": Reading("p", 0, 0)}, now)
        assert not staleness.is_current
    staleness.observe({"intake": Reading("p", 9, 40), "meter": Reading("p", 0, 0)}, 3)
    assert staleness.is_current, "what has come since is lag, which has its bound"
    staleness.observe({"intake": Reading("q", 9, 40), "meter": Reading("p", 0, 0)}, 4)
    assert not staleness.is_current, "other partitions, of which nobody knows how long they have waited"


def test_it_is_not_current_while_the_broker_has_not_said_where_the_partitions_end() -> None:
    staleness = Staleness(30 * SECOND_US)
    staleness.observe({"intake": Reading("p", 0, 0, is_known=False)}, 0)
    assert not staleness.is_current
    staleness.observe({"intake": Reading("p", 0, 0)}, 1)
    assert staleness.is_current
