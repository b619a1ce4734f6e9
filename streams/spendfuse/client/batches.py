"""Fetched record batches made readable: no batch that a broker takes may stop a consumer, or lie about its offsets.

aiokafka 0.14 raises where it cannot read a batch, at every attempt anew: a header's name that is not UTF-8, a codec it
has no library for, bytes that are no records. Whoever may produce could so stop whoever reads. It takes the offset of
a record from the record itself, and Kafka checks it only where it has to decompress: one record that says it is a
million further on would make all that follow it look like replays. And it decompresses a batch whatever its size.

So a consumer's batches pass through `readable` first (`connection.Consumer`). A bad header name is given with U+FFFD.
A batch that cannot be read becomes one record at its first offset: without a key, its own bytes as its value, and the
reason in the header `UNREADABLE`. Its reader then refuses it as it refuses any other bad record.

Kafka's record batch, version 2: https://kafka.apache.org/documentation/#recordbatch
"""

import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import cramjam
from aiokafka.record.default_records import DefaultRecordBatch
from aiokafka.record.util import calc_crc32c, decode_varint

UNREADABLE: Final = "spendfuse-unreadable"
"""The header that says why a batch could not be read."""
UNPACKED_BYTES_MAX: Final = 16 * 1_048_576
"""Most bytes of a batch once decompressed, and of the batches of one answer before the rest is asked for again."""
KEPT_BYTES_MAX: Final = 65_536
"""Most bytes that are kept of a batch that cannot be read."""
XERIAL: Final = b"\x82SNAPPY\x00"
"""How the Java client begins what it compresses with snappy: in blocks."""
_XERIAL_HEAD: Final = 16
_LENGTH: Final = struct.Struct(">qi")
_HEAD: Final = struct.Struct(">qiibIhiqqqhii")
_CRC_AT, _ATTRIBUTES_AT, _MAGIC_AT = 17, 21, 16
_CODEC_BITS: Final = 0x07
_CONTROL_BIT: Final = 0x20
_GZIP: Final = 16 + zlib.MAX_WBITS


class _Head(NamedTuple):
    base: int
    length: int
    epoch: int
    magic: int
    crc: int
    attributes: int
    last_delta: int
    first_ms: int
    newest_ms: int
    producer: int
    producer_epoch: int
    sequence: int
    records: int


class _Unreadable(Exception):  # noqa: N818 - an answer more than an error
    """Why a batch cannot be read."""


def readable(fetched: bytes) -> bytes:
    """Return the batches of a fetch so that aiokafka can read them all; the same object where it can.

    A batch whose checksum is wrong stays as it is: aiokafka raises, and it is fetched again.
    """
    parts: list[bytes] = []
    changed = False
    unpacked = place = 0
    for raw in _batches(fetched):
        if unpacked >= UNPACKED_BYTES_MAX:
            return b"".join(parts)
        place += len(raw)
        part = raw if raw[_MAGIC_AT] == 2 and not _packed(raw) and _fault(raw) is None else _mended(raw)  # noqa: PLR2004
        changed = changed or part is not raw
        unpacked += len(part) - len(raw)
        parts.append(part)
    return b"".join([*parts, fetched[place:]]) if changed else fetched


def _batches(fetched: bytes) -> Iterator[bytes]:
    """Yield each whole batch; the last one may have been cut off by the broker."""
    place = 0
    while place + _HEAD.size <= len(fetched):
        end = place + _LENGTH.size + _LENGTH.unpack_from(fetched, place)[1]
        if not place + _MAGIC_AT < end <= len(fetched):
            return
        yield fetched[place:end]
        place = end


def _packed(raw: bytes) -> bool:
    return bool(raw[_ATTRIBUTES_AT + 1] & _CODEC_BITS)


def _fault(raw: bytes) -> str | None:
    """Return why a batch without compression cannot be read, None where it can; every record's offset is its own."""
    last = -1
    try:
        batch: Any = DefaultRecordBatch(raw)
        if batch.is_control_batch:
            return None
        base, most = batch.base_offset, batch.last_offset_delta
        for record in batch:
            delta = record.offset - base
            if not last < delta <= most:
                return f"a record's offset is {delta} after its batch's, which has {most + 1} from 0, in order"
            last = delta
    except Exception as error:  # noqa: BLE001 - whatever aiokafka cannot bear is the answer
        return f"{type(error).__name__}: {error}"
    return None


def _mended(raw: bytes) -> bytes:
    head = _Head(*_HEAD.unpack_from(raw))
    if head.magic != 2:  # noqa: PLR2004 - Kafka's number of the format
        return raw  # before Kafka 0.11: aiokafka reads it, and a broker of today never sends it
    if head.attributes & _CONTROL_BIT or head.crc != calc_crc32c(raw[_ATTRIBUTES_AT:]):
        return raw
    try:
        payload = _unpack(raw[_HEAD.size :], head.attributes & _CODEC_BITS)
        plain = _rebuilt(head, payload, head.records, head.last_delta)
        fault = _fault(plain)
        if fault is None:
            return plain
        plain = _rebuilt(head, b"".join(_renamed(payload, head.records)), head.records, head.last_delta)
        if _fault(plain) is None:
            return plain
    except _Unreadable as error:
        fault = str(error)
    name, reason = UNREADABLE.encode(), f"the record batch cannot be read: {fault}".encode()[:1_000]
    record = b"\x00" + _varint(0) * 2 + _sized(None) + _sized(raw[:KEPT_BYTES_MAX])
    record += _varint(1) + _sized(name) + _sized(reason)
    return _rebuilt(head, _sized(record), 1, head.last_delta)


