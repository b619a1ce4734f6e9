"""What has been idle for long enough is forgotten, a little at each flush; what comes after is counted rightly."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.samples import INPUT_NANOS, budget, call, cap, driver
from spendfuse.engine.due import STALE_MAX, Due
from spendfuse.engine.idle import DAY_US, bound_us, scope_is_idle
from spendfuse.engine.policies import Policies
from spendfuse.engine.spend import Hold, Spend
from spendfuse.engine.state import Fired, Fuse, ScopeState
from spendfuse.pipeline.sweep import INTERVAL_US, KEYS_MAX, Sweep
from spendfuse.wire import LedgerBatch
from spendfuse.wire.topics import LEDGER, PACKED, ROLLUPS

if TYPE_CHECKING:
    from spendfuse.testing import PipelineDriver

IDLE_DAYS = 66
"""A month's window, its grace, and 35 days."""
AGENT = "agent:acme/research/old"


def stored(pipeline: PipelineDriver) -> set[str]:
    """The scopes that a worker would find after a restart, of both tables."""
    keys: dict[tuple[str, bytes], Any] = {}
    for record in pipeline.changelog:
        keys[(record.table, record.key)] = record.value
    return {
        f"{table} {key.decode().partition('/')[2]}"
        for (table, key), value in keys.items()
        if value is not None and table != "ids"
    }


def sweep(pipeline: PipelineDriver, rounds: int = 4) -> None:
    """Let some flushes pass, with other usage between them: a partition that is never read is never swept."""
    for _ in range(rounds):
        pipeline.advance(hours=2)
        for number in range(8):
            pipeline.emit(call(pipeline, f"acme/others/o{number}", input=1, run="other"))


def old(pipeline: PipelineDriver, **fields: Any) -> Any:
    return call(pipeline, "acme/research/old", run="old-run", **fields)


def test_a_scope_whose_windows_have_closed_leaves_memory_and_changelog_and_starts_anew() -> None:
    pipeline = driver()
    pipeline.emit(old(pipeline, input=10))
    sweep(pipeline)
    assert f"scopes {AGENT}" in stored(pipeline)
    pipeline.advance(days=IDLE_DAYS)
    sweep(pipeline)
    left = stored(pipeline)
    gone = {f"scopes {AGENT}", "scopes team:acme/research", "shared team:acme/research", "scopes run:acme/old-run"}
    assert not left & (gone | {"shared run:acme/old-run"})
    assert {"shared workspace:acme", "shared team:acme/others"} <= left
    assert all(AGENT not in pending.meter.states for pending in pipeline._meter._partitions.values())
    pipeline.emit(old(pipeline, input=3))
    for scope in (AGENT, "team:acme/research", "run:acme/old-run"):
        assert pipeline.spend(scope) == (3 * INPUT_NANOS, 3, 1)
    pipeline.crash()
    assert pipeline.spend(AGENT, "month").tokens == 3


def test_nothing_is_forgotten_before_its_windows_close_though_it_is_idle_for_longer_than_the_bound() -> None:
    pipeline = driver()
    pipeline.emit(old(pipeline, input=10, ts=pipeline.now))
    pipeline.advance(days=20)
    sweep(pipeline)
    assert f"scopes {AGENT}" in stored(pipeline), "January is not over"
    assert pipeline.spend(AGENT, "month").tokens == 10


def test_a_run_is_forgotten_by_its_idleness_alone_and_not_while_it_is_used() -> None:
    pipeline = driver(budget("run:acme/*", cap(10**9, window="run")))
    for _ in range(10):
        pipeline.emit(call(pipeline, "acme/research/live", run="long", input=1))
        pipeline.advance(days=30)
        sweep(pipeline, 1)
    assert pipeline.spend("run:acme/long", "run").calls == 10
    pipeline.advance(days=36)
    sweep(pipeline)
    assert not {each for each in stored(pipeline) if "run:acme/long" in each}


def test_a_run_that_slept_on_one_partition_and_lived_on_another_keeps_its_whole_sum() -> None:
    pipeline = driver(budget("run:acme/*", cap(10**9, window="run")))
    agents = [f"acme/research/a{number}" for number in range(12)]
    for path in agents:
        pipeline.emit(call(pipeline, path, run="tree", input=100))
    for _ in range(4):
        pipeline.advance(days=20)
        pipeline.emit(call(pipeline, agents[0], run="tree", input=1))
        sweep(pipeline, 3)
    shares = {each for each in stored(pipeline) if each == "scopes run:acme/tree"}
    assert shares, "one partition's share lives"
    assert pipeline.spend("run:acme/tree", "run").tokens == 12 * 100 + 4
    for nth in (1, 2):  # the others come back, and begin their shares anew
        for path in agents:
            pipeline.emit(call(pipeline, path, run="tree", input=10))
        assert pipeline.spend("run:acme/tree", "run").tokens == 12 * 100 + 4 + 120 * nth
    late = pipeline.records(ROLLUPS.name)
    for record in late:  # every share once more
        pipeline.put(ROLLUPS.name, record.value, key=record.key, partition=record.partition)
    assert pipeline.spend("run:acme/tree", "run").tokens == 12 * 100 + 4 + 240


