"""Tables rebuilt from the ledger are the tables that were lost, and what goes on over them is exact."""

from __future__ import annotations

from collections import defaultdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings

from audit_samples import START, command_entry, halt
from pipeline.oracle import Truth
from pipeline.samples import BOOK, INPUT_NANOS, budget, call, cap, driver
from pipeline.test_exactness import CAP_TOKENS, LIMITS, check_sums, operations, perform, settle, truth_of
from spendfuse.audit.rows import Place, entry_row
from spendfuse.engine.idle import bound_us
from spendfuse.engine.rebuilt import Charged, Rebuilt
from spendfuse.pipeline.codec import decode_scope, decode_shared
from spendfuse.pipeline.rebuild import Prepared
from spendfuse.pipeline.rebuild_sources import _command, fold_ledger
from spendfuse.pipeline.rebuild_write import rows_of
from spendfuse.pipeline.routing import partition_of
from spendfuse.testing import PipelineDriver
from spendfuse.testing.memory import ChangelogRecord
from spendfuse.wire.base import to_us
from spendfuse.wire.control import Command, Degrade
from spendfuse.wire.topics import COMMANDS, LEDGER, USAGE

if TYPE_CHECKING:
    from collections.abc import Sequence

IDLE_US = bound_us(35, 7 * 86_400)
PLANNER = "agent:acme/research/planner"


def empty(pipeline: PipelineDriver) -> Rebuilt:
    return Rebuilt(pipeline._feed.policies, lambda name: partition_of(name, pipeline.partitions), IDLE_US)


def rebuilt_from_ledger(pipeline: PipelineDriver) -> Rebuilt:
    rebuilt = empty(pipeline)
    for record in pipeline.records(LEDGER.name):
        assert fold_ledger(record.value, record.headers, rebuilt)
    for command in pipeline.commands():  # what the recorder had not copied yet
        rebuilt.command(command, sent=True)
    rebuilt.finish(pipeline.now_us)
    return rebuilt


def rebuilt_for_another_kafka(old: PipelineDriver, new: PipelineDriver) -> Rebuilt:
    """What the trail of a lost Kafka gives: every charge once, without its origin; and every command."""
    rebuilt = empty(new)
    for entry in old.ledger():
        if entry.kind == "charge":
            usage = entry.usage
            path = (usage.workspace, usage.team, usage.agent, usage.root_run or usage.run)
            times = (to_us(usage.ts), to_us(entry.at))
            rebuilt.charge(Charged(*path, usage.id, *times, entry.charge.cost_nanos, usage.tokens.total))
        elif entry.correction is not None:
            fix = entry.correction
            path = (fix.workspace, fix.team, fix.agent, fix.root_run or fix.run)
            sums = (to_us(fix.ts), to_us(entry.at), fix.cost_nanos, fix.tokens.total)
            rebuilt.charge(Charged(*path, fix.id, *sums, stated_us=to_us(fix.at)))
        elif entry.command is not None:
            rebuilt.command(entry.command, sent=entry.kind == "command")
    rebuilt.finish(new.now_us)
    return rebuilt


def put_in(pipeline: PipelineDriver, rebuilt: Rebuilt) -> None:
    """Put rebuilt tables in the place of those a worker has, and start it again."""
    rows = rows_of(Prepared("ledger", rebuilt, pipeline.now_us))
    pipeline.changelog[:] = [ChangelogRecord(*row) for row in rows]
    pipeline.crash()


def tables(pipeline: PipelineDriver) -> dict[str, dict[bytes, Any]]:
    found: dict[str, dict[bytes, Any]] = {"scopes": {}, "ids": {}, "shared": {}}
    for record in pipeline.changelog:
        found[record.table][record.key] = record.value
    found["scopes"] = {key: decode_scope(value) for key, value in found["scopes"].items()}
    found["shared"] = {key: decode_shared(value) for key, value in found["shared"].items()}
    return found


def sums_of(spend: Any) -> tuple[Any, ...]:
    return spend.windows, spend.rolling, spend.first_us, spend.newest_us


def fuses_of(state: Any, now_us: int) -> dict[str, Any]:
    return {
        key: (fuse.seq, {name: fired for name, fired in fuse.fired.items() if fired.until_us > now_us})
        for key, fuse in state.fuses.items()
    }