def _rebuilt(head: _Head, payload: bytes, count: int, last_delta: int) -> bytes:
    """Return a batch of the same place and times around records that are not compressed."""
    attributes = head.attributes & ~_CODEC_BITS
    fields = head._replace(
        length=_HEAD.size - _LENGTH.size + len(payload), crc=0, attributes=attributes, records=count,
        last_delta=last_delta,
    )  # fmt: skip
    raw = bytearray(_HEAD.pack(*fields) + payload)
    struct.pack_into(">I", raw, _CRC_AT, calc_crc32c(bytes(raw[_ATTRIBUTES_AT:])))
    return bytes(raw)


# -- compression ---------------------------------------------------------------------------------------------------


def _unpack(payload: bytes, codec: int) -> bytes:
    """Return what was compressed, within its bound."""
    unpackers = (bytes, _unpack_gzip, _unpack_snappy, _unpack_lz4, _unpack_zstd)
    if codec >= len(unpackers):
        raise _Unreadable(f"codec {codec} is unknown")
    try:
        unpacked = unpackers[codec](payload)
    except (ValueError, struct.error, zlib.error, cramjam.DecompressionError) as error:
        raise _Unreadable(f"it cannot be decompressed, or is more than {UNPACKED_BYTES_MAX} bytes: {error}") from None
    return unpacked


def _unpack_gzip(payload: bytes) -> bytes:
    machine = zlib.decompressobj(_GZIP)
    unpacked = machine.decompress(payload, UNPACKED_BYTES_MAX)
    if not machine.eof:
        raise ValueError("it ends too early or too late")
    return unpacked


def _unpack_lz4(payload: bytes) -> bytes:
    room = bytearray(UNPACKED_BYTES_MAX)
    return bytes(memoryview(room)[: cramjam.lz4.decompress_into(payload, room)])


def _unpack_zstd(payload: bytes) -> bytes:
    room = bytearray(UNPACKED_BYTES_MAX)
    return bytes(memoryview(room)[: cramjam.zstd.decompress_into(payload, room)])


def _unpack_snappy(payload: bytes) -> bytes:
    blocks: Sequence[bytes] = [payload]
    if payload.startswith(XERIAL):
        blocks, place = [], _XERIAL_HEAD
        while place < len(payload):
            end = place + 4 + struct.unpack_from(">i", payload, place)[0]
            if not place + 4 <= end <= len(payload):
                raise ValueError("a block is cut off")
            blocks.append(payload[place + 4 : end])
            place = end
    if sum(cramjam.snappy.decompress_raw_len(block) for block in blocks) > UNPACKED_BYTES_MAX:
        raise ValueError("it says so itself")
    return b"".join(bytes(cramjam.snappy.decompress_raw(block)) for block in blocks)


# -- records by hand -----------------------------------------------------------------------------------------------


def _renamed(payload: bytes, count: int) -> Iterator[bytes]:
    """Yield each record with header names that are UTF-8, else as it is."""
    place = 0
    for _ in range(count):
        size, place = _number(payload, place)
        if not 0 < size <= len(payload) - place:
            raise _Unreadable("a record is cut off")
        yield _sized(_with_readable_names(payload[place : place + size]))
        place += size
    if place != len(payload):
        raise _Unreadable("it has more bytes than its records")


def _with_readable_names(record: bytes) -> bytes:
    place = 1  # the attributes, of which there are none
    for _ in range(2):  # how much later and how much further than its batch's first it is
        _, place = _number(record, place)
    for _ in range(2):  # key and value
        _, place = _bytes(record, place)
    headers, begin = _number(record, place)
    parts, place = [record[:begin]], begin
    for _ in range(headers):
        name, place = _bytes(record, place)
        if name is None:
            raise _Unreadable("a header has no name")
        value, place = _bytes(record, place)
        parts += [_sized(name.decode("utf-8", "replace").encode()), _sized(value)]
    if place != len(record):
        raise _Unreadable("a record has more bytes than it says")
    return b"".join(parts)


def _bytes(record: bytes, place: int) -> tuple[bytes | None, int]:
    size, place = _number(record, place)
    if size < 0:
        return None, place
    if size > len(record) - place:
        raise _Unreadable("a part of a record is longer than the record")
    return record[place : place + size], place + size


def _number(raw: bytes, place: int) -> tuple[int, int]:
    try:
        number, place = decode_varint(raw, place)
    except Exception as error:  # noqa: BLE001 - aiokafka's two versions of it raise different things
        raise _Unreadable(f"a number in it cannot be read: {error}") from None
    return number, place


def _sized(content: bytes | None) -> bytes:
    return _varint(-1) if content is None else _varint(len(content)) + content


def _varint(number: int) -> bytes:
    left, out = (number << 1) ^ (number >> 63), bytearray()
    while left > 0x7F:  # noqa: PLR2004 - seven bits at a time
        out.append(0x80 | (left & 0x7F))
        left >>= 7
    out.append(left)
    return bytes(out)
