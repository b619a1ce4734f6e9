"""Batches: the same however often they are formed, every origin once, nothing lost to bad bytes."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audit_samples import charge, command_entry, halt, message
from spendfuse.audit.batches import (
    MARKS_BYTES_MAX,
    Batch,
    BatchHeader,
    BatchMismatchError,
    Collector,
    Message,
    form_again,
)
from spendfuse.wire.base import encode
from spendfuse.wire.topics import MESSAGE_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from spendfuse.wire.ledger import LedgerEntry

TOPIC = "spendfuse.ledger.v1"


def sealed(messages: Iterable[Message], rows_max: int = 5_000) -> list[Batch]:
    collector = Collector(TOPIC, 2, 1, 1, {}, rows_max)
    batches = []
    for each in messages:
        if not collector.add(each):
            batches.append(collector.seal())
            assert collector.add(each)
    if len(collector):
        batches.append(collector.seal())
    return batches


def column(batches: Sequence[Batch], table: str, name: str) -> list[Any]:
    return [value for batch in batches for part in batch.tables if part.name == table for value in part.columns[name]]


def values(*values: bytes) -> list[Message]:
    return [Message(10 + nth, 1_700_000_000_000, value) for nth, value in enumerate(values)]


def test_entries_the_meter_repeats_after_a_crash_are_rows_once() -> None:
    batches = sealed(values(message(map(charge, range(10))), message(map(charge, range(4, 15)))))
    assert column(batches, "usage_events", "usage_id") == [f"call-0-{nth}" for nth in range(15)]
    assert batches[-1].header.rows == 15


@settings(max_examples=60, deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(0, 39), st.integers(1, 15), st.integers(1, 6)), min_size=1, max_size=12),
    rows_max=st.integers(1, 12),
)
def test_whatever_is_replayed_and_however_it_is_cut_every_origin_is_a_row_once(
    runs: list[tuple[int, int, int]], rows_max: int
) -> None:
    """Each run starts anywhere at or before where the meter stood, as after a crash, and goes on from there."""
    messages, stood = [], 0
    for start, length, per_message in runs:
        first = min(start, stood)
        nths = range(first, first + length)
        stood = max(stood, nths.stop)
        messages += [
            message(charge(nth, partition=nth % 2) for nth in nths[at : at + per_message])
            for at in range(0, length, per_message)
        ]
    ids = column(sealed(values(*messages), rows_max), "usage_events", "usage_id")
    assert sorted(ids) == sorted(f"call-{nth % 2}-{nth}" for nth in range(stood))


def test_a_batch_formed_again_from_its_header_has_the_same_rows_and_tokens() -> None:
    messages = values(*(message(map(charge, range(nth * 3, nth * 3 + 5))) for nth in range(9)))
    for batch in sealed(messages, rows_max=12):
        header = BatchHeader.model_validate_json(encode(batch.header))  # as Kafka gives it back
        again = form_again(TOPIC, header, messages)
        assert again.tables == batch.tables
        assert [again.token(table.name) for table in again.tables] == [batch.token(t.name) for t in batch.tables]


@pytest.mark.parametrize(
    "change",
    [
        lambda each: [each[0], each[1]._replace(value=message([charge(99)])), *each[2:]],
        lambda each: [each[0], *each[2:]],
        lambda each: [each[0]._replace(offset=each[0].offset + 1), *each[2:]],
        lambda each: [each[0], each[1]._replace(value=None), *each[2:]],
        lambda _each: [],
    ],
    ids=["another value", "a message gone", "another offset", "a tombstone", "nothing left"],
)
def test_a_ledger_that_says_something_else_now_is_not_formed_again(change: Any) -> None:
    messages = values(*(message([charge(nth)]) for nth in range(4)))
    (batch,) = sealed(messages)
    with pytest.raises(BatchMismatchError, match=r"batch 1 of ledger partition 2 \(offsets 10 to 13"):
        form_again(TOPIC, batch.header, change(messages))


def test_equal_messages_in_another_batch_have_another_token() -> None:
    first, second = sealed(values(b"x", b"x"), rows_max=1)
    assert first.token("ledger_events") != second.token("ledger_events")


def test_rows_and_bytes_of_a_batch_are_bounded() -> None:
    batches = sealed(values(*(message(map(charge, range(nth * 4, nth * 4 + 4))) for nth in range(10))), rows_max=10)
    assert [batch.header.rows for batch in batches] == [8] * 5
    big = b"x" * 6_000_000
    assert [len(column([batch], "ledger_events", "kind")) for batch in sealed(values(big, big, big))] == [2, 1]


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=400)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=9).map(
        lambda value: json.dumps({"v": 1, "entries": value}).encode()
    )
)
def test_any_bytes_are_kept_as_unreadable_and_stop_nothing(value: bytes) -> None:
    batches = sealed(values(value, message([charge(1)])))
    assert column(batches, "usage_events", "usage_id") == ["call-0-1"]
    assert set(column(batches, "ledger_events", "kind")) == {"unreadable"}
    assert column(batches, "ledger_events", "src_offset")[0] == 10


def test_an_unreadable_message_keeps_its_reason_and_its_bytes() -> None:
    (batch,) = sealed(values(b"\xffnot json"))
    data = json.loads(column([batch], "ledger_events", "data")[0])
    assert base64.b64decode(data["bytes_base64"]) == b"\xffnot json"
    assert data["bytes_total"] == 9
    assert "Invalid JSON" in data["reason"]
    assert column([batch], "ledger_events", "src_topic") == [TOPIC]
    (huge,) = sealed(values(b"x" * 1_000_000))
    assert len(column([huge], "ledger_events", "data")[0]) < 70_000


def test_a_bad_entry_does_not_take_its_neighbours_with_it() -> None:
    document = json.loads(message([charge(1), charge(2), charge(3)]))
    document["entries"][1]["charge"]["cost_nanos"] = 1.5
    batches = sealed(values(json.dumps(document).encode()))
    assert column(batches, "usage_events", "usage_id") == ["call-0-1", "call-0-3"]
    assert column(batches, "ledger_events", "src_index") == [1]
    assert "cost_nanos" in column(batches, "ledger_events", "data")[0]


def test_a_tombstone_is_unreadable() -> None:
    batches = sealed([Message(5, 1_700_000_000_000, None)])
    assert "tombstone" in column(batches, "ledger_events", "data")[0]


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (charge(1, ts=datetime(2300, 1, 1, tzinfo=UTC)), "usage.ts 2300"),
        (charge(1).model_copy(update={"charge": charge(1).charge.model_copy(update={"rates": [2**70] * 5})}), "rates"),
        (charge(1).model_copy(update={"charge": None}), "without charge"),
        (charge(1).model_copy(update={"usage": None}), "without usage"),
        (command_entry(halt(1), 0).model_copy(update={"command": None}), "without command"),
    ],
)
def test_an_entry_that_no_column_holds_is_kept_as_unreadable(entry: LedgerEntry, says: str) -> None:
    batches = sealed(values(message([entry, charge(2)])))
    assert column(batches, "usage_events", "usage_id") == ["call-0-2"]
    assert says in column(batches, "ledger_events", "data")[0]


def test_two_decisions_of_one_usage_are_both_kept_and_their_replay_is_not() -> None:
    origin = {"topic": "spendfuse.usage.v1", "offset": 3}
    pair = [command_entry(halt(nth), 3, "decision").model_copy(update=origin) for nth in (1, 2)]
    batches = sealed(values(message(pair), message(pair), message([pair[1]])), rows_max=2)
    assert column(batches, "commands", "command_id") == [halt(1).id, halt(2).id]


def test_an_entry_of_another_kind_does_not_bury_the_charges_before_it() -> None:
    rejected = charge(40).model_copy(update={"kind": "rejected", "usage": None, "charge": None, "data": {"why": "?"}})
    batches = sealed(values(message([rejected]), message(map(charge, range(8)))))
    assert len(column(batches, "usage_events", "usage_id")) == 8
    assert column(batches, "ledger_events", "kind") == ["rejected"]


def test_a_charge_that_a_replay_calls_a_duplicate_is_a_row_once() -> None:
    batches = sealed(values(message([charge(1)]), message([charge(1, kind="duplicate")])))
    assert column(batches, "usage_events", "kind") == ["charge"]


def test_a_flood_of_origins_never_makes_a_header_too_large_for_kafka() -> None:
    topic = "t" * 249
    flood = [
        message(charge(nth).model_copy(update={"topic": topic, "partition": nth}) for nth in range(at, at + 500))
        for at in range(0, 3_000, 500)
    ]
    batches = sealed(values(*flood), rows_max=500)
    assert max(len(encode(batch.header)) for batch in batches) < MESSAGE_BYTES_MAX
    kept, refused = column(batches, "usage_events", "kind"), column(batches, "ledger_events", "kind")
    assert len(kept) + len(refused) == 3_000
    assert len(kept) > MARKS_BYTES_MAX // 400
    assert refused
