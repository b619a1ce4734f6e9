"""At-least-once transport, exactly-once effect: sums, ledger and commands after any mix of crashes and repetitions."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.oracle import Truth
from pipeline.samples import BOOK, INPUT_NANOS, budget, call, cap, driver
from spendfuse.engine.ids import IDS_PER_SLOT
from spendfuse.pipeline.codec import UnreadableStateError
from spendfuse.pipeline.ledger_text import entry_texts
from spendfuse.pipeline.publish import Publisher
from spendfuse.testing import PipelineDriver
from spendfuse.testing.memory import MemoryOutbox, MemoryTopics, Power
from spendfuse.wire import LedgerBatch, LedgerEntry, Packed, Tokens, Usage, UsagePack, encode
from spendfuse.wire.topics import LEDGER, MESSAGE_BYTES_MAX, PACKED, ROLLUPS, USAGE

if TYPE_CHECKING:
    from collections.abc import Sequence

AGENTS = ("acme/research/a0", "acme/research/a1", "acme/sales/b0", "other/ops/c0")
START = datetime(2026, 1, 5, tzinfo=UTC)
CAP_TOKENS = 100
LIMITS = [
    budget("agent:*/*/*", cap(CAP_TOKENS, unit="tokens"), name="agents"),
    budget("team:*/*", cap(2 * CAP_TOKENS, unit="tokens"), name="teams"),
    budget("workspace:acme", cap(3 * CAP_TOKENS, unit="tokens", window="month"), name="acme"),
]

partitions = st.integers(0, 2)
usages = st.builds(
    lambda agent, call_id, run, tokens, model: {
        "agent_path": AGENTS[agent],
        "id": f"c{call_id}",
        "run": f"r{run}",
        "root_run": "root" if run == 2 else None,
        # The same id has the same content: a repetition is the same call once more.
        "tokens": Tokens(input=tokens * (call_id % 7 + 1), output=call_id % 5),
        "model": model,
    },
    st.integers(0, len(AGENTS) - 1),
    st.integers(0, 40),
    st.just(0),
    st.just(9),
    st.just("claude"),
)
started = st.tuples(st.just("start"), usages, partitions)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("emit"), usages, partitions),
        st.tuples(st.just("emit"), usages, partitions),
        st.tuples(st.just("pack"), st.lists(usages, min_size=1, max_size=12), partitions),
        started,
        st.tuples(st.just("garbage"), st.binary(max_size=5), partitions),
        st.tuples(st.just("flush")),
        st.tuples(st.just("crash")),
        st.tuples(st.just("crash"), st.integers(0, 25)),
        st.tuples(st.just("reassign")),
        st.tuples(st.just("wait"), st.integers(1, 30)),
        st.tuples(st.just("budget"), st.integers(100, 1_000)),
        st.tuples(st.just("withdraw")),
    ),
    min_size=8,
    max_size=60,
)


def usage(pipeline: PipelineDriver, fields: dict[str, Any], **more: Any) -> Usage:
    content = dict(fields)
    return pipeline.usage(content.pop("agent_path"), **content, **more)


def perform(pipeline: PipelineDriver, steps: Sequence[tuple[Any, ...]], *, budgets_change: bool = True) -> None:
    for version, (step, *values) in enumerate(steps, start=2):
        if step in {"emit", "start", "pack", "garbage"}:
            put(pipeline, step, *values)
        elif step == "budget" and budgets_change:
            limit = cap(values[0], unit="tokens")
            pipeline.apply_budget(budget("team:acme/*", limit, name="teams", version=version))
        elif step == "withdraw" and budgets_change:
            pipeline.withdraw_budget("teams")
        elif step == "wait":
            pipeline.advance(seconds=values[0])
        elif step in {"flush", "crash", "reassign"}:
            getattr(pipeline, step)(*values)


def put(pipeline: PipelineDriver, step: str, content: Any, partition: int) -> None:
    what: Any = b"!"
    if step == "emit":
        what = usage(pipeline, content)
    elif step == "start":
        what = usage(pipeline, content, kind="started")
    elif step == "pack":
        what = [usage(pipeline, fields) for fields in content]
    else:
        what += content
    pipeline.emit(what, partition=partition)


def settle(pipeline: PipelineDriver) -> None:
    """Let a crash that is still to come happen, then make everything durable."""
    pipeline.crash()
    pipeline.flush()
    pipeline.flush()


def truth_of(pipeline: PipelineDriver) -> Truth:
    return Truth.of(record.value for record in pipeline.records(USAGE.name))


def check_sums(pipeline: PipelineDriver) -> None:
    truth = truth_of(pipeline)
    for scope, sums in truth.spend.items():
        assert list(pipeline.spend(scope)) == sums, scope
        assert list(pipeline.spend(scope, "month")) == sums, scope
    entries = pipeline.ledger()
    charges = [entry for entry in entries if entry.kind == "charge"]
    assert len(charges) == truth.calls
    by_agent: Counter[str] = Counter()
    for entry in charges:
        by_agent[f"agent:{entry.usage.agent_path}"] += entry.charge.cost_nanos
    assert by_agent == {scope: sums[0] for scope, sums in truth.spend.items() if scope.startswith("agent:") and sums[0]}
    assert len([entry for entry in entries if entry.kind == "duplicate"]) == truth.duplicates


def check_ledger_order(pipeline: PipelineDriver) -> None:
    """What the audit's trimming relies on: of one origin, what is new comes in growing order."""
    reached: dict[tuple[int, str, int], list[tuple[int, int]]] = defaultdict(list)
    seen = set()
    for record in pipeline.records(LEDGER.name):
        for entry in json.loads(record.value)["entries"]:
            origin = (record.partition, entry["topic"], entry["partition"])
            position = (entry["offset"], entry.get("index", 0))
            if (origin, position) not in seen:
                seen.add((origin, position))
                assert not reached[origin] or reached[origin][-1] < position, origin
                reached[origin].append(position)


