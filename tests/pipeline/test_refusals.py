"""State and topics that do not fit each other are refused with both numbers, and nothing is acknowledged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pipeline.samples import budget, call, cap, driver
from spendfuse.pipeline.codec import UnreadableStateError
from spendfuse.pipeline.rebuild_mark import RebuildMark
from spendfuse.pipeline.refusal import Ends, StateMismatchError, ending, refuse_half_rebuilt

if TYPE_CHECKING:
    from spendfuse.testing import PipelineDriver

USAGE, PACKED = "spendfuse.usage.v1", "spendfuse.usage.packed.v1"


def recreate(pipeline: PipelineDriver, topic: str) -> None:
    """Delete a topic and make it anew: its records and everybody's offsets on it are gone."""
    for place, log in pipeline._topics._logs.items():
        if place[0] == topic:
            log.clear()
            for reader in (pipeline._intake_reader, pipeline._meter_reader):
                if place in reader._committed:
                    reader._committed[place] = reader._position[place] = 0


def counted(calls: int) -> PipelineDriver:
    pipeline = driver(budget("team:acme/research", cap(10**12)))
    for _ in range(calls):
        pipeline.emit(call(pipeline, input=10), partition=0)
    assert pipeline.spend("team:acme/research").calls == calls
    return pipeline


def test_a_usage_topic_that_was_made_anew_is_refused_with_both_numbers() -> None:
    pipeline = counted(5)
    recreate(pipeline, USAGE)
    pipeline.crash()
    with pytest.raises(StateMismatchError, match=r"usage\.v1 partition 0 up to offset 4, and it ends before offset 1:"):
        pipeline.emit(call(pipeline, input=10), partition=0)
    assert max(pipeline._meter_reader._committed.values()) == 5, "what could not be counted is not acknowledged"


def test_a_usage_topic_that_was_made_anew_and_has_outgrown_the_old_one_cannot_be_told_and_is_not_refused() -> None:
    pipeline = counted(2)
    recreate(pipeline, USAGE)
    for _ in range(4):
        pipeline._topics.append(USAGE, 0, key=None, value=b"{}", headers=(), timestamp_ms=0)
    pipeline.crash()
    pipeline.emit(call(pipeline, input=10), partition=0)
    assert pipeline.spend("team:acme/research").calls == 3


def test_a_packed_topic_that_was_made_anew_is_refused_before_new_shares_pass_for_old() -> None:
    pipeline = counted(5)
    recreate(pipeline, PACKED)
    pipeline.crash()
    with pytest.raises(StateMismatchError, match=r"usage\.packed\.v1 partition \d up to offset 4, and it ends before"):
        pipeline.emit(call(pipeline, input=10), partition=0)


def test_a_crash_and_its_replays_are_no_mismatch() -> None:
    pipeline = driver(budget("team:acme/research", cap(10**12)), autoflush=False)
    for number in range(20):
        pipeline.emit(call(pipeline, input=10), partition=number % 4)
        if number % 3 == 0:
            pipeline.flush()
        if number % 5 == 0:
            pipeline.crash()
    pipeline.flush()
    assert pipeline.spend("team:acme/research").calls == 20


def test_a_slot_of_ids_that_cannot_be_read_is_refused() -> None:
    pipeline = counted(1)
    slot = next(nth for nth, record in enumerate(pipeline.changelog) if record.table == "ids")
    pipeline.changelog[slot] = pipeline.changelog[slot]._replace(value=b"\x00shor")
    with pytest.raises(UnreadableStateError, match=r"slot 0 of partition \d: a slot of remembered ids has 5 bytes"):
        pipeline.crash()


async def test_an_end_that_lags_after_a_change_of_leaders_is_asked_for_again_before_it_is_believed() -> None:
    answers = [3, 3, 10]
    asked: list[tuple[str, int]] = []

    async def end_of(topic: str, partition: int) -> int:
        asked.append((topic, partition))
        return answers[len(asked) - 1]

    ends = Ends(end_of, 0.0)
    await ends.vouch(USAGE, 1, 9)
    await ends.vouch(USAGE, 1, 8)
    assert asked == [(USAGE, 1)] * 3, "what is known is not asked for"


def test_a_rebuild_that_has_not_ended_is_named_with_its_beginning_and_what_to_run() -> None:
    mark = RebuildMark(phase="writing", source="clickhouse", at_us=1_800_000_000_000_000)
    with pytest.raises(StateMismatchError, match=r"began at 2027-01-15T08:00:00.000000Z and has not ended") as said:
        refuse_half_rebuilt(mark)
    assert "`spendfuse state rebuild --from clickhouse` again" in str(said.value)
    refuse_half_rebuilt(mark.model_copy(update={"phase": "done"}))
    refuse_half_rebuilt(None)


def test_the_sentence_reaches_what_ends_the_process() -> None:
    said: list[str] = []
    with pytest.raises(UnreadableStateError), ending(said.append):
        raise UnreadableStateError("version 9")
    assert said == ["version 9"]
