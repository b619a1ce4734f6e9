"""The audit's lag: told once when it is too far behind, once when that is over, and by one of many workers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka.errors import KafkaError

from spendfuse.audit.lag import LedgerLag
from spendfuse.pipeline.trail_watch import TrailLag, trail_alert, watch

if TYPE_CHECKING:
    from collections.abc import Sequence

NOW_MS = 1_767_603_600_000
NOW_US = NOW_MS * 1_000
DEADLINE_S = 30.0


def lag(age_s: int, messages: int = 7, *, begun: bool = True) -> LedgerLag:
    return LedgerLag(messages, NOW_MS - age_s * 1_000, begun) if messages else LedgerLag(0, None, begun)


@pytest.mark.parametrize(
    ("ages", "turns"),
    [
        ([0, 299, 300, 301, 900, 301, 299, 151, 150, 0], [None] * 3 + [True] + [None] * 4 + [False, None]),
        ([1_000, 1_000, 0, 1_000], [True, None, False, True]),
    ],
    ids=["beyond the bound, and back below half of it", "again"],
)
def test_it_turns_at_the_bound_and_back_at_half_of_it(ages: Sequence[int], turns: Sequence[bool | None]) -> None:
    trail = TrailLag(300)
    assert [trail.observe(lag(age), NOW_MS) for age in ages] == list(turns)


def test_an_empty_ledger_and_one_that_no_audit_ever_read_are_not_behind() -> None:
    trail = TrailLag(300)
    assert trail.observe(lag(0, 0), NOW_MS) is None
    assert trail.observe(lag(10**6, begun=False), NOW_MS) is None


def test_the_alert_says_how_far_and_that_halts_go_on() -> None:
    said = trail_alert(lag(3_725, 12_345), NOW_MS, NOW_US, over=False)
    assert (said.kind, said.severity, said.scope) == ("lag", "warning", "workspace:spendfuse")
    assert said.message == (
        "the audit is behind: 12,345 ledger messages are not in ClickHouse, the oldest for 3,725 s. "
        "Reports are old by that; halts go on without it. See its log."
    )
    later = trail_alert(LedgerLag(99_999, NOW_MS - 3_725_000), NOW_MS + 60_000, NOW_US, over=False)
    assert later.id == said.id, "another worker that says it of the same standstill"
    over = trail_alert(lag(0, 0), NOW_MS, NOW_US, over=True)
    assert (over.severity, over.id != said.id) == ("info", True)


async def watched(looks: Sequence[Any], mine: Sequence[bool], failures: int = 0) -> list[tuple[int, bool]]:
    """What is told in so many looks; a look that is an error is raised."""
    told: list[tuple[int, bool]] = []
    nth, failing = -1, failures
    done = asyncio.Event()

    def is_mine() -> bool:
        nonlocal nth
        nth += 1
        if nth >= len(looks):
            done.set()
            return False
        return mine[nth]

    async def look() -> LedgerLag:
        if isinstance(looks[nth], Exception):
            raise looks[nth]
        return looks[nth]

    async def tell(_lag: LedgerLag, over: bool) -> None:
        nonlocal failing
        if failing:
            failing -= 1
            raise KafkaError("not now")
        told.append((nth, over))

    task = asyncio.create_task(
        watch(TrailLag(300), look, is_mine=is_mine, tell=tell, now_ms=lambda: NOW_MS, look_s=0.0)
    )
    async with asyncio.timeout(DEADLINE_S):
        await done.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return told


async def test_a_broker_that_is_away_is_asked_again_and_what_was_not_told_is_told_again() -> None:
    looks = [TimeoutError(), KafkaError("away"), lag(900), lag(900), lag(0, 0)]
    assert await watched(looks, [True] * 5) == [(2, False), (4, True)]
    assert await watched(looks, [True] * 5, failures=1) == [(3, False), (4, True)]


async def test_only_the_worker_it_falls_to_says_it() -> None:
    behind = [lag(900)] * 4
    assert await watched(behind, [False] * 4) == []
    assert await watched(behind, [True, False, True, True]) == [(0, False), (2, False)], "under one id"