def check_same_tables(pipeline: PipelineDriver, rebuilt: Rebuilt) -> None:
    """The rebuilt tables are those the worker had: sums, watermarks, ids with their origins, shares, fuses."""
    had = tables(pipeline)
    now_us = pipeline.now_us
    # What has closed is dropped when the next window opens; rebuilt tables have dropped it.
    stored = [(key, [state.spend]) for key, state in had["scopes"].items()]
    stored += [(key, [part.spend for part in state.parts.values()]) for key, state in had["shared"].items()]
    for key, spends in stored:
        for spend in spends:
            spend.prune(pipeline._feed.policies.of(key.decode().partition("/")[2]).plan, now_us)
    mine = {f"{number}/{scope}".encode(): state for (number, scope), state in rebuilt.scopes.items()}
    assert set(mine) == set(had["scopes"])
    for key, state in had["scopes"].items():
        assert sums_of(mine[key].spend) == sums_of(state.spend), key
        assert mine[key].marks == state.marks, key
        assert mine[key].corrected == state.corrected, key
        assert fuses_of(mine[key], now_us) == fuses_of(state, now_us), key
    shared = {f"{number}/{scope}".encode(): state for (number, scope), state in rebuilt.shared.items()}
    assert set(shared) == set(had["shared"])
    for key, state in had["shared"].items():
        assert set(shared[key].parts) == set(state.parts), key
        for number, part in state.parts.items():
            assert sums_of(shared[key].parts[number].spend) == sums_of(part.spend), key
            assert 0 <= shared[key].parts[number].as_of <= part.as_of, "a share published later replaces it"
        assert fuses_of(shared[key], now_us) == fuses_of(state, now_us), key
    for number, pending in pipeline._meter._partitions.items():
        origins = rebuilt.seen[number].origins if number in rebuilt.seen else {}
        assert origins == pending.meter.seen.origins
        assert list(origins) == list(pending.meter.seen.origins), "in their order, since the oldest go first"


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(operations)
def test_tables_rebuilt_from_the_ledger_are_those_that_were_lost(steps: list[tuple[Any, ...]]) -> None:
    steps = [step for step in steps if step[0] != "start"]  # calls in flight are in no ledger
    pipeline = PipelineDriver(budgets=LIMITS, price_book=BOOK, autoflush=False)
    perform(pipeline, steps, budgets_change=False)
    settle(pipeline)
    check_same_tables(pipeline, rebuilt_from_ledger(pipeline))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(operations, operations)
def test_what_goes_on_over_rebuilt_tables_is_exact(before: list[tuple[Any, ...]], after: list[tuple[Any, ...]]) -> None:
    pipeline = PipelineDriver(budgets=LIMITS, price_book=BOOK, autoflush=False)
    perform(pipeline, before)
    # Killed at any moment: some of it is in the ledger and not acknowledged, some not even read.
    put_in(pipeline, rebuilt_from_ledger(pipeline))
    perform(pipeline, after)
    settle(pipeline)
    check_sums(pipeline)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(operations, operations)
def test_every_cap_is_commanded_once_although_the_tables_were_lost_in_between(
    before: list[tuple[Any, ...]], after: list[tuple[Any, ...]]
) -> None:
    pipeline = PipelineDriver(budgets=LIMITS, price_book=BOOK, autoflush=False)
    perform(pipeline, [step for step in before if step[0] != "start"], budgets_change=False)
    put_in(pipeline, rebuilt_from_ledger(pipeline))
    pipeline.flush()  # what is judged at a start has no usage as its cause: killed before this, it is said anew
    perform(pipeline, [step for step in after if step[0] != "start"], budgets_change=False)
    settle(pipeline)
    said: dict[str, set[tuple[str, int]]] = defaultdict(set)
    for command in pipeline.commands():
        said[command.key].add((command.id, command.seq))
    assert all(len(same) == 1 for same in said.values())
    spend = truth_of(pipeline).spend
    due = {"agent": CAP_TOKENS, "team": 2 * CAP_TOKENS, "workspace": 3 * CAP_TOKENS, "run": 10**9}
    reached = {scope for scope, (_, tokens, _) in spend.items() if tokens >= due[scope.partition(":")[0]]}
    assert {key.partition("|")[0] for key in said} == reached - {"workspace:other"}


def test_a_halted_agent_stays_halted_and_is_not_commanded_again() -> None:
    pipeline = driver(budget("agent:acme/*/*", cap(100, unit="tokens", warn=[5_000])))
    for _ in range(12):
        pipeline.emit(call(pipeline, input=10))
    assert [command.action for command in pipeline.commands()] == ["warn", "halt"]
    put_in(pipeline, rebuilt_from_ledger(pipeline))
    pipeline.emit(call(pipeline, input=10))
    assert [command.action for command in pipeline.commands()] == ["warn", "halt"]
    assert [row.state for row in pipeline.wallet() if row.scope == PLANNER] == ["tripped"]
    assert pipeline.spend(PLANNER).tokens == 130