def test_messages_that_come_again_after_a_scope_was_forgotten_charge_nobody_twice() -> None:
    pipeline = driver()
    pipeline.emit(old(pipeline, input=10))
    pipeline.advance(days=IDLE_DAYS)
    sweep(pipeline)
    assert f"scopes {AGENT}" not in stored(pipeline)
    pipeline._meter_reader._committed = dict.fromkeys(pipeline._meter_reader._committed, 0)
    pipeline.crash()  # with the group's offsets lost: everything that the topic still holds is read again
    assert len(pipeline.records(PACKED.name)) > 1
    assert pipeline.spend(AGENT, "month").tokens == 0
    ids = [entry.usage.id for entry in pipeline.ledger() if entry.kind == "charge"]
    assert len(ids) == len(set(ids))


def test_a_crash_between_any_two_records_of_a_sweep_loses_no_sum() -> None:
    for records in range(0, 40, 3):
        pipeline = driver(autoflush=False)
        pipeline.emit(old(pipeline, input=10))
        pipeline.flush()
        pipeline.advance(days=IDLE_DAYS)
        pipeline.emit(old(pipeline, input=1))
        pipeline.emit(call(pipeline, "acme/others/o", input=1))
        pipeline.crash(after_records=records)
        pipeline.flush()
        pipeline.crash()
        pipeline.flush()
        pipeline.flush()
        assert pipeline.spend(AGENT, "month").tokens == 1
        assert pipeline.spend("team:acme/research", "month").tokens == 1


@pytest.mark.parametrize("kind", ["agent:acme/*/*", "run:acme/*"])
def test_a_sequence_never_falls_although_the_scope_was_forgotten_in_between(kind: str) -> None:
    window = "run" if kind.startswith("run") else "day"
    pipeline = driver(budget(kind, cap(50, unit="tokens", window=window)))
    for _ in range(3):
        pipeline.emit(old(pipeline, input=60))
        pipeline.advance(days=IDLE_DAYS)
        sweep(pipeline)
        assert not {each for each in stored(pipeline) if "old" in each}
        pipeline.emit(old(pipeline, input=60, ts=pipeline.now - timedelta(days=6)))  # the oldest that may come
    halts = [each.seq for each in pipeline.commands() if "old" in each.scope and each.action == "halt"]
    assert len(halts) >= 3
    assert halts == sorted(set(halts))


def test_what_stands_or_is_in_flight_or_was_commanded_lately_is_kept() -> None:
    now_us, idle_us = 1_800_000_000_000_000, bound_us(35, 7 * 86_400)
    spend = Spend(first_us=1, newest_us=now_us - idle_us - 1)
    policies = Policies()

    def idle(**more: Any) -> bool:
        state = ScopeState(spend=more.pop("spend", spend), **more)
        return scope_is_idle("agent:a/b/c", state, policies, now_us, idle_us)

    def fuse(seq_us: int, until_us: int) -> dict[str, Fuse]:
        return {"b|c": Fuse(seq_us, {"w": Fired(10_000, until_us, "halt")})}

    assert idle()
    assert idle(fuses=fuse(now_us - 50 * DAY_US, now_us - 1))
    assert not idle(fuses=fuse(now_us - 50 * DAY_US, now_us + 1)), "it stands"
    assert not idle(fuses=fuse(now_us - 34 * DAY_US, now_us - 1)), "a later command might have an older sequence"
    assert not idle(fuses=fuse(now_us - 40 * DAY_US, 2**62)), "its command still lies in its topic"
    assert idle(fuses=fuse(now_us - 46 * DAY_US, 2**62))
    held = Spend(first_us=1, newest_us=spend.newest_us, holds={"x": Hold(1, 1, now_us + 1)})
    assert not idle(spend=held)
    assert not idle(spend=Spend(first_us=1, newest_us=spend.newest_us + 2))
    slot = now_us // (300 * 1_000_000 // 60)
    assert not idle(spend=Spend(rolling={300: {slot: [1, 1, 1]}}, first_us=1, newest_us=spend.newest_us))


def test_the_bound_is_never_shorter_than_what_may_still_come() -> None:
    assert bound_us(35, 7 * 86_400) == 35 * DAY_US
    assert bound_us(1, 7 * 86_400) == 21 * DAY_US
    assert bound_us(35, 100 * 86_400) == 114 * DAY_US


def test_a_sweep_takes_a_few_keys_at_a_time_and_rests_until_its_interval_is_over() -> None:
    asked = []

    def keys() -> list[bytes]:
        asked.append(1)
        return [f"{number % 3}/agent:{number}".encode() for number in range(KEYS_MAX * 2 + 1)]

    under_test = Sweep(keys)
    sizes = [len(under_test.take(0)) for _ in range(5)]
    assert sizes == [KEYS_MAX, KEYS_MAX, 1, 0, 0]
    assert len(under_test.take(INTERVAL_US - 1)) == 0
    assert len(under_test.take(INTERVAL_US)) == KEYS_MAX
    assert len(asked) == 2


def test_what_is_due_is_bounded_although_the_instant_is_moved_again_and_again() -> None:
    due = Due()
    for instant in range(50_000, 0, -1):
        due.watch("same", instant)
    assert len(due._heap) <= STALE_MAX + 3
    assert due.take(0) == []
    assert due.take(1) == ["same"]
    assert len(due) == 0


def test_the_ledger_keeps_what_the_tables_forget() -> None:
    pipeline = driver()
    pipeline.emit(old(pipeline, input=10))
    pipeline.advance(days=IDLE_DAYS)
    sweep(pipeline)
    batches = [LedgerBatch.model_validate_json(record.value or b"") for record in pipeline.records(LEDGER.name)]
    assert any(entry.usage and entry.usage.agent == "old" for batch in batches for entry in batch.entries)
