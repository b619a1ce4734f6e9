"""Fetched batches made readable, against aiokafka's own reader: what it cannot bear, and what would lead it astray."""

from __future__ import annotations

import gzip
import re
import struct
from typing import Any

import cramjam
import pytest
from aiokafka.record.memory_records import MemoryRecords
from aiokafka.record.util import calc_crc32c
from hypothesis import given
from hypothesis import strategies as st

from raw_batches import batch, record
from spendfuse.client import batches
from spendfuse.client.batches import UNREADABLE, readable

BASE = 4_000
GOOD = record(b"good", [(b"ce_id", b"1")])
BAD_NAME = (b"\xff\xfe", b"v")


def placed(raw: bytes, base: int = BASE) -> bytes:
    """A batch as a broker hands it out: with its place, which no checksum covers."""
    return struct.pack(">q", base) + raw[8:]


def read(fetched: bytes) -> list[Any]:
    """All records, as aiokafka's consumer would get them."""
    reader, found = MemoryRecords(fetched), []
    while reader.has_next():
        each = reader.next_batch()
        assert each is not None
        assert each.validate_crc()
        found += list(each)
    return found


def reasons(fetched: bytes) -> list[str]:
    return [dict(each.headers).get(UNREADABLE, b"").decode() for each in read(fetched)]


def lz4(payload: bytes) -> bytes:
    machine = cramjam.lz4.Compressor(level=9, content_checksum=False, block_linked=False)
    machine.compress(payload)
    return bytes(machine.finish())


def xerial(payload: bytes) -> bytes:
    """Snappy as the Java client writes it, in blocks of 4 bytes."""
    blocks = [bytes(cramjam.snappy.compress_raw(payload[at : at + 4])) for at in range(0, len(payload), 4)]
    return b"\x82SNAPPY\x00" + struct.pack(">ii", 1, 1) + b"".join(struct.pack(">i", len(b)) + b for b in blocks)


def zstd(payload: bytes) -> bytes:
    return bytes(cramjam.zstd.compress(payload))


def snappy(payload: bytes) -> bytes:
    return bytes(cramjam.snappy.compress_raw(payload))


COMPRESSED = [("gzip", gzip.compress), ("snappy", snappy), ("snappy", xerial), ("lz4", lz4), ("zstd", zstd)]


def test_what_aiokafka_can_read_is_handed_on_as_the_same_object() -> None:
    fetched = placed(batch(GOOD + record(b"more", nth=1), 2)) + placed(batch(GOOD), BASE + 2)
    assert readable(fetched) is fetched


def test_a_batch_that_the_broker_cut_off_stays_cut_off() -> None:
    fetched = placed(batch(GOOD)) + placed(batch(GOOD), BASE + 1)[:-3]
    assert readable(fetched) is fetched
    bad = placed(batch(record(b"x", [BAD_NAME])))
    assert [each.value for each in read(readable(bad + fetched))] == [b"x", b"good"]


def test_a_header_name_that_is_not_utf8_costs_nothing_but_the_name() -> None:
    with pytest.raises(UnicodeDecodeError):
        read(placed(batch(record(b"x", [BAD_NAME]))))
    records = record(b"x", [BAD_NAME, (b"spendfuse-sig", b"s")]) + record(None, [], key=None, nth=1)
    first, second = read(readable(placed(batch(records, 2))))
    assert first.headers == [("\ufffd\ufffd", b"v"), ("spendfuse-sig", b"s")]
    assert (first.offset, first.key, first.value) == (BASE, b"k", b"x")
    assert (second.offset, second.key, second.value, second.headers) == (BASE + 1, None, None, [])


@pytest.mark.parametrize(("codec", "compress"), COMPRESSED, ids=lambda each: getattr(each, "__name__", each))
def test_each_of_kafkas_compressions_is_read(codec: str, compress: Any) -> None:
    records = GOOD + record(b"more", [BAD_NAME], nth=1)
    found = read(readable(placed(batch(compress(records), 2, codec))))
    assert [(each.offset, each.value) for each in found] == [(BASE, b"good"), (BASE + 1, b"more")]


@pytest.mark.parametrize(("codec", "compress"), COMPRESSED, ids=lambda each: getattr(each, "__name__", each))
def test_a_batch_that_would_fill_the_memory_is_refused_before_it_does(
    codec: str, compress: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "UNPACKED_BYTES_MAX", 1_000)
    bomb = record(b"0" * 5_000)
    (only,) = reasons(readable(placed(batch(compress(bomb), 1, codec))))
    assert "more than 1000 bytes" in only