def test_a_command_that_never_left_before_the_tables_were_lost_is_given_at_the_next_start() -> None:
    pipeline = driver(budget("agent:acme/*/*", cap(100, unit="tokens")), budget("team:acme/*", cap(1), name="team"))
    pipeline.emit(call(pipeline, input=150))
    rebuilt = empty(pipeline)
    for record in pipeline.records(LEDGER.name):
        if b'"command"' not in (record.value or b""):
            fold_ledger(record.value, record.headers, rebuilt)
    rebuilt.finish(pipeline.now_us)
    pipeline._topics._logs[(COMMANDS.name, 0)].clear()
    pipeline._command_reader._committed[(COMMANDS.name, 0)] = 0
    put_in(pipeline, rebuilt)
    assert {command.scope for command in pipeline.commands()} == {PLANNER, "team:acme/research"}


@pytest.mark.parametrize("window", ["hour", "day", "week", "month"])
@pytest.mark.parametrize("action", ["warn", "halt"])
def test_what_stands_is_remembered_as_it_fired_in_every_kind_of_window(window: str, action: str) -> None:
    limit = cap(100, unit="tokens", window=window, warn=[3_000, 6_000])
    pipeline = driver(budget("agent:acme/*/*", limit, timezone="Europe/Amsterdam"))
    pipeline.emit(call(pipeline, input=65 if action == "warn" else 100))
    check_same_tables(pipeline, rebuilt_from_ledger(pipeline))
    commands = len(pipeline.commands())
    put_in(pipeline, rebuilt_from_ledger(pipeline))
    assert len(pipeline.commands()) == commands


def test_shadow_degrading_rolling_and_run_caps_and_unknown_models_are_remembered_as_they_fired() -> None:
    rolling = {"id": "r", "unit": "tokens", "amount": 50, "window": {"kind": "rolling", "rolling_s": 3_600}}
    degrade = {"at": 2_000, "models": {"opus": "claude"}, "max_output_tokens": 9}
    pipeline = driver(
        budget("team:acme/*", cap(10, unit="tokens"), name="shadow", shadow=True),
        budget("workspace:acme", cap(100, unit="tokens", degrade=degrade), name="cheap"),
        budget("agent:acme/*/*", type(cap(1)).model_validate(rolling), name="rolling"),
        budget("run:acme/*", cap(50, unit="tokens", window="run"), name="runs"),
        budget("agent:acme/*/*", cap(10**9, unit="tokens"), name="deny", unknown_model="deny"),
    )
    pipeline.emit(call(pipeline, input=60))
    pipeline.emit(call(pipeline, input=1, model="nobody-knows-it"))
    said = [(command.budget, command.action) for command in pipeline.commands()]
    assert set(said) == {("cheap", "degrade"), ("rolling", "halt"), ("runs", "halt"), ("deny", "halt")}
    check_same_tables(pipeline, rebuilt_from_ledger(pipeline))
    put_in(pipeline, rebuilt_from_ledger(pipeline))
    pipeline.emit(call(pipeline, input=1))
    assert [(command.budget, command.action) for command in pipeline.commands()] == said


def test_sums_are_rebuilt_for_the_windows_of_a_budget_that_came_after_the_charges() -> None:
    pipeline = driver()
    pipeline.emit(call(pipeline, input=40))
    pipeline.advance(days=1)
    pipeline.apply_budget(budget("agent:acme/*/*", cap(100, unit="tokens", window="week")))
    put_in(pipeline, rebuilt_from_ledger(pipeline))
    assert pipeline.spend(PLANNER, "week").tokens == 40


def test_usage_too_late_for_its_hour_is_in_the_day_and_not_in_the_hour_as_before() -> None:
    pipeline = driver()
    pipeline.emit(call(pipeline, input=1))
    early = call(pipeline, input=10)
    pipeline.advance(hours=3)
    pipeline.emit(early)
    rebuilt = rebuilt_from_ledger(pipeline)
    check_same_tables(pipeline, rebuilt)
    assert pipeline.ledger()[-1].late


def test_what_was_idle_for_longer_than_the_bound_is_not_rebuilt() -> None:
    pipeline = driver()
    pipeline.emit(call(pipeline, "acme/research/gone", input=10, run="gone"))
    pipeline.advance(days=62)
    pipeline.emit(call(pipeline, "acme/research/here", input=10, run="here"))
    rebuilt = rebuilt_from_ledger(pipeline)
    assert {scope for _, scope in rebuilt.scopes if scope[:4] in {"agen", "run:"}} == {
        "agent:acme/research/here",
        "run:acme/here",
    }
    assert {scope for _, scope in rebuilt.shared} == {"team:acme/research", "workspace:acme", "run:acme/here"}


