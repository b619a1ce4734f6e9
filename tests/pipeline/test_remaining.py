"""What guards are told of what is left: signed, for capped scopes only, seldom, and again when time changes it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from spendfuse.client.keys import Verifier, generate
from spendfuse.testing import PipelineDriver
from spendfuse.wire import Budget, Cap, Remaining, WindowSpec
from spendfuse.wire.signing import SIGNATURE_HEADER
from spendfuse.wire.topics import REMAINING

PRIVATE, PUBLIC = generate("test")
PLANNER = "agent:acme/research/planner"


def budget(amount: int = 1_000, scope: str = "agent:acme/research/*", window: str = "day", **more: Any) -> Budget:
    kind, _, length = window.partition(" ")
    spec = WindowSpec(kind=kind, rolling_s=int(length) if length else None)  # type: ignore[arg-type]
    cap = Cap(id="c", unit="tokens", amount=amount, window=spec, halt=more.pop("halt", True))
    return Budget(**({"id": "b", "version": 1, "scope": scope, "caps": [cap]} | more))


def told(driver: PipelineDriver, scope: str = PLANNER) -> list[Remaining]:
    found = [Remaining.model_validate_json(record.value or b"") for record in driver.records(REMAINING.name)]
    return [each for each in found if each.scope == scope]


def test_an_agent_and_its_team_are_told_what_they_have_left_with_calls_in_flight() -> None:
    driver = PipelineDriver(budgets=[budget(), budget(5_000, "team:acme/research", id="t")])
    driver.emit(driver.usage("acme/research/planner", output=100))
    driver.advance(1)
    driver.emit(driver.usage("acme/research/planner", output=250, kind="started"))
    driver.advance(1)
    assert [(each.spend, each.committed, each.left) for each in told(driver)] == [(100, 100, 900), (100, 350, 650)]
    team = told(driver, "team:acme/research")[-1]
    assert (team.amount, team.committed, team.left) == (5_000, 350, 4_650)
    midnight = driver.now.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
    assert team.resets_at == midnight


def test_it_is_signed_over_its_own_topic() -> None:
    driver = PipelineDriver(budgets=[budget()], signing_key=PRIVATE)
    driver.emit(driver.usage("acme/research/planner", output=100))
    (record,) = driver.records(REMAINING.name)
    header = dict(record.headers)[SIGNATURE_HEADER]
    assert record.key == f"{PLANNER}|b|c".encode()
    assert Verifier.parse(PUBLIC).verify(REMAINING.name, record.key, record.value or b"", header) == "test"


def test_a_busy_scope_is_told_at_most_four_times_a_second_and_the_last_word_is_said() -> None:
    driver = PipelineDriver(budgets=[budget(1_000_000)])
    for _ in range(100):
        driver.emit(driver.usage("acme/research/planner", output=1))
        driver.at(driver.now_us + 10_000)
    driver.advance(1)
    assert len(told(driver)) <= 6
    assert told(driver)[-1].spend == 100
    before = len(told(driver))
    driver.advance(60)
    assert len(told(driver)) == before, "nothing happened, so nothing is said"


@pytest.mark.parametrize("more", [{"shadow": True}, {"halt": False}, {"scope": "agent:acme/sales/*"}])
def test_caps_that_halt_nobody_here_are_not_told_of(more: dict[str, Any]) -> None:
    driver = PipelineDriver(budgets=[budget(**more)])
    driver.emit(driver.usage("acme/research/planner", output=100))
    driver.advance(1)
    assert driver.records(REMAINING.name) == []


@pytest.mark.parametrize("scope", [PLANNER, "team:acme/research"])
def test_a_call_that_is_never_finished_gives_back_what_it_held_at_its_deadline(scope: str) -> None:
    driver = PipelineDriver(budgets=[budget(scope=scope)])
    driver.emit(
        driver.usage("acme/research/planner", output=1_000, kind="started", deadline=driver.now + timedelta(seconds=30))
    )
    assert [command.action for command in driver.commands()] == ["halt"]
    driver.advance(29)
    assert len(driver.commands()) == 1
    driver.advance(2)
    assert [command.action for command in driver.commands()] == ["halt", "resume"]
    assert told(driver, scope)[-1].left == 1_000
    driver.advance(1)
    assert len(driver.commands()) == 2


@pytest.mark.parametrize("scope", [PLANNER, "team:acme/research"])
def test_a_worker_that_starts_anew_still_lets_go_at_the_deadline(scope: str) -> None:
    driver = PipelineDriver(budgets=[budget(scope=scope)])
    driver.emit(
        driver.usage("acme/research/planner", output=1_000, kind="started", deadline=driver.now + timedelta(seconds=30))
    )
    driver.crash()
    driver.advance(29)
    assert [command.action for command in driver.commands()] == ["halt"]
    driver.advance(2)
    assert [command.action for command in driver.commands()] == ["halt", "resume"]


@pytest.mark.parametrize("scope", [PLANNER, "team:acme/research"])
def test_a_rolling_cap_is_told_of_again_as_its_sum_falls(scope: str) -> None:
    driver = PipelineDriver(budgets=[budget(scope=scope, window="rolling 300")])
    driver.emit(driver.usage("acme/research/planner", output=900))
    driver.advance(310)
    driver.advance(1)
    assert told(driver, scope)[-1].left == 1_000


def test_a_cap_that_is_raised_or_withdrawn_is_told_of_without_new_usage() -> None:
    driver = PipelineDriver(budgets=[budget()])
    driver.emit(driver.usage("acme/research/planner", output=900))
    driver.advance(1)
    driver.apply_budget(budget(9_000, version=2))
    driver.advance(1)
    assert told(driver)[-1].left == 8_100
    driver.withdraw_budget("b")
    driver.advance(1)
    assert told(driver)[-1].withdrawn
