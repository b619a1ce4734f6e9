"""A halted scope that goes on spending: who, how much, once for each doubling, and nothing for calls in flight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st

import factories
from factories import at, usage
from pipeline.samples import INPUT_NANOS, budget, call, cap, driver
from spendfuse.engine.meter import Charged
from spendfuse.engine.prices import Charge
from spendfuse.pipeline.violations import Halts, Violations
from spendfuse.testing import PipelineDriver
from spendfuse.wire import Command
from spendfuse.wire.base import from_us, to_us
from spendfuse.wire.topics import COMMANDS

if TYPE_CHECKING:
    from spendfuse.wire.control import Alert

GRACE_S = 60
T0 = at("2026-11-23T10:00:00+00:00")
SECOND = 1_000_000


def violations(pipeline: PipelineDriver) -> list[Alert]:
    return [alert for alert in pipeline.alerts() if alert.kind == "violation"]


def spend_after_halt(
    pipeline: PipelineDriver, seconds: int, calls: int = 1, agent: str = "acme/research/planner"
) -> None:
    pipeline.advance(seconds=seconds)
    for _ in range(calls):
        pipeline.emit(call(pipeline, agent, input=1))


def halted_agent() -> PipelineDriver:
    pipeline = driver(budget("agent:acme/*/*", cap(INPUT_NANOS)))
    pipeline.emit(call(pipeline, input=1))
    assert [command.action for command in pipeline.commands()] == ["halt"]
    return pipeline


def test_a_call_in_flight_at_the_halt_is_no_violation() -> None:
    pipeline = halted_agent()
    spend_after_halt(pipeline, GRACE_S, calls=3)
    assert violations(pipeline) == []


def test_an_agent_that_ignores_its_halt_is_told_with_its_running_sum_at_every_doubling() -> None:
    pipeline = halted_agent()
    spend_after_halt(pipeline, GRACE_S + 1)
    spend_after_halt(pipeline, 1, calls=99)
    found = violations(pipeline)
    assert [alert.measure.spend // INPUT_NANOS for alert in found if alert.measure] == [1, 2, 4, 8, 16, 32, 64]
    assert {(alert.scope, alert.severity, alert.budget, alert.cap) for alert in found} == {
        ("agent:acme/research/planner", "critical", pipeline.commands()[0].budget, pipeline.commands()[0].cap)
    }
    assert "64 tokens in 64 calls that ended more than 60 s after it was halted" in found[-1].message
    recorded = [entry.alert.id for entry in pipeline.ledger() if entry.kind == "alert" and entry.alert]
    assert [alert.id for alert in found] == [each for each in recorded if each in {alert.id for alert in found}]


def test_a_teams_halt_names_each_agent_that_goes_on() -> None:
    pipeline = driver(budget("team:acme/research", cap(2 * INPUT_NANOS)))
    for agent in ("acme/research/a", "acme/research/b"):
        pipeline.emit(call(pipeline, agent, input=1))
    pipeline.emit(call(pipeline, "acme/other/c", input=1))
    pipeline.advance(seconds=GRACE_S + 1)
    for agent in ("acme/research/a", "acme/research/b", "acme/other/c"):
        pipeline.emit(call(pipeline, agent, input=1))
    assert sorted(alert.scope for alert in violations(pipeline)) == [
        "agent:acme/research/a", "agent:acme/research/b",
    ]  # fmt: skip
    assert all("after team:acme/research was halted" in alert.message for alert in violations(pipeline))


def test_a_window_that_ends_or_a_resume_ends_the_halt() -> None:
    pipeline = halted_agent()
    pipeline.advance(hours=24)
    pipeline.emit(call(pipeline, input=1))  # a new day: trips again, and is no violation
    assert violations(pipeline) == []
    pipeline.apply_budget(budget("agent:acme/*/*", cap(INPUT_NANOS * 100), version=2))
    assert pipeline.commands()[-1].action == "resume"
    spend_after_halt(pipeline, GRACE_S + 1, calls=5)
    assert violations(pipeline) == []


def test_a_forged_resume_covers_nobody() -> None:
    from spendfuse.client.keys import generate
    from spendfuse.wire import encode

    private, _ = generate("worker")
    pipeline = PipelineDriver(budgets=[budget("agent:acme/*/*", cap(INPUT_NANOS))], signing_key=private)
    pipeline.emit(call(pipeline, input=1))
    resume = pipeline.commands()[0].model_copy(update={"action": "resume", "seq": 2**52})
    pipeline.put(COMMANDS.name, encode(resume), key=resume.key.encode())
    spend_after_halt(pipeline, GRACE_S + 1)
    assert len(violations(pipeline)) == 1


def test_a_replay_after_a_rebalance_adds_nothing_and_a_restart_tells_under_the_same_id() -> None:
    pipeline = halted_agent()
    spend_after_halt(pipeline, GRACE_S + 1)
    pipeline.reassign()
    assert len(violations(pipeline)) == 1
    pipeline.crash()
    spend_after_halt(pipeline, 1)
    assert [alert.id for alert in violations(pipeline)] == [violations(pipeline)[0].id] * 2


# -- the fold itself ---------------------------------------------------------------------------------------------------


def order(
    seq: int, action: str = "halt", *, issued_s: int = 0, scope: str = "team:acme/research", **more: Any
) -> Command:
    values = {"id": f"{seq:032x}", "seq": seq, "action": action, "scope": scope, "budget": "b", "cap": "c"}
    return Command.model_validate(values | {"issued_at": from_us(T0 + issued_s * SECOND)} | more)


def charged(nth: int, second: int, nanos: int = 10) -> Charged:
    charge = Charge(nanos, "USD", "t", "book", (1, 1, 1, 1, 1), tier_known=True)
    return Charged("charge", factories.call(usage(nth, ts_us=T0 + second * SECOND), nth), charge, late=False, at_us=T0)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 1_000)), max_size=60),
    st.lists(st.sampled_from(["halt", "resume", "degrade", "warn"]), max_size=6),
    st.randoms(use_true_random=False),
)
def test_the_last_sum_told_is_more_than_half_of_what_was_spent_after_the_halt(
    spent: list[tuple[int, int]], actions: list[str], random: Any
) -> None:
    """Against brute force, over commands 50 s apart that are taken in before the charges."""
    commands = [order(nth + 1, action, issued_s=50 * nth) for nth, action in enumerate(actions)]
    halts = Halts()
    for command in commands:
        halts.take(command)
    for command in random.sample(commands, len(commands)):
        halts.take(command)  # again, in any order: nothing changes
    entries = [charged(nth, second, nanos) for nth, (second, nanos) in enumerate(spent)]
    found = Violations(halts, 10 * SECOND).on_charges([*entries, *entries], T0)

    rulings = [command for command in commands if command.action != "warn"]
    since: int | None = None
    until = 10**9
    for command in rulings:
        second = (to_us(command.issued_at) - T0) // SECOND
        if command.action == "halt":
            since, until = (since if since is not None and until >= second else second), 10**9
        elif since is not None:
            until = min(until, second)
    after = [nanos for second, nanos in spent if since is not None and since + 10 < second < until]
    assert bool(found) == bool(after)
    if after:
        assert found[-1].measure is not None
        assert sum(after) < 2 * found[-1].measure.spend or sum(after) == found[-1].measure.spend == 0
        assert len(found) <= 2 * (len(bin(sum(after))) + len(bin(len(after)))) + 2


def test_halts_and_violators_are_bounded() -> None:
    halts = Halts(halts_max=3)
    for nth in range(10):
        halts.take(order(nth + 1, scope=f"team:acme/t{nth}", issued_s=nth))
    assert len(halts) == 3
    halts = Halts(halts_max=2)
    halts.take(order(1, scope="team:acme/old"))
    halts.take(order(2, scope="team:acme/ended", expires_at=from_us(T0 + SECOND)))
    halts.take(order(3, scope="team:acme/new", issued_s=5))
    late = T0 + 100 * SECOND
    assert halts.over(["team:acme/old"], late, 0) is not None
    assert halts.over(["team:acme/ended"], T0 + 1, 0) is None
