"""What crosses a process: bounds, refusals, and that any bytes are either usage or a validation error."""

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from factories import budget, cap, packed, usage
from spendfuse.wire import Budget, Cap, PriceRow, Rollup, Tokens, Usage, UsagePack, decode_usages, encode
from spendfuse.wire.base import NANOS_MAX, SAFE_INTEGER_MAX, TOKENS_MAX, from_us, rfc3339, to_us
from spendfuse.wire.control import Command
from spendfuse.wire.packed import PACKED_MAX, Origin, Packed
from spendfuse.wire.signing import bytes_to_sign
from spendfuse.wire.topics import TOPICS

PLAIN: dict[str, Any] = {
    "id": "call-1",
    "ts": "2026-11-23T10:00:00Z",
    "workspace": "acme",
    "team": "research",
    "agent": "planner",
    "run": "run-1",
    "provider": "openai",
    "model": "gpt-4o",
    "tokens": {"input": 1},
}


def decoded(**more: Any) -> Usage:
    return decode_usages(json.dumps(PLAIN | more).encode())[0]


@pytest.mark.parametrize(
    ("field", "greatest", "beyond"),
    [
        ("id", "a" * 128, "a" * 129),
        ("workspace", "a" * 64, "a" * 65),
        ("team", "a" * 64, "a" * 65),
        ("agent", "a" * 64, "a" * 65),
        ("run", "a" * 128, "a" * 129),
        ("root_run", "a" * 128, "a" * 129),
        ("parent_run", "a" * 128, "a" * 129),
        ("workflow", "a" * 64, "a" * 65),
        ("provider", "a" * 64, "a" * 65),
        ("model", "a" * 128, "a" * 129),
        ("tier", "a" * 32, "a" * 33),
        ("source", "a" * 512, "a" * 513),
        ("tags", {f"t{n}": "x" * 128 for n in range(16)}, {f"t{n}": "x" for n in range(17)}),
        ("tags", {"a" * 64: ""}, {"a" * 65: ""}),
        ("tags", {"a": "x" * 128}, {"a": "x" * 129}),
        *(
            ("tokens", {name: TOKENS_MAX, "output": TOKENS_MAX}, {name: TOKENS_MAX + 1, "output": TOKENS_MAX})
            for name in Tokens.model_fields
            if name != "output"
        ),
        ("tokens", {"output": TOKENS_MAX}, {"output": TOKENS_MAX + 1}),
    ],
)
def test_each_field_takes_its_greatest_value_and_nothing_beyond(field: str, greatest: Any, beyond: Any) -> None:
    assert json.loads(encode(decoded(**{field: greatest})))[field] is not None
    with pytest.raises(ValidationError) as refused:
        decoded(**{field: beyond})
    assert {error["loc"][0] for error in refused.value.errors()} == {field}


@pytest.mark.parametrize("text", ["2026-11-23T10:00:00", "2026-11-23", "yesterday", "2026-11-23T25:00:00Z"])
def test_an_instant_without_an_offset_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="ts"):
        decoded(ts=text)


@pytest.mark.parametrize(
    "text",
    [
        "0001-01-01T00:00:00+10:00",
        "9999-12-31T23:59:59-10:00",
        "0001-01-01T00:00:00Z",
        "1969-12-31T23:59:59Z",
        "1970-01-01T00:30:00+01:00",
        "9999-01-01T00:00:00Z",
    ],
)
def test_an_instant_at_the_ends_of_the_calendar_is_refused_and_not_a_crash(text: str) -> None:
    with pytest.raises(ValidationError, match="1970"):
        decoded(ts=text)


@pytest.mark.parametrize("text", ["1970-01-01T00:00:00Z", "9998-12-31T23:59:59.999999Z", "2026-11-23T12:00:00+02:00"])
def test_an_instant_means_the_same_after_a_round_trip(text: str) -> None:
    message = decoded(ts=text)
    assert message.ts == datetime.fromisoformat(text)
    assert decode_usages(encode(message))[0] == message


@given(st.datetimes(datetime(1970, 1, 2), datetime(9998, 12, 30), timezones=st.just(UTC)))  # noqa: DTZ001 - hypothesis wants naive bounds
def test_text_and_microseconds_of_an_instant_are_exact(value: datetime) -> None:
    assert from_us(to_us(value)) == value
    assert datetime.fromisoformat(rfc3339(value)) == value
    assert rfc3339(value).endswith("Z")
    assert rfc3339(value.astimezone(timezone(timedelta(hours=5, minutes=45)))) == rfc3339(value)


