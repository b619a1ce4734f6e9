"""A command that no usage led to is not said anew by a worker that starts after a crash, at whatever later time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pipeline.samples import budget, call, cap, driver
from spendfuse.wire.topics import COMMANDS

if TYPE_CHECKING:
    from spendfuse.testing import PipelineDriver

SCOPES = {"agent:acme/*/*": "agent:acme/research/planner", "team:acme/*": "team:acme/research"}


def spent(pattern: str) -> PipelineDriver:
    """Return a deployment that has spent 100 tokens of 1,000, all of it durable."""
    pipeline = driver(budget(pattern, cap(1_000, unit="tokens"), name="b"), autoflush=False)
    pipeline.emit(call(pipeline, input=100))
    pipeline.flush()
    pipeline.flush()
    assert pipeline.commands() == []
    return pipeline


def standing(pipeline: PipelineDriver) -> list[str]:
    """Return the action of the latest command, which a guard obeys; a day's halt lasts longer than these tests."""
    return [max(pipeline.commands(), key=lambda each: each.seq).action] if pipeline.commands() else []


def orders(pipeline: PipelineDriver) -> list[tuple[str, int, str]]:
    """Return what was commanded; a repetition of the same record counts once."""
    return list(dict.fromkeys((each.id, each.seq, each.action) for each in pipeline.commands()))


@pytest.mark.parametrize("pattern", SCOPES)
@pytest.mark.parametrize("away_s", [0, 1, 3_600])
def test_a_halt_that_a_lowered_cap_calls_for_is_one_command_over_a_crash_before_the_flush(
    pattern: str, away_s: int
) -> None:
    pipeline = spent(pattern)
    pipeline.apply_budget(budget(pattern, cap(50, unit="tokens"), name="b", version=2))
    halted = orders(pipeline)
    assert [action for *_, action in halted] == ["halt"]
    pipeline.advance(away_s)
    pipeline.crash()
    pipeline.flush()
    pipeline.crash()
    pipeline.flush()
    assert orders(pipeline) == halted
    assert len({alert.id for alert in pipeline.alerts()}) == 1, "its alert neither"


@pytest.mark.parametrize("pattern", SCOPES)
@pytest.mark.parametrize("records", range(8))
def test_power_lost_at_any_record_of_a_changed_budget_leaves_one_halt_and_one_resume(
    pattern: str, records: int
) -> None:
    pipeline = spent(pattern)
    for version, amount in enumerate([50, 5_000], 2):
        pipeline.crash(after_records=records)
        pipeline.apply_budget(budget(pattern, cap(amount, unit="tokens"), name="b", version=version))
        pipeline.flush()
        pipeline.advance(2)
        pipeline.crash()
        pipeline.flush()
        pipeline.advance(2)
    assert [action for *_, action in orders(pipeline)] == ["halt", "resume"]
    sequences = [seq for _, seq, _ in orders(pipeline)]
    assert sequences == sorted(sequences)


def test_after_a_halt_that_was_found_again_the_next_command_is_newer_than_it() -> None:
    pattern = "agent:acme/*/*"
    pipeline = spent(pattern)
    pipeline.apply_budget(budget(pattern, cap(50, unit="tokens"), name="b", version=2))
    pipeline.advance(5)
    pipeline.crash()
    pipeline.flush()
    pipeline.apply_budget(budget(pattern, cap(5_000, unit="tokens"), name="b", version=3))
    halt, resume = pipeline.commands()
    assert (halt.action, resume.action) == ("halt", "resume")
    assert resume.seq > halt.seq


def test_another_version_of_a_budget_says_its_own_halt_also_after_a_crash() -> None:
    pattern = "agent:acme/*/*"
    pipeline = spent(pattern)
    pipeline.apply_budget(budget(pattern, cap(50, unit="tokens"), name="b", version=2))
    pipeline.apply_budget(budget(pattern, cap(40, unit="tokens"), name="b", version=3))
    pipeline.crash()
    pipeline.flush()
    versions = [command.budget_version for command in pipeline.commands()]
    assert versions[0] == 2
    assert versions[-1] == 3 or len(versions) == 1, "the same order under a new version need not be said"