def check_control_is_recorded(pipeline: PipelineDriver) -> None:
    recorded = {
        (entry.topic, entry.offset) for entry in pipeline.ledger() if entry.kind in {"command", "alert", "budget"}
    }
    for name in ("commands", "alerts", "budgets"):
        for record in pipeline.records(f"spendfuse.{name}.v1"):
            assert (record.topic, record.offset) in recorded


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(operations)
def test_sums_ledger_and_duplicates_are_exact_after_any_crashes(steps: list[tuple[Any, ...]]) -> None:
    pipeline = PipelineDriver(budgets=LIMITS, price_book=BOOK, autoflush=False)
    perform(pipeline, steps)
    settle(pipeline)
    check_sums(pipeline)
    check_ledger_order(pipeline)
    check_control_is_recorded(pipeline)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(operations)
def test_every_cap_that_was_reached_is_commanded_once_whatever_crashed(steps: list[tuple[Any, ...]]) -> None:
    steps = [step for step in steps if step[0] != "start"]
    pipeline = PipelineDriver(budgets=LIMITS, price_book=BOOK, autoflush=False)
    perform(pipeline, steps, budgets_change=False)
    settle(pipeline)
    spend = truth_of(pipeline).spend
    reached = {
        scope
        for scope, (_, tokens, _) in spend.items()
        if tokens >= {"agent": 1, "team": 2, "workspace": 3, "run": 10**9}[scope.partition(":")[0]] * CAP_TOKENS
        and scope != "workspace:other"
    }
    commands = pipeline.commands()
    assert {command.scope for command in commands} == reached
    ids = defaultdict(set)
    for command in commands:
        assert command.action == "halt"
        ids[command.key].add((command.id, command.seq))
    assert all(len(same) == 1 for same in ids.values()), "a replay gives the same command again"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(operations)
def test_a_worker_that_crashes_ends_where_one_that_never_did_ends(steps: list[tuple[Any, ...]]) -> None:
    calm = [step for step in steps if step[0] not in {"crash", "reassign", "flush"}]
    crashed = PipelineDriver(budgets=LIMITS, price_book=BOOK, autoflush=False)
    smooth = PipelineDriver(budgets=LIMITS, price_book=BOOK)
    perform(crashed, steps, budgets_change=False)
    perform(smooth, calm, budgets_change=False)
    settle(crashed)
    assert crashed.wallet() == smooth.wallet()


def test_what_is_not_durable_is_lost_in_a_crash_and_comes_again() -> None:
    pipeline = driver(autoflush=False)
    pipeline.emit(call(pipeline, input=5))
    assert pipeline.changelog == []
    assert pipeline.spend("agent:acme/research/planner").tokens == 0, "not durable yet"
    pipeline.crash()
    pipeline.flush()
    assert pipeline.spend("agent:acme/research/planner").tokens == 5
    assert pipeline.spend("team:acme/research").tokens == 5
    assert [entry.kind for entry in pipeline.ledger()] == ["charge"]
    assert len(pipeline.ledger(trimmed=False)) > 1, "the ledger has it twice, and is trimmed by origin"


def test_power_lost_at_every_single_record_of_a_flush_changes_nothing() -> None:
    for records in range(60):
        pipeline = PipelineDriver(budgets=LIMITS, price_book=BOOK, autoflush=False)
        for partition in range(3):
            pipeline.emit([pipeline.usage(agent, model="claude", input=150) for agent in AGENTS], partition=partition)
        pipeline.crash(after_records=records)
        pipeline.flush()
        settle(pipeline)
        check_sums(pipeline)
        check_ledger_order(pipeline)
        teams = {"team:acme/research", "team:acme/sales", "team:other/ops"}
        halted = {command.scope for command in pipeline.commands()}
        assert halted == {*(f"agent:{path}" for path in AGENTS), *teams, "workspace:acme"}


