"""Dead letters read back: any bytes are shown safely, and only what can be offered again is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spendfuse.client.follow import Record
from spendfuse.pipeline.dead_letters import Filter, Letter, escaped, read_letter, replay_of, why_not
from spendfuse.pipeline.publish import DEAD_VALUE_BYTES_MAX, dead_letter_headers
from spendfuse.pipeline.records import SourceRecord

USAGE = "spendfuse.usage.v1"


def letter(
    topic: str = USAGE, reason: str = "bad", value: bytes = b"{", offset: int = 7, timestamp_ms: int = 5_000
) -> Letter:
    refused = SourceRecord(topic, 3, 41, 0, b"k", value)
    headers = tuple(dead_letter_headers(refused, reason, 2))
    return read_letter(Record("spendfuse.usage.dlq.v1", 0, offset, timestamp_ms, b"key", value, headers))


def test_a_letter_says_why_and_where_it_came_from() -> None:
    read = letter(reason="tokens.input: a number is needed", value=b"\x00abc")
    assert (read.reason, read.origin, read.nth, read.value) == (
        "tokens.input: a number is needed", f"{USAGE}/3/41", 2, b"\x00abc",
    )  # fmt: skip


@given(
    headers=st.lists(
        st.tuples(
            st.sampled_from(["spendfuse-reason", "spendfuse-topic", "spendfuse-partition", "spendfuse-offset", "x"]),
            st.one_of(st.none(), st.binary(max_size=40)),
        ),
        max_size=6,
    ),
    value=st.one_of(st.none(), st.binary(max_size=80)),
)
def test_any_record_can_be_read_and_shown_on_one_printable_line(
    headers: list[tuple[str, bytes]], value: bytes | None
) -> None:
    read = read_letter(Record("spendfuse.usage.dlq.v1", 0, 0, 0, None, value, tuple(headers)))
    shown = escaped(read.value, 1_000)
    assert shown.isprintable() or shown == ""
    assert why_not(read, force=True) is None or isinstance(why_not(read, force=True), str)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (b"\x1b[2Jcleared", r"\x1b[2Jcleared"),
        (b"a\nb\r\0", r"a\nb\r\x00"),
        (b"\xff\xfe", r"\xff\xfe"),
        ("caf\u00e9 \u202eevil".encode(), "caf\u00e9 \\u202eevil"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(value: bytes, shown: str) -> None:
    assert escaped(value, 100) == shown


@pytest.mark.parametrize(
    ("which", "taken"),
    [
        (Filter(), True),
        (Filter(reason="OLDER"), True),
        (Filter(reason="newer"), False),
        (Filter(topic=USAGE), True),
        (Filter(topic="spendfuse.acks.v1"), False),
        (Filter(since_ms=5_000), True),
        (Filter(since_ms=5_001), False),
        (Filter(until_ms=5_000), False),
        (Filter(until_ms=5_001), True),
        (Filter(offsets=frozenset({7})), True),
        (Filter(offsets=frozenset({8})), False),
    ],
)
def test_a_filter_takes_what_matches_all_it_says(which: Filter, taken: bool) -> None:
    assert which.takes(letter(reason="older than 7 days")) is taken


def test_a_replay_has_the_very_bytes_and_says_what_it_replays() -> None:
    again = replay_of(letter(value=b"\xff\x00 bytes"))
    assert (again.topic, again.value, again.partition) == (USAGE, b"\xff\x00 bytes", None)
    assert list(again.headers) == [("spendfuse-replay-of", b"spendfuse.usage.dlq.v1/0/7")]
    assert replay_of(letter(topic="spendfuse.rollups.v1")).partition == 3


@pytest.mark.parametrize(
    ("refused", "force", "why"),
    [
        (letter(), False, None),
        (letter(topic="spendfuse.acks.v1"), False, "only spendfuse.usage.v1 is replayed unless forced"),
        (letter(topic="spendfuse.acks.v1"), True, None),
        (letter(topic="somebody.elses"), True, "no topic that spendfuse reads"),
        (letter(topic="spendfuse.usage.dlq.v1"), True, "no topic that spendfuse reads"),
        (letter(value=b""), True, "it has no bytes"),
        (letter(value=b"x" * DEAD_VALUE_BYTES_MAX), True, "only the first 900000 bytes"),
        (letter(topic="spendfuse.acks.v1")._replace(origin_partition=-1), True, "origin partition is not known"),
    ],
)
def test_only_what_can_be_offered_again_as_it_was_is_replayed(refused: Letter, force: bool, why: str | None) -> None:
    said = why_not(refused, force=force)
    assert said is None if why is None else why in (said or "")