def test_a_resume_by_a_deadline_is_one_command_over_a_crash_before_the_flush() -> None:
    pipeline = driver(budget("agent:acme/*/*", cap(100, unit="tokens"), name="b"), autoflush=False)
    pipeline.emit(call(pipeline, input=200, kind="started"))
    pipeline.flush()
    assert [command.action for command in pipeline.commands()] == ["halt"]
    pipeline.advance(seconds=601)
    pipeline.crash(after_records=1)
    pipeline.flush()
    pipeline.advance(seconds=7)
    pipeline.crash()
    pipeline.flush()
    pipeline.flush()
    assert [action for *_, action in orders(pipeline)] == ["halt", "resume"]
    assert len(pipeline.records(COMMANDS.name)) == 2, "what lies there is not written again either"


@pytest.mark.parametrize("pattern", SCOPES)
@pytest.mark.parametrize("withdrawn", [False, True], ids=["raised", "withdrawn"])
def test_a_halt_whose_state_is_lost_is_lifted_when_its_budget_is_changed_before_the_next_worker_starts(
    pattern: str, *, withdrawn: bool
) -> None:
    def change() -> None:
        if withdrawn:
            pipeline.withdraw_budget("b")
        else:
            pipeline.apply_budget(budget(pattern, cap(5_000, unit="tokens"), name="b", version=2))

    lost = 0
    for records in range(24):
        pipeline = spent(pattern)
        pipeline.crash(after_records=records, meanwhile=change)
        pipeline.emit(call(pipeline, input=950))
        for _ in range(2):
            pipeline.flush()
        pipeline.advance(1)
        pipeline.crash()
        pipeline.flush()
        assert standing(pipeline) in ([], ["resume"]), records
        lost += standing(pipeline) == ["resume"]
    assert lost > 0, "no crash came between a halt and its state: then nothing was proved"


@pytest.mark.parametrize("pattern", SCOPES)
def test_a_halt_whose_state_is_lost_stands_when_its_changed_budget_is_reached_all_the_same(pattern: str) -> None:
    for records in range(24):
        pipeline = spent(pattern)
        changed = budget(pattern, cap(1_040, unit="tokens"), name="b", version=2)
        pipeline.crash(after_records=records, meanwhile=lambda at=pipeline, to=changed: at.apply_budget(to))
        pipeline.emit(call(pipeline, input=950))
        for _ in range(2):
            pipeline.flush()
        pipeline.crash()
        pipeline.flush()
        assert standing(pipeline) == ["halt"], records
        assert pipeline.commands()[-1].seq == max(command.seq for command in pipeline.commands())


@pytest.mark.parametrize("pattern", SCOPES)
def test_a_warning_of_calls_in_flight_that_are_over_is_not_taken_back_by_a_worker_that_starts(pattern: str) -> None:
    pipeline = driver(budget(pattern, cap(1_000, unit="tokens", warn=[5_000]), name="b"), autoflush=False)
    for kind, tokens in (("started", 600), ("finished", 10)):
        pipeline.emit(call(pipeline, id="one", input=tokens, kind=kind))
        pipeline.flush()
        pipeline.flush()
    pipeline.crash()
    pipeline.flush()
    assert [action for *_, action in orders(pipeline)] == ["warn"], "nothing has changed but the process"


@pytest.mark.parametrize("pattern", SCOPES)
def test_a_halt_that_calls_in_flight_gave_a_changed_cap_is_lifted_after_them_though_its_state_was_lost(
    pattern: str,
) -> None:
    lost = 0
    for records in range(12):
        pipeline = driver(budget(pattern, cap(1_000, unit="tokens"), name="b"), autoflush=False)
        pipeline.emit(call(pipeline, input=200, kind="started"))
        pipeline.flush()
        pipeline.flush()
        pipeline.crash(after_records=records)
        pipeline.apply_budget(budget(pattern, cap(100, unit="tokens"), name="b", version=2))
        at_once = [action for *_, action in orders(pipeline)]
        pipeline.advance(seconds=601)
        for _ in range(2):
            pipeline.flush()
        assert at_once[:1] == ["halt"], records
        assert standing(pipeline) == ["resume"], records
        lost += len(orders(pipeline)) == 2
    assert lost > 0