def test_the_intake_repeats_a_round_and_nothing_is_charged_twice() -> None:
    pipeline = driver(autoflush=False)
    for partition in range(4):
        pipeline.emit([call(pipeline, f"acme/t/a{n}", input=1) for n in range(5)], partition=partition)
    before = len(pipeline.records(PACKED.name))
    pipeline.crash()
    pipeline.flush()
    assert len(pipeline.records(PACKED.name)) > before
    check_sums(pipeline)


def test_the_same_call_from_elsewhere_is_a_duplicate_also_after_a_restart() -> None:
    pipeline = driver()
    again = call(pipeline, id="once", input=5)
    pipeline.emit(again, partition=0)
    pipeline.crash()
    pipeline.emit(again, partition=0)
    pipeline.emit(again, partition=3)
    assert [entry.kind for entry in pipeline.ledger()] == ["charge", "duplicate", "duplicate"]
    assert pipeline.spend("agent:acme/research/planner") == (5 * INPUT_NANOS, 5, 1)


def test_ids_are_remembered_over_more_than_one_slot_and_a_restart() -> None:
    pipeline = driver()
    many = [call(pipeline, id=f"c{number}", input=1) for number in range(IDS_PER_SLOT * 2 + 300)]
    for start in range(0, len(many), 500):
        pipeline.emit(many[start : start + 500], partition=0)
    pipeline.crash()
    for start in range(0, len(many), 500):
        pipeline.emit(many[start : start + 500], partition=1)
    assert pipeline.spend("agent:acme/research/planner").calls == len(many)
    kinds = Counter(entry.kind for entry in pipeline.ledger())
    assert kinds == {"charge": len(many), "duplicate": len(many)}


def test_the_same_id_of_another_agent_is_another_call() -> None:
    pipeline = driver()
    for agent in AGENTS:
        pipeline.emit(call(pipeline, agent, id="x", input=1))
    assert {entry.kind for entry in pipeline.ledger()} == {"charge"}


def test_a_rollup_that_comes_late_does_not_replace_a_newer_one() -> None:
    pipeline = driver()
    pipeline.emit(call(pipeline, input=1))
    old = next(record for record in pipeline.records(ROLLUPS.name) if record.key == b"team:acme/research")
    pipeline.emit(call(pipeline, input=1))
    pipeline.put(ROLLUPS.name, old.value, key=old.key, partition=old.partition)
    assert pipeline.spend("team:acme/research").tokens == 2


def test_a_partition_taken_away_and_given_back_starts_from_what_is_durable() -> None:
    pipeline = driver(autoflush=False)
    pipeline.emit(call(pipeline, input=1))
    pipeline.flush()
    pipeline.emit(call(pipeline, input=1))
    pipeline.reassign()
    pipeline.flush()
    assert pipeline.spend("agent:acme/research/planner").tokens == 2
    assert pipeline.spend("team:acme/research").tokens == 2


def test_the_largest_packed_message_gives_a_ledger_message_that_kafka_takes() -> None:
    pipeline = driver(partitions=1, autoflush=False)
    for nth in range(4):
        pack = [call(pipeline, f"acme/t/a{nth}-{number}", input=1, run="r") for number in range(500)]
        assert len(encode(UsagePack(usages=pack))) < MESSAGE_BYTES_MAX
        pipeline.emit(pack, partition=0)
    pipeline.crash()  # the intake reads them again, all at once
    pipeline.flush()
    largest = max(len(Packed.model_validate_json(record.value).usages) for record in pipeline.records(PACKED.name))
    assert largest > 1_000
    assert 500_000 < max(len(record.value) for record in pipeline.records(LEDGER.name)) <= 900_100
    check_sums(pipeline)
    check_ledger_order(pipeline)


async def test_many_entries_are_split_into_messages_that_kafka_takes_in_their_order() -> None:
    power, topics = Power(), MemoryTopics(1)
    publisher = Publisher(MemoryOutbox(topics, power, lambda: 0), None, 1)
    entries = [
        LedgerEntry(
            kind="price", topic="t", partition=0, offset=offset, at=START, data={"x": "y" * (offset * 7 % 4_000)}
        )
        for offset in range(1_500)
    ]
    await publisher.ledger(0, "name", entry_texts(entries), 0)
    sizes = [len(record.value or b"") for record in topics.records(LEDGER.name)]
    assert len(sizes) == 4
    assert 850_000 < max(sizes) <= 900_100
    written = [LedgerBatch.model_validate_json(record.value or b"") for record in topics.records(LEDGER.name)]
    assert [entry.offset for batch in written for entry in batch.entries] == list(range(1_500))


def test_a_state_of_another_version_is_refused_and_not_guessed_at() -> None:
    pipeline = driver()
    pipeline.emit(call(pipeline, input=1))
    for record in list(pipeline.changelog):
        if record.table == "scopes":
            pipeline.changelog.append(record._replace(value=b"\x09" + record.value[1:]))
    with pytest.raises(UnreadableStateError, match="run the version that wrote it"):
        pipeline.crash()