def test_of_many_large_batches_some_are_left_for_the_next_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "UNPACKED_BYTES_MAX", 10_000)
    large = gzip.compress(record(b"0" * 6_000))
    fetched = b"".join(placed(batch(large, 1, "gzip"), BASE + nth) for nth in range(5))
    assert [each.offset for each in read(readable(fetched))] == [BASE, BASE + 1]


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (batch(record(b"far", nth=1_000_000)), "a record's offset is 1000000 after its batch's"),
        (batch(record(b"before", nth=-5)), "a record's offset is -5 after"),
        (batch(record(b"a") + record(b"b"), 2), "a record's offset is 0 after its batch's"),
        (batch(record(b"a", nth=1) + record(b"b"), 2), "a record's offset is 0 after its batch's"),
        (batch(gzip.compress(record(b"far", nth=7)), 1, "gzip"), "a record's offset is 7 after"),
        (batch(b"\xff" * 30), "cut off|cannot be read"),
        (batch(GOOD, 3), "cut off|cannot be read"),
        (batch(GOOD + record(b"b", nth=1), 1), "more bytes than its records"),
        (batch(b"no gzip at all", 1, "gzip"), "cannot be decompressed"),
        (batch(b"no zstd at all", 1, "zstd"), "cannot be decompressed"),
        (batch(gzip.compress(GOOD)[:-9], 1, "gzip"), "cannot be decompressed"),
    ],
    ids=[
        "far",
        "before",
        "twice",
        "backwards",
        "far-gzip",
        "noise",
        "too-few",
        "too-many",
        "no-gzip",
        "no-zstd",
        "cut",
    ],
)
def test_a_batch_that_cannot_be_read_or_lies_becomes_one_record_that_says_why(raw: bytes, why: str) -> None:
    count = struct.unpack_from(">i", raw, 57)[0]
    found = read(readable(placed(raw) + placed(batch(GOOD), BASE + count)))
    assert [(each.offset, each.key) for each in found] == [(BASE, None), (BASE + count, b"k")]
    assert found[0].value == placed(raw)
    assert re.search(why, dict(found[0].headers)[UNREADABLE].decode())


def test_an_unknown_codec_is_refused_and_control_batches_and_damage_are_left_to_aiokafka() -> None:
    def with_attributes(bits: int) -> bytes:
        raw = bytearray(batch(GOOD))
        raw[22] |= bits
        struct.pack_into(">I", raw, 17, calc_crc32c(bytes(raw[21:])))
        return placed(bytes(raw))

    assert "codec 7 is unknown" in reasons(readable(with_attributes(7)))[0]
    control = with_attributes(0x20)
    assert readable(control) is control
    damaged = bytearray(placed(batch(record(b"x", [BAD_NAME]))))
    damaged[-1] ^= 1
    assert readable(bytes(damaged)) == bytes(damaged)


@given(st.binary(max_size=300), st.integers(-1, 5), st.sampled_from(["none", "gzip", "snappy", "lz4", "zstd"]))
def test_no_bytes_in_a_batch_stop_aiokafka_nor_move_an_offset(payload: bytes, count: int, codec: str) -> None:
    fetched = placed(batch(payload, count, codec)) + placed(batch(GOOD), BASE + max(count, 1))
    found = read(readable(fetched))
    assert found[-1].value == b"good"
    assert all(BASE <= each.offset < BASE + max(count, 1) for each in found[:-1])


@given(
    st.lists(
        st.tuples(
            st.none() | st.binary(max_size=20),
            st.none() | st.binary(max_size=20),
            st.lists(st.tuples(st.binary(max_size=5), st.binary(max_size=5)), max_size=3),
        ),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(COMPRESSED),
    st.booleans(),
)
def test_every_true_record_arrives_whatever_its_header_names(
    records: list[tuple[bytes | None, bytes | None, list[tuple[bytes, bytes]]]], packed: Any, compressed: Any
) -> None:
    payload = b"".join(record(value, names, key=key, nth=nth) for nth, (key, value, names) in enumerate(records))
    raw = batch(packed[1](payload), len(records), packed[0]) if compressed else batch(payload, len(records))
    found = read(readable(placed(raw)))
    assert [(each.offset - BASE, each.key, each.value) for each in found] == [
        (nth, key, value) for nth, (key, value, _) in enumerate(records)
    ]
    assert [each.headers for each in found] == [
        [(name.decode("utf-8", "replace"), value) for name, value in names] for _, _, names in records
    ]
