"""Calls in flight: held from started to finished or their deadline, and counted against caps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factories import AGENT, MINUTE, NOW, SECOND, Line, at, budget, call, cap, meter, told, usage
from spendfuse.engine.meter import HOLD_US_DEFAULT, HOLD_US_MAX
from spendfuse.engine.policies import Policies
from spendfuse.engine.rollup import apply_rollup, held_by, passed_shared
from spendfuse.engine.spend import HELD_STEPS_MAX, Hold, Spend
from spendfuse.engine.state import Part, SharedState
from spendfuse.wire.base import from_us
from spendfuse.wire.rollup import Rollup

if TYPE_CHECKING:
    from spendfuse.wire.control import Command

TEAM = "team:acme/research"
MIDNIGHT = at("2026-11-24T00:00:00Z")


def held(line: Line, now_us: int = NOW, scope: str = AGENT) -> int:
    return line.meter.state(scope).spend.held(now_us)[0]


def start(line: Line, output: int, now_us: int = NOW, **more: Any) -> list[str]:
    return told(line.spend(output, now_us, **({"kind": "started", "id": "x"} | more)))


def test_a_started_call_counts_as_committed_and_its_charge_replaces_the_hold() -> None:
    line = Line(budget(cap(100)))
    line.spend(40)
    assert start(line, 59) == []
    (halt,) = line.spend(1, kind="started", id="y").commands
    assert (halt.measure.spend, halt.measure.committed) == (40, 100)  # type: ignore[union-attr]
    assert "in flight" in halt.message
    line.spend(10, id="x")
    assert held(line) == 1
    assert line.meter.state(AGENT).spend.in_window("day@UTC@1795392000")[0] == 50


def test_finishing_at_the_bound_changes_nothing_in_committed() -> None:
    line = Line(budget(cap(100, warn=[6_000])))
    assert start(line, 60) == ["warn"]
    assert told(line.spend(60, id="x")) == []
    assert held(line) == 0


def test_a_budget_that_does_not_count_holds_is_not_tripped_by_them() -> None:
    line = Line(budget(cap(100), count_holds=False))
    assert start(line, 500) == []
    assert told(line.spend(100, id="x")) == ["halt"]


def test_a_hold_ends_at_its_deadline_at_the_latest_after_a_day() -> None:
    line = Line()
    start(line, 5, id="a", deadline=from_us(NOW + MINUTE))
    start(line, 7, id="b")
    start(line, 9, id="c", deadline=from_us(NOW + 9 * HOLD_US_MAX))
    assert held(line, NOW + MINUTE - 1) == 21
    assert held(line, NOW + MINUTE) == 16
    assert held(line, NOW + HOLD_US_DEFAULT) == 9
    assert held(line, NOW + HOLD_US_MAX) == 0


def test_progress_beyond_the_bound_raises_the_hold_and_below_it_the_bound_stands() -> None:
    line = Line()
    start(line, 50)
    for so_far, expected in ((20, 50), (50, 50), (51, 51), (80, 80), (10, 80)):
        start(line, so_far, kind="progress")
        assert held(line) == expected


def test_progress_extends_a_hold_only_by_a_deadline_of_its_own() -> None:
    line = Line()
    start(line, 50, deadline=from_us(NOW + MINUTE))
    start(line, 10, NOW + SECOND, kind="progress")
    assert held(line, NOW + MINUTE) == 0
    start(line, 10, NOW + SECOND, kind="progress", deadline=from_us(NOW + 5 * MINUTE))
    assert held(line, NOW + 5 * MINUTE - 1) == 50
    start(line, 10, NOW + SECOND, kind="progress", deadline=from_us(NOW + 2 * MINUTE))
    assert held(line, NOW + 5 * MINUTE - 1) == 50, "it is never cut short"


@pytest.mark.parametrize("tidied", [False, True])
def test_progress_after_the_deadline_holds_again_whether_or_not_the_old_hold_was_tidied_away(*, tidied: bool) -> None:
    line = Line()
    start(line, 50, deadline=from_us(NOW + MINUTE))
    if tidied:
        line.meter.state(AGENT).spend.release_expired(NOW + MINUTE)
    start(line, 30, NOW + MINUTE, kind="progress")
    assert held(line, NOW + MINUTE) == 30


@pytest.mark.parametrize("kind", ["started", "progress"])
def test_a_straggler_of_a_finished_call_is_ignored(kind: str) -> None:
    line = Line(budget(cap(100)))
    line.spend(10, id="x")
    assert start(line, 500, kind=kind) == []
    assert held(line) == 0


def test_calls_of_two_agents_may_have_the_same_id() -> None:
    line = Line()
    start(line, 30, agent="one")
    start(line, 40, agent="two")
    assert held(line, scope=TEAM) == 70
    line.spend(5, id="x", agent="one")
    assert held(line, scope=TEAM) == 40
    assert (held(line, scope="agent:acme/research/one"), held(line, scope="agent:acme/research/two")) == (0, 40)


def test_a_call_that_started_just_before_midnight_counts_in_the_new_day() -> None:
    line = Line(budget(cap(100)))
    (halt,) = line.spend(100, MIDNIGHT + SECOND, ts_us=MIDNIGHT - SECOND, kind="started", id="x").commands
    assert halt.window is not None
    assert halt.window.start == from_us(MIDNIGHT)


def test_a_halt_that_calls_in_flight_tripped_ends_with_them() -> None:
    line = Line(budget(cap(100)))
    assert told(line.spend(40)) == []
    assert start(line, 60) == ["halt"]
    (resume,) = line.spend(10, NOW + SECOND, id="x").commands
    assert (resume.action, resume.reason) == ("resume", "calls in flight ended and left room")
    assert told(line.spend(49)) == []
    assert told(line.spend(1)) == ["halt"], "and spend trips it for good"
    assert start(line, 50, id="z") == []
    assert told(line.spend(0, id="z")) == []


def test_a_halt_that_spend_reached_meanwhile_outlasts_the_calls_in_flight() -> None:
    line = Line(budget(cap(100)))
    assert start(line, 100) == ["halt"]
    assert told(line.spend(100)) == []
    assert told(line.spend(0, id="x")) == []


def test_what_committed_still_calls_for_takes_the_halts_place_and_no_warning_is_said_again() -> None:
    line = Line(budget(cap(100, warn=[3_000], degrade=6_000)))
    assert told(line.spend(30)) == ["warn"]
    assert start(line, 70) == ["halt"]
    assert told(line.spend(31, id="x")) == ["degrade"]
    assert start(line, 39, id="y") == ["halt"]
    assert told(line.spend(0, id="y")) == ["degrade"]
    other = Line(budget(cap(100, warn=[3_000])))
    assert told(other.spend(30)) == ["warn"]
    assert start(other, 70) == ["halt"]
    assert told(other.spend(1, id="x")) == ["resume"]
    assert told(other.spend(1)) == []


def test_a_deadline_that_passes_rearms_although_nothing_more_is_emitted() -> None:
    line = Line(budget(cap(100)))
    assert start(line, 100, deadline=from_us(NOW + MINUTE)) == ["halt"]
    assert line.meter.due.take(NOW + MINUTE - 1) == []
    due = line.meter.due.take(NOW + MINUTE)
    assert AGENT in due
    effects = line.meter.passed(AGENT, line.policies, line.book, NOW + MINUTE)
    assert effects is not None
    assert told(effects) == ["resume"]
    assert line.meter.passed(AGENT, line.policies, line.book, NOW + MINUTE) is None


def test_a_shadow_budgets_trip_by_calls_in_flight_is_lifted_in_the_record_only() -> None:
    line = Line(budget(cap(100), shadow=True))
    assert start(line, 100) == ["alert shadow"]
    effects = line.spend(1, id="x")
    assert effects.commands == []
    assert [command.action for command in effects.shadow] == ["resume"]


STEPS = st.lists(
    st.tuples(st.sampled_from(["start", "finish", "wait"]), st.integers(0, 5), st.integers(0, 60)), max_size=40
)


@settings(max_examples=300, deadline=None)
@given(STEPS, st.sampled_from(["day", "month"]))
def test_a_fuse_is_tripped_exactly_while_committed_is_at_the_cap(
    steps: list[tuple[str, int, int]], window: str
) -> None:
    """The oracle is a dict of calls in flight and one sum; what a guard obeys is the last command."""
    line = Line(budget(cap(100, window)))
    open_calls: dict[str, tuple[int, int]] = {}
    spent, now, tripped, finished = 0, NOW, False, set()
    for kind, nth, amount in steps:
        name = f"call-{nth}"
        commands: list[Command] = []
        if kind == "wait":
            now += amount * SECOND
            for scope in line.meter.due.take(now):
                effects = line.meter.passed(scope, line.policies, line.book, now)
                commands += effects.commands if effects else []
        elif kind == "start":
            commands += line.spend(amount, now, kind="started", id=name, deadline=from_us(now + 30 * SECOND)).commands
            if name not in finished:
                before, until = open_calls.get(name, (0, 0))
                before = before if until > now else 0
                open_calls[name] = (max(before, amount), max(until, now + 30 * SECOND))
        else:
            commands += line.spend(amount, now, id=name).commands
            open_calls.pop(name, None)
            spent += amount if name not in finished else 0
            finished.add(name)
        for command in commands:
            assert command.action == ("resume" if tripped else "halt")
            tripped = not tripped
        committed = spent + sum(bound for bound, until in open_calls.values() if until > now)
        assert tripped == (committed >= 100)


def shared(line: Line, state: SharedState, now_us: int, as_of: int) -> list[str]:
    rollup = line.meter.rollup(TEAM, as_of, now_us)
    assert rollup is not None
    sent = Rollup.model_validate_json(rollup.model_dump_json())
    _, effects = apply_rollup(state, sent, line.policies, now_us=now_us, price_book="x")
    return told(effects) if effects else []


def test_holds_of_a_team_are_a_gauge_that_trips_and_runs_out_although_its_partition_falls_silent() -> None:
    line, state = Line(budget(cap(100), scope=TEAM)), SharedState()
    start(line, 60, deadline=from_us(NOW + MINUTE))
    assert shared(line, state, NOW, 1) == []
    start(line, 40, id="y", deadline=from_us(NOW + 2 * MINUTE))
    assert shared(line, state, NOW, 2) == ["halt"]
    assert held_by(state, NOW).nanos == 100
    assert held_by(state, NOW + 2 * MINUTE).nanos == 0
    assert shared(line, state, NOW + MINUTE, 2) == ["resume"]
    assert held_by(state, NOW + MINUTE).nanos == 40


def test_each_hold_of_a_team_ends_in_time_although_its_partition_has_forgotten_to_say_so() -> None:
    line, state, policies = Line(), SharedState(), Policies([budget(cap(100), scope=TEAM)])
    for nth, (output, minutes) in enumerate([(90, 1), (10, 10), (5, 5)]):
        line.spend(output, kind="started", id=f"x{nth}", deadline=from_us(NOW + minutes * MINUTE))
    share = line.meter.rollup(TEAM, 1, NOW)
    assert share is not None
    sent = Rollup.model_validate_json(share.model_dump_json())
    _, effects = apply_rollup(state, sent, policies, now_us=NOW, price_book="x")
    assert told(effects) == ["halt"]  # type: ignore[arg-type]
    seen = [(minute, held_by(state, NOW + minute * MINUTE).tokens) for minute in range(12)]
    assert seen == [
        (0, 105),
        *((minute, 15) for minute in range(1, 5)),
        *((m, 10) for m in range(5, 10)),
        (10, 0),
        (11, 0),
    ]
    assert [state.held_until_us(NOW + minute * MINUTE) for minute in (0, 1, 5)] == [
        NOW + m * MINUTE for m in (1, 5, 10)
    ]
    assert state.held_until_us(NOW + 10 * MINUTE) is None
    lifted = passed_shared(TEAM, state, policies, now_us=NOW + MINUTE, price_book="x")
    assert told(lifted) == ["resume"]  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(1, 10_000)), max_size=300))
def test_a_share_tells_of_few_deadlines_and_never_of_less_than_is_held(calls: list[tuple[int, int]]) -> None:
    spend = Spend()
    for nth, (tokens, seconds) in enumerate(calls):
        spend.hold(f"c{nth}", Hold(tokens, tokens, NOW + seconds * SECOND), NOW)
    part = Part(0, Spend(), held_steps=spend.held_steps(NOW))
    assert len(part.held_steps) <= HELD_STEPS_MAX
    for seconds in (0, 1, 50, 3_000, 9_999, 10_000):
        held_then = sum(tokens for tokens, until in calls if until > seconds)
        told_then = part.held(NOW + seconds * SECOND)
        assert told_then[0] == told_then[1] >= held_then
        if len(calls) <= HELD_STEPS_MAX:
            assert told_then[0] == held_then
    assert part.held(NOW + 10_000 * SECOND) == (0, 0)


def test_a_replay_of_started_and_finished_leaves_no_hold_behind() -> None:
    line = Line()
    messages = [call(usage(1, kind="started", output=9), 1), call(usage(1, output=3), 2)]
    for _ in range(2):
        line.meter.apply(messages, Policies(), line.book, NOW)
        for scope in (AGENT, TEAM):
            assert held(line, scope=scope) == 0
            assert line.meter.state(scope).spend.in_window("day@UTC@1795392000") == [3, 3, 1]


def test_a_trip_of_a_call_in_flight_is_known_again_after_a_crash_that_kept_the_ids_only() -> None:
    line = Line(budget(cap(100)))
    messages = [call(usage(1, kind="started", output=100), 1), call(usage(1, output=3), 2)]
    first = line.meter.apply(messages, line.policies, line.book, NOW).effects.commands
    assert [command.action for command in first] == ["halt", "resume"]
    crashed = meter()
    crashed.seen = line.meter.seen
    assert crashed.apply(messages, line.policies, line.book, NOW).effects.commands == first
    assert crashed.states == line.meter.states