def test_unknown_fields_are_refused_at_every_depth() -> None:
    for more in ({"cost": 1}, {"tokens": {"input": 1, "audio": 2}}, {"prompt": "secret"}):
        with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
            decoded(**more)


@pytest.mark.parametrize("value", [1.0, "1", True, None, -1, 1e3, [1]])
def test_a_counter_is_an_integer_and_nothing_like_it(value: Any) -> None:
    with pytest.raises(ValidationError):
        decoded(tokens={"input": value})


def test_reasoning_is_a_part_of_output_and_a_deadline_belongs_to_calls_in_flight() -> None:
    assert decoded(tokens={"output": 5, "reasoning": 5}).tokens.total == 5
    with pytest.raises(ValidationError, match=r"reasoning \(6\) cannot exceed output \(5\)"):
        decoded(tokens={"output": 5, "reasoning": 6})
    with pytest.raises(ValidationError, match="deadline"):
        decoded(deadline="2026-11-23T10:05:00Z")
    assert decoded(deadline="2026-11-23T10:05:00Z", kind="started").deadline is not None


def test_a_confluent_prefix_is_taken_off_and_nothing_else_is() -> None:
    plain = json.dumps(PLAIN).encode()
    assert decode_usages(b"\x00\x00\x00\x00\x07" + plain) == decode_usages(plain)
    for wrong in (b"\x01\x00\x00\x00\x07" + plain, b"\x00" + plain, b"\x00", b""):
        with pytest.raises(ValidationError):
            decode_usages(wrong)


@pytest.mark.parametrize("count", [1, 2, 500])
def test_a_pack_holds_up_to_500_usages_in_order(count: int) -> None:
    usages = [usage(nth) for nth in range(count)]
    assert decode_usages(encode(UsagePack(usages=usages))) == usages


@pytest.mark.parametrize("count", [0, 501])
def test_a_pack_of_none_or_too_many_is_refused(count: int) -> None:
    value = b'{"usages":[' + b",".join([json.dumps(PLAIN).encode()] * count) + b"]}"
    with pytest.raises(ValidationError, match="usages"):
        decode_usages(value)


@pytest.mark.parametrize(
    "text",
    [
        '{"usages":[%s]}',
        '{"v":1,"usages":[%s]}',
        ' { "v" : 1 , "usages" : [%s] }',
        '{"usages":[%s],"v":1}',
        '\n{\n  "usages": [%s]}',
    ],
)
def test_a_pack_is_known_however_it_is_written(text: str) -> None:
    assert decode_usages((text % json.dumps(PLAIN)).encode())[0].id == "call-1"


def test_a_usage_that_says_usages_itself_is_not_taken_for_a_pack() -> None:
    tagged = {"tags": {"usages": "x"}}
    assert decode_usages(json.dumps(tagged | PLAIN).encode())[0].tags == {"usages": "x"}
    assert decode_usages(json.dumps(PLAIN | tagged).encode())[0].tags == {"usages": "x"}
    assert decode_usages(json.dumps({"id": '"usages":'[1:-2]} | PLAIN).encode())[0].id == "call-1"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*PLAIN, "usages", "v"]), inner),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()))
@example(b"[" * 100_000)
@example(b'{"ts":' + b"9" * 10_000 + b"}")
@example(b'{"id":"\\ud800"}')
@example(b"\xff\xfe{}")
def test_any_bytes_are_usage_or_a_validation_error(value: bytes) -> None:
    try:
        found = decode_usages(value)
    except ValidationError:
        return
    assert all(isinstance(message, Usage) for message in found)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(PLAIN)), json_values | st.datetimes().map(str) | st.text(alphabet="0123456789-:TZ+."))
def test_one_wrong_field_is_usage_or_a_validation_error(field: str, value: Any) -> None:
    try:
        decoded(**{field: value})
    except ValidationError:
        return


def test_positions_grow_with_offset_and_place_and_fit_64_bits() -> None:
    places = [(0, 0), (0, 1), (0, 65_535), (1, 0), (2**47 - 1, 65_535)]
    positions = [Origin(0, offset, nth).position for offset, nth in places]
    assert positions == sorted(set(positions))
    assert positions[-1] < 2**63
    with pytest.raises(ValidationError):
        packed(usage(), 2**47)
    with pytest.raises(ValidationError):
        packed(usage(), 0, nth=1 << 16)
    with pytest.raises(ValidationError, match="usages"):
        Packed(usages=[packed(usage(), 0)] * (PACKED_MAX + 1))


def test_names_that_the_machine_uses_itself_are_refused_in_a_budget() -> None:
    with pytest.raises(ValidationError, match="'manual' is kept for a person's halts"):
        budget(id="manual")
    with pytest.raises(ValidationError, match="'unknown-model' is kept for unknown_model: deny"):
        budget(cap(id="unknown-model"))