def test_a_message_of_the_ledger_that_nobody_can_read_is_counted_and_changes_nothing() -> None:
    pipeline = driver()
    pipeline.emit(call(pipeline, input=10))
    rebuilt = empty(pipeline)
    for value in (b"\xff", b"{}", None, b'{"entries": [{"kind": "charge"}]}', b'{"entries": [{"command": 1}]}'):
        assert not fold_ledger(value, (), rebuilt)
    assert rebuilt.tally.charges == 0
    assert not rebuilt.scopes


@pytest.mark.parametrize(
    "command",
    [
        halt(1),
        halt(2, measure=None, cause=None, window=None, expires_at=START + timedelta(days=1)),
        halt(3, action="degrade", degrade=Degrade(models={"z": "a"}, max_output_tokens=100)),
        halt(4, action="degrade", degrade=Degrade(models={}), by="ada", reason="too dear", budget_version=7),
        halt(5, action="resume", measure=None, cause=None, window=None, expires_at=None),
    ],
    ids=["halt", "bare", "degrade", "degrade to nothing", "resume"],
)
def test_a_command_read_from_the_trail_is_the_one_that_was_written(command: Command) -> None:
    _, row = entry_row(command_entry(command, 0), Place(COMMANDS.name, 0, 0, 0))
    assert _command({name: 0 if value is None else value for name, value in row.items()}) == command


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(operations, operations)
def test_a_new_kafka_goes_on_from_the_trail_and_charges_an_emitters_spool_once(
    before: list[tuple[Any, ...]], after: list[tuple[Any, ...]]
) -> None:
    old = PipelineDriver(budgets=LIMITS, price_book=BOOK, autoflush=False)
    perform(old, before, budgets_change=False)
    settle(old)
    new = PipelineDriver(budgets=LIMITS, price_book=BOOK, autoflush=False, start=old.now_us)
    put_in(new, rebuilt_for_another_kafka(old, new))
    spool: Sequence[Any] = old.records(USAGE.name)
    for record in spool:  # each emitter sends again what it cannot know to have arrived
        new.put(USAGE.name, record.value, key=record.key, partition=(record.partition + 1) % new.partitions)
    perform(new, after, budgets_change=False)
    settle(new)
    truth = Truth.of(record.value for pipeline in (old, new) for record in pipeline.records(USAGE.name))
    for scope, sums in truth.spend.items():
        assert list(new.spend(scope)) == sums, scope
    charged = [entry for pipeline in (old, new) for entry in pipeline.ledger() if entry.kind == "charge"]
    assert len(charged) == truth.calls
    latest = {command.key: command.seq for command in old.commands()}
    known = {command.id for command in old.commands()}
    for command in new.commands():
        assert command.id in known or command.seq > latest.get(command.key, 0)


def test_usage_of_a_new_kafka_at_the_first_offsets_is_counted_and_not_taken_for_old() -> None:
    old = driver()
    for _ in range(5):
        old.emit(call(old, input=10), partition=0)
    new = driver(start=old.now_us)
    put_in(new, rebuilt_for_another_kafka(old, new))
    new.emit(call(new, id="another", input=1), partition=0)
    assert new.spend(PLANNER) == (51 * INPUT_NANOS, 51, 6)
    assert new.spend("team:acme/research") == (51 * INPUT_NANOS, 51, 6)
    first = call(new, id="call-1", input=10)
    new.emit(first, partition=0)
    new.emit(first, partition=1)
    new.emit(call(new, id="call-1", input=10, kind="started"), partition=2)
    assert [entry.kind for entry in new.ledger()] == ["charge", "duplicate", "duplicate"]
    new.crash()
    assert new.spend(PLANNER) == (51 * INPUT_NANOS, 51, 6)


def test_a_deployment_may_get_another_number_of_partitions_with_its_new_kafka() -> None:
    old = driver(partitions=4)
    agents = [f"acme/research/a{number}" for number in range(9)]
    for path in agents:
        old.emit(call(old, path, input=10))
    new = driver(partitions=7, start=old.now_us)
    put_in(new, rebuilt_for_another_kafka(old, new))
    for path in agents:
        new.emit(call(new, path, id=f"new-{path}", input=1))
    assert all(new.spend(f"agent:{path}").tokens == 11 for path in agents)
    assert new.spend("workspace:acme").tokens == 99
