"""What a guard does depends on the set of commands, never on their order or on how often each came."""

from __future__ import annotations

from datetime import timedelta
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spendfuse.client.obey import Obedience
from spendfuse.wire.base import EPOCH, from_us
from spendfuse.wire.control import MANUAL_BUDGET, MANUAL_CAP, Command
from spendfuse.wire.scopes import ancestors

SCOPES = ancestors("acme", "research", "planner-7", "run-1")
AGENT, TEAM, WORKSPACE, RUN = SCOPES
NOW = 1_000


def order(action: str, seq: int, scope: str = AGENT, cap: str = "day", **more: Any) -> Command:
    expires_us = more.pop("expires_us", None)
    return Command.model_validate(
        {
            "id": f"{seq:032x}",
            "seq": seq,
            "action": action,
            "scope": scope,
            "budget": "b",
            "cap": cap,
            "issued_at": EPOCH,
            "expires_at": None if expires_us is None else from_us(expires_us),
            **more,
        }
    )


def told(*commands: Command) -> Obedience:
    obedience = Obedience(SCOPES)
    for command in commands:
        obedience.apply(command)
    return obedience


# A seq is one command's own within its cap, as the single writer makes them.
histories = st.lists(
    st.builds(
        order,
        st.sampled_from(["warn", "degrade", "halt", "resume"]),
        st.integers(0, 12),
        st.sampled_from([AGENT, TEAM, WORKSPACE, RUN, "team:acme/other"]),
        st.sampled_from(["day", "month"]),
        expires_us=st.sampled_from([None, 500, 1_000, 1_001, 2_000]),
    ),
    max_size=25,
    unique_by=lambda command: (command.key, command.seq),
)


def oracle(commands: list[Command], now_us: int) -> tuple[set[str], set[str]]:
    """Return the keys that halt and those that degrade, by the rules as they are written."""
    halts, degrades = set(), set()
    ordered = sorted((c for c in commands if c.action != "warn" and c.scope in SCOPES), key=lambda c: (c.key, c.seq))
    for key, of_cap in groupby(ordered, key=lambda command: command.key):
        last = list(of_cap)[-1]
        lapsed = last.expires_at is not None and last.expires_at <= EPOCH + timedelta(microseconds=now_us)
        if not lapsed and last.action == "halt":
            halts.add(key)
        if not lapsed and last.action == "degrade":
            degrades.add(key)
    return halts, degrades


@given(histories, st.data(), st.integers(0, 2_500))
def test_order_and_repetition_change_nothing(commands: list[Command], data: st.DataObject, now_us: int) -> None:
    again = data.draw(st.lists(st.sampled_from(commands), max_size=10)) if commands else []
    shuffled = data.draw(st.permutations(commands + again))
    assert told(*shuffled).strictest(now_us) == told(*commands).strictest(now_us)


@given(histories, st.integers(0, 2_500))
def test_exactly_the_last_ruling_of_each_cap_holds_until_it_expires(commands: list[Command], now_us: int) -> None:
    verdict = told(*commands).strictest(now_us)
    halts, degrades = oracle(commands, now_us)
    assert {command.key for command in verdict.halts} == halts
    assert {command.key for command in verdict.degrades} == degrades
    assert verdict.action == ("halt" if halts else "degrade" if degrades else "go")


@given(histories, st.integers(0, 2_500))
def test_nothing_changes_before_the_time_a_verdict_names(commands: list[Command], now_us: int) -> None:
    obedience = told(*commands)
    verdict = obedience.strictest(now_us)
    if verdict.changes_at_us is not None:
        assert verdict.changes_at_us > now_us
        assert obedience.strictest(verdict.changes_at_us - 1) == verdict
        assert obedience.strictest(verdict.changes_at_us) != verdict
    else:
        assert obedience.strictest(10**15) == verdict


def test_a_warning_neither_lowers_a_halt_nor_makes_one_old() -> None:
    halt, warning = order("halt", 5), order("warn", 7)
    for commands in ((halt, warning), (warning, halt)):
        obedience = told(*commands)
        assert obedience.strictest(NOW).halt == halt
        assert obedience.warnings(NOW) == [warning]


def test_no_caps_resume_lifts_a_persons_halt() -> None:
    person = order("halt", 1, cap=MANUAL_CAP, budget=MANUAL_BUDGET)
    obedience = told(person, order("halt", 2), order("resume", 3))
    assert obedience.strictest(NOW).halts == (person,)
    obedience.apply(order("resume", 4, cap=MANUAL_CAP, budget=MANUAL_BUDGET))
    assert obedience.strictest(NOW).action == "go"


def test_a_halt_for_an_hour_that_replaced_one_for_ever_ends_after_the_hour() -> None:
    # So it does for a late reader, for whom compaction has removed the first.
    obedience = told(order("halt", 1), order("halt", 2, expires_us=2_000))
    assert obedience.strictest(1_999).action == "halt"
    assert obedience.strictest(2_000).action == "go"


def test_the_agents_own_halt_is_named_before_its_teams() -> None:
    verdict = told(order("halt", 9, WORKSPACE), order("halt", 3, TEAM), order("halt", 1)).strictest(NOW)
    assert [command.scope for command in verdict.halts] == [AGENT, TEAM, WORKSPACE]


@pytest.mark.parametrize(
    ("command", "worth"),
    [
        (order("halt", 5), "old"),
        (order("resume", 4), "old"),
        (order("warn", 1), "warning"),
        (order("halt", 9, "agent:acme/research/planner-8"), "elsewhere"),
        (order("halt", 9, "workspace:acm"), "elsewhere"),
        (order("resume", 6), "ruling"),
    ],
)
def test_each_command_is_worth_what_the_rules_say(command: Command, worth: str) -> None:
    assert told(order("halt", 5)).apply(command) == worth


def test_two_commands_of_one_seq_end_in_the_stricter_whatever_their_order() -> None:
    halt, resume = order("halt", 5), order("resume", 5)
    assert told(halt, resume).strictest(NOW).halt == halt
    assert told(resume, halt).strictest(NOW).halt == halt


def test_while_degraded_the_nearest_map_and_the_least_output_win() -> None:
    near = {"models": {"opus": "haiku", "gpt-*": "mini", "gpt-5*": "small"}, "max_output_tokens": 900}
    far = {"models": {"*": "cheap"}, "max_output_tokens": 400}
    verdict = told(order("degrade", 1, degrade=near), order("degrade", 2, TEAM, degrade=far)).strictest(NOW)
    assert verdict.action == "degrade"
    assert [verdict.model(name) for name in ("opus", "gpt-4", "gpt-5-pro", "gemini")] == [
        *("haiku", "mini", "small", "cheap"),
    ]
    assert verdict.max_output_tokens == 400
    assert told().strictest(NOW).model("opus") == "opus"
    assert told().strictest(NOW).max_output_tokens is None