@pytest.mark.parametrize(
    "values",
    [
        {"caps": []},
        {"caps": [cap(id=f"c{n}") for n in range(17)]},
        {"caps": [cap(), cap()]},
        {"caps": [cap(window="run")]},
        {"grace_s": 7 * 86_400 + 1},
        {"grace_s": -1},
        {"version": 0},
        {"timezone": "Mars/Olympus"},
        {"timezone": "../../etc/passwd"},
        {"timezone": ""},
        {"scope": "agent:acme/research"},
        {"scope": "team:acme"},
        {"scope": "workspace:acme/x"},
        {"scope": "nobody:acme"},
        {"scope": "agent:acme/re search/x"},
    ],
)
def test_a_budget_that_could_not_be_obeyed_is_refused(values: dict[str, Any]) -> None:
    plain = {"id": "b", "version": 1, "scope": "agent:acme/research/*", "caps": [cap()]}
    assert Budget(**plain).grace_s == 3_600
    with pytest.raises(ValidationError):
        Budget(**(plain | values))


@pytest.mark.parametrize(
    "values",
    [
        {"amount": 0},
        {"amount": NANOS_MAX + 1},
        {"unit": "USD"},
        {"unit": "nano-usd"},
        {"warn": [0]},
        {"warn": [10_001]},
        {"warn": list(range(1, 10))},
        {"degrade": 0},
        {"window": "rolling 4m"},
        {"window": "rolling 1441m"},
    ],
)
def test_a_cap_outside_its_bounds_is_refused(values: dict[str, Any]) -> None:
    assert cap(amount=NANOS_MAX, warn=list(range(1, 9)), window="rolling 1440m").amount == NANOS_MAX
    with pytest.raises(ValidationError):
        cap(**values)


def test_a_rolling_window_goes_with_its_length_and_a_price_with_time_that_runs_forward() -> None:
    with pytest.raises(ValidationError, match="rolling_s goes with kind rolling"):
        Cap.model_validate_json(b'{"id":"c","unit":"tokens","amount":1,"window":{"kind":"day","rolling_s":300}}')
    instant = from_us(0)
    with pytest.raises(ValidationError, match="is not before"):
        PriceRow.model_validate_json(
            json.dumps(
                {
                    "provider": "openai",
                    "model": "m",
                    "valid_from": rfc3339(instant),
                    "valid_to": rfc3339(instant),
                    "rates": dict.fromkeys(("input", "cache_read", "cache_write_5m", "cache_write_1h", "output"), 1),
                }
            )
        )


def test_a_rollup_with_rolling_windows_survives_json() -> None:
    text = (
        b'{"scope":"run:acme/a/b","partition":3,"as_of":9,"windows":{"run":[1,2,3],"day@Etc/GMT+5@86400":[4,5,6]},'
        b'"rolling":{"300":{"-5":[1,2,3]}},"held_until_us":7,'
        b'"cause":{"usage_id":"a","ts":"2026-11-23T10:00:00Z","partition":0,"offset":1}}'
    )
    rollup = Rollup.model_validate_json(text)
    assert rollup.rolling == {300: {-5: [1, 2, 3]}}
    assert Rollup.model_validate_json(encode(rollup)) == rollup
    with pytest.raises(ValidationError, match="windows"):
        Rollup.model_validate_json(text.replace(b"day@", b"year@"))


def test_the_seq_of_a_command_stays_exact_in_javascript() -> None:
    values: dict[str, Any] = {
        "id": "0" * 32,
        "action": "halt",
        "scope": "workspace:acme",
        "budget": "b",
        "cap": "c",
        "issued_at": from_us(0),
    }
    assert Command(seq=SAFE_INTEGER_MAX, **values).key == "workspace:acme|b|c"
    with pytest.raises(ValidationError, match="seq"):
        Command(seq=SAFE_INTEGER_MAX + 1, **values)


def test_what_is_signed_cannot_be_split_in_another_way() -> None:
    assert bytes_to_sign("t", b"k", b"v") == b"spendfuse-sig-v1\nt\nk\nv"
    for topic, key in (("t\n", b"k"), ("t", b"k\n")):
        with pytest.raises(ValueError, match="newline"):
            bytes_to_sign(topic, key, b"v")


def test_a_compacted_topic_keeps_each_record_for_an_hour_and_no_topic_name_is_used_twice() -> None:
    assert len({topic.name for topic in TOPICS}) == len(TOPICS)
    for topic in TOPICS:
        assert ("compact" in topic.cleanup) == ("min.compaction.lag.ms" in topic.configs())
