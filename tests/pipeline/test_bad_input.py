"""Any bytes on any topic: what cannot be used is refused with reason and origin, and the worker goes on."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.samples import INPUT_NANOS, budget, call, cap, driver
from spendfuse.wire import Ack, Command, LedgerBatch, PriceOverride, PriceRow, Rates, encode
from spendfuse.wire.topics import (
    ACKS,
    ALERTS,
    BATCHES,
    BUDGETS,
    CHECKPOINTS,
    COMMANDS,
    DEAD_LETTERS,
    HEARTBEATS,
    LEDGER,
    PACKED,
    PRICES,
    ROLLUPS,
    TOPICS,
    USAGE,
)

if TYPE_CHECKING:
    from spendfuse.testing import PipelineDriver

INT64_MAX = 2**63 - 1


def body(pipeline: PipelineDriver, **changes: Any) -> dict[str, Any]:
    usage: dict[str, Any] = json.loads(encode(call(pipeline, input=1)))
    return {key: value for key, value in (usage | changes).items() if value is not ...}


def still_works(pipeline: PipelineDriver) -> None:
    """A good usage is charged and its cap trips, whatever came before."""
    pipeline.apply_budget(budget("agent:after/*/*", cap(1, unit="tokens"), name="after"))
    pipeline.apply_budget(budget("team:after/*", cap(1, unit="tokens"), name="after-team"))
    pipeline.emit(call(pipeline, "after/the/storm", input=1))
    said = [record.value for record in pipeline.records(COMMANDS.name) if b"after/the" in (record.key or b"")]
    assert [Command.model_validate_json(value).action for value in said] == ["halt", "halt"]
    assert pipeline.spend("team:after/the").tokens == 1
    pipeline.crash()
    assert pipeline.spend("team:after/the").tokens == 1


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"{", "Invalid JSON"),
        (b"\xff\xfe\xfd", "Invalid JSON"),
        (b'{"v":1,"id":"\xff"}', "Invalid JSON"),
        (b"", "no value"),
        (None, "no value"),
        (b"\x00\x00\x00\x00\x07{", "Invalid JSON"),
        (b"\x00", "Invalid JSON"),
        (b"[" * 100_000, "Invalid JSON"),
        (b'{"usages":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "Invalid JSON"),
        (b'{"v":1,"usages":[]}', "usages: List should have at least 1 item"),
        (b"[]", "object"),
        (b"1" * 10_000, "Invalid JSON"),
        (b"NaN", "object"),
        (b"x" * 1_000_000, "Invalid JSON"),
    ],
    ids=lambda value: repr(value[:24]) if isinstance(value, bytes) else None,
)
def test_bytes_that_are_no_usage_are_dead_letters_with_reason_and_origin(value: bytes | None, reason: str) -> None:
    pipeline = driver()
    pipeline.emit(b"{}", partition=2)
    pipeline.emit(value, partition=2)
    dead = pipeline.dead_letters()[-1]
    assert reason.casefold() in dead.reason.casefold()
    assert (dead.topic, dead.partition, dead.offset) == (USAGE.name, 2, 1)
    assert dead.value == (value or b"")[:900_000]
    rejected = [entry for entry in pipeline.ledger() if entry.kind == "rejected"]
    assert rejected[-1].data["reason"] == dead.reason
    assert (rejected[-1].data["topic"], rejected[-1].data["offset"]) == (USAGE.name, "1")
    assert rejected[-1].data["bytes"] == len(dead.value)
    still_works(pipeline)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        ({"ts": "2026-01-05T09:00:00"}, "ts: "),
        ({"ts": "2025-12-25T09:00:00Z"}, "950400 s old; the most is 604800 s"),
        ({"ts": "2026-01-05T09:06:00Z"}, "360 s ahead of the clock; the most is 300 s"),
        ({"ts": "0001-01-01T00:00:00+14:00"}, "ts: Value error, the year 1 is outside"),
        ({"id": ...}, "id: Field required"),
        ({"id": "a b"}, "id: String should match pattern"),
        ({"tokens": {"input": -1}}, "tokens.input: Input should be greater than or equal to 0"),
        ({"tokens": {"input": 1.0}}, "tokens.input: Input should be a valid integer"),
        ({"tokens": {"input": 10**30}}, "tokens.input"),
        ({"workspace": "someone@example.com"}, "workspace: String should match pattern"),
        ({"v": 2}, "v: Input should be 1"),
    ],
    ids=str,
)
def test_a_usage_at_fault_is_a_dead_letter_that_names_the_field(changes: dict[str, Any], reason: str) -> None:
    pipeline = driver()
    pipeline.emit(json.dumps(body(pipeline, **changes)).encode())
    (dead,) = pipeline.dead_letters()
    assert reason in dead.reason
    assert "someone@example.com" not in dead.reason, "a reason names fields, it does not repeat values"
    still_works(pipeline)


def test_a_pack_with_one_bad_usage_loses_that_one_alone() -> None:
    pipeline = driver()
    pack = [body(pipeline, id="a"), body(pipeline, id="b", tokens={"input": -5}), body(pipeline, id="c")]
    pipeline.emit(json.dumps({"v": 1, "usages": pack}).encode(), partition=3)
    assert [entry.usage.id for entry in pipeline.ledger() if entry.kind == "charge"] == ["a", "c"]
    (dead,) = pipeline.dead_letters()
    assert (dead.partition, dead.offset, dead.nth) == (3, 0, 1)
    assert json.loads(dead.value)["id"] == "b"
    assert "tokens.input" in dead.reason


def test_a_usage_too_old_is_the_only_one_of_its_pack_that_is_refused() -> None:
    pipeline = driver()
    pipeline.emit(
        [call(pipeline, input=1), call(pipeline, ts=pipeline.now - timedelta(days=8)), call(pipeline, input=1)]
    )
    (dead,) = pipeline.dead_letters()
    assert dead.nth == 1
    assert pipeline.spend("agent:acme/research/planner").calls == 2


@pytest.mark.parametrize("usages", [b"7", b"[7]", b'[{"id":"\\ud800"}]', b"[NaN]", b"[1e999]", b'["x", null, [], {}]'])
def test_what_stands_in_the_place_of_usages_is_refused_item_by_item(usages: bytes) -> None:
    pipeline = driver()
    pipeline.emit(b'{"usages":' + usages + b"}")
    assert pipeline.dead_letters()
    assert pipeline.ledger()[0].kind == "rejected"
    still_works(pipeline)


def test_half_a_character_in_a_pack_is_refused_as_it_is_alone() -> None:
    pipeline = driver()
    bad = json.dumps(body(pipeline, tags={"k": "VALUE"})).replace("VALUE", "\\ud800").encode()
    pipeline.emit(bad)
    pipeline.emit(b'{"usages":[' + bad + b"]}")
    assert len(pipeline.dead_letters()) == 2
    assert not [entry for entry in pipeline.ledger() if entry.kind == "charge"]


def test_a_confluent_schema_prefix_is_taken_off() -> None:
    pipeline = driver()
    pipeline.emit(b"\x00\x00\x00\x00\x2a" + encode(call(pipeline, input=3)))
    assert pipeline.spend("agent:acme/research/planner").tokens == 3


def test_a_flood_of_unknown_fields_gives_a_short_reason() -> None:
    pipeline = driver()
    fields = {"x" * 2_000 + str(number): number for number in range(400)}
    pipeline.emit(json.dumps(body(pipeline, **fields)).encode())
    (dead,) = pipeline.dead_letters()
    assert len(dead.reason) <= 1_000


@pytest.mark.parametrize("timestamp_ms", [-1, 0, 1, INT64_MAX, -INT64_MAX])
def test_no_kafka_timestamp_stops_the_worker(timestamp_ms: int) -> None:
    pipeline = driver(budget("agent:acme/*/*", cap(INPUT_NANOS)))
    pipeline.emit(call(pipeline, input=1), timestamp_ms=timestamp_ms)
    pipeline.put(BUDGETS.name, None, key=b"gone", timestamp_ms=timestamp_ms)
    pipeline.put(ALERTS.name, b"{", timestamp_ms=timestamp_ms)
    assert len(pipeline.commands()) == 1
    assert all(isinstance(entry.at, datetime) for entry in pipeline.ledger())
    still_works(pipeline)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=200), st.integers(0, 3)), min_size=1, max_size=8))
@example([(b'{"usages":[{}]}', 0), (b"\x00\x00\x00\x00\x00null", 1)])
def test_every_record_ends_as_usage_or_as_a_dead_letter(records: list[tuple[bytes, int]]) -> None:
    pipeline = driver()
    for value, partition in records:
        pipeline.emit(value, partition=partition)
    assert ends(pipeline) == {(partition, offset) for partition, offset in emitted(pipeline)}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mutated(draw: st.DrawFn, valid: bytes) -> bytes:
    """A valid message after some changes: of its bytes, or of what its JSON says."""
    if draw(st.booleans()):
        data = bytearray(valid)
        for _ in range(draw(st.integers(1, 4))):
            at = draw(st.integers(0, len(data) - 1))
            data[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
            data = data or bytearray(b" ")
        return bytes(data)
    message = json.loads(valid)
    places = [(message, key) for key in message]
    for value in list(message.values()):
        inner = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else value
        if isinstance(inner, dict):
            places += [(inner, key) for key in inner]
            places += [(deep, key) for deep in inner.values() if isinstance(deep, dict) for key in deep]
    for _ in range(draw(st.integers(1, 3))):
        where, key = draw(st.sampled_from(places))
        number = st.integers(-(2**70), 2**70) | st.sampled_from([0, 1, 2**31, 2**47, 2**53, INT64_MAX])
        where[key] = draw(JSON | number)
    return json.dumps(message).encode("utf-8", "surrogatepass")


VALID = driver(budget("team:acme/*", cap(5 * INPUT_NANOS, window="month")), budget("agent:acme/*/*", cap(1), name="a"))
VALID.emit([call(VALID, input=5), call(VALID, tags={"k": "v"}, output=1)])
VALID.emit(call(VALID, input=5))
VALID.price(
    PriceOverride(
        id="p1",
        row=PriceRow(
            provider="anthropic",
            model="claude",
            rates=Rates(input=1, cache_read=1, cache_write_5m=1, cache_write_1h=1, output=1),
        ),
    )
)
_HALT = VALID.commands()[0]
VALID.put(
    ACKS.name,
    encode(
        Ack(
            command_id=_HALT.id,
            seq=_HALT.seq,
            scope=_HALT.scope,
            budget=_HALT.budget,
            cap=_HALT.cap,
            agent="agent:acme/research/planner",
            guard="g1",
            state="enforced",
            at=VALID.now,
        )
    ),
)


def emitted(pipeline: PipelineDriver) -> list[tuple[int, int]]:
    return [(record.partition, record.offset) for record in pipeline.records(USAGE.name)]


def ends(pipeline: PipelineDriver) -> set[tuple[int, int]]:
    """The origins of all that came out of the intake, one way or the other."""
    good = {
        (usage["p"], usage["o"])
        for record in pipeline.records(PACKED.name)
        for usage in json.loads(record.value)["usages"]
    }
    return good | {(dead.partition, dead.offset) for dead in pipeline.dead_letters() if dead.topic == USAGE.name}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_changed_usage_is_charged_or_refused_and_nothing_breaks(data: st.DataObject) -> None:
    pipeline = driver(budget("team:acme/*", cap(5)), budget("agent:*/*/*", cap(5), name="a"))
    for record in VALID.records(USAGE.name):
        pipeline.emit(data.draw(mutated(record.value)), partition=record.partition)
    assert ends(pipeline) == set(emitted(pipeline))
    assert len(pipeline.ledger()) == len(pipeline.ledger(trimmed=False))


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from([topic.name for topic in TOPICS]))
def test_changed_bytes_on_any_topic_do_not_stop_the_worker(data: st.DataObject, topic: str) -> None:
    pipeline = driver(budget("team:acme/*", cap(5, window="month")), budget("workspace:*", cap(5), name="w"))
    partitions = sorted({record.partition for record in VALID.records(topic)}) or [0]
    for record in VALID.records(topic)[-2:] or [VALID.records(USAGE.name)[0]]:
        value = data.draw(mutated(record.value))
        pipeline.put(topic, value, key=record.key, partition=data.draw(st.sampled_from(partitions)))
    pipeline.apply_budget(budget("run:*/*", cap(5, window="run"), name="r"))
    pipeline.advance(hours=1)
    still_works(pipeline)


@pytest.mark.parametrize("value", [b"{", b"", b"\xff" * 9, b"[" * 10_000, b"null", b'{"v":1}', None], ids=repr)
@pytest.mark.parametrize("topic", [topic.name for topic in TOPICS])
def test_bad_bytes_on_a_topic_are_said_and_the_worker_goes_on(topic: str, value: bytes | None) -> None:
    pipeline = driver()
    pipeline.put(topic, value, key=b"\xff\x00|", headers=[("spendfuse-reason", b"\xff"), ("", b"")])
    silent = {
        HEARTBEATS.name,
        BATCHES.name,
        CHECKPOINTS.name,
        LEDGER.name,
        DEAD_LETTERS.name,
    }  # the worker does not read these
    tombstone = value is None and topic in {BUDGETS.name, PRICES.name}
    if topic not in silent and not tombstone:
        (dead,) = pipeline.dead_letters()
        assert (dead.topic, dead.offset) == (topic, 0)
        assert dead.reason
    if topic == DEAD_LETTERS.name:
        assert [entry.kind for entry in pipeline.ledger()] == ["rejected"]
    if topic != LEDGER.name:
        if topic == DEAD_LETTERS.name:
            pipeline.emit(call(pipeline, input=1))
            assert pipeline.spend("agent:acme/research/planner").calls == 1
        else:
            still_works(pipeline)


def test_a_header_without_a_value_in_the_dead_letters_is_no_obstacle() -> None:
    pipeline = driver()
    pipeline.put(DEAD_LETTERS.name, b"x", headers=[("spendfuse-reason", None)])  # type: ignore[list-item]  # Kafka's null
    (entry,) = pipeline.ledger()
    assert (entry.kind, entry.data["reason"]) == ("rejected", "")


@pytest.mark.parametrize(
    "windows",
    [{"day@UTC@99999999999999999": [1, 1, 1]}, {"day@No/Zone@0": [1, 1, 1]}, {"month@UTC@253400000000": [1, 1, 1]}],
    ids=str,
)
def test_a_rollup_of_a_window_that_cannot_be_is_refused_before_it_is_kept(windows: dict[str, list[int]]) -> None:
    pipeline = driver()
    pipeline.emit(call(pipeline, input=1))
    (record, *_) = pipeline.records(ROLLUPS.name)
    message = json.loads(record.value) | {"windows": windows, "as_of": 999}
    pipeline.put(ROLLUPS.name, json.dumps(message).encode(), key=record.key, partition=record.partition)
    assert len(pipeline.dead_letters()) == 1
    pipeline.apply_budget(budget("team:acme/*", cap(1), name="later"))
    still_works(pipeline)


def test_a_forged_command_is_recorded_only_under_its_own_key() -> None:
    pipeline = driver(budget("agent:acme/*/*", cap(INPUT_NANOS)))
    pipeline.emit(call(pipeline, input=1))
    (record,) = pipeline.records(COMMANDS.name)
    pipeline.put(COMMANDS.name, record.value, key=b"agent:acme/other/one|b1|day-usd")
    pipeline.put(COMMANDS.name, None, key=record.key)
    assert [dead.topic for dead in pipeline.dead_letters()] == [COMMANDS.name] * 2
    assert len([entry for entry in pipeline.ledger() if entry.kind == "command"]) == 1


def test_a_budget_that_cannot_be_read_leaves_the_one_in_force() -> None:
    pipeline = driver(budget("agent:acme/*/*", cap(INPUT_NANOS)))
    good = encode(budget("agent:acme/*/*", cap(1_000_000 * INPUT_NANOS), version=2))
    pipeline.put(BUDGETS.name, good[:-1], key=b"b1")
    pipeline.put(BUDGETS.name, good, key=b"another")
    pipeline.emit(call(pipeline, input=1))
    assert [command.budget_version for command in pipeline.commands()] == [1]
    reasons = [dead.reason for dead in pipeline.dead_letters()]
    assert reasons[0].startswith("Invalid JSON")
    assert reasons[1] == "the key of a budgets.v1 record must be 'b1'"


def test_a_price_under_another_key_is_refused_and_not_recorded_as_in_force() -> None:
    pipeline = driver()
    rates = Rates(input=0, cache_read=0, cache_write_5m=0, cache_write_1h=0, output=0)
    free = PriceOverride(id="free", row=PriceRow(provider="anthropic", model="claude", rates=rates))
    pipeline.put(PRICES.name, encode(free), key=b"other")
    pipeline.emit(call(pipeline, input=1))
    assert pipeline.spend("agent:acme/research/planner").nanos == INPUT_NANOS
    assert "price" not in {entry.kind for entry in pipeline.ledger()}


def test_every_message_of_the_ledger_is_a_batch_that_the_audit_can_read() -> None:
    for record in VALID.records(LEDGER.name):
        assert LedgerBatch.model_validate_json(record.value).entries
