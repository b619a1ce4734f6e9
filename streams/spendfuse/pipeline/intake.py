"""The intake: any bytes of `usage.v1` in; validated, routed and packed usage out, and the rest to the dead letters.

It never overtakes itself: a round's sends are all acknowledged before the next round is sent, with at most one packed
message for each partition in a round; a failed send ends the process (design.md section 6).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from pydantic import ValidationError

from spendfuse.client.accept import Refused
from spendfuse.client.batches import UNREADABLE
from spendfuse.engine.correct import AGE_US_MAX
from spendfuse.pipeline import quick
from spendfuse.pipeline.records import SourceRecord
from spendfuse.wire.base import encode, from_us, to_us
from spendfuse.wire.correction import CORRECTION_TYPE, Correction, PackedCorrection
from spendfuse.wire.packed import PACKED_MAX
from spendfuse.wire.usage import PACK_MAX, Usage, decode_usages, strip_confluent_prefix

ROUND_BYTES_MAX: Final = 400_000
"""Most bytes of one packed message: its ledger batch, which adds the charges, still fits one record."""
DEAD_MAX: Final = 1_000
"""Most dead letters that wait for the end of a round."""
FAULTS_MAX: Final = 5
REASON_CHARS_MAX: Final = 1_000
_HEAD: Final = b'{"v":1,"usages":['
CORRECTIONS_HEAD: Final = b'{"v":1,"corrections":['
"""How a packed message of corrections begins."""
_TAIL: Final = b"]}"


class DeadLetter(NamedTuple):
    """Something refused: the record it came in, the reason, and the part of it when it was a pack."""

    record: SourceRecord
    reason: str
    value: bytes | None
    nth: int


class Limits(NamedTuple):
    """How old and how far ahead of the clock a usage may be, in microseconds."""

    age_us_max: int
    ahead_us_max: int


Genuine = Callable[[SourceRecord], Correction]
"""Returns the correction in a record, or raises `Refused` for what no operator has signed."""


def nobody_corrects(record: SourceRecord) -> Correction:
    """Refuse every correction: where nothing says whose key counts, no key does."""
    raise Refused("signature", f"no key is known that may correct ({record.topic})")


@dataclass(slots=True)
class Round:
    """What is sent together: at most one packed message for each partition, and the dead letters."""

    packed: dict[int, bytes] = field(default_factory=dict)
    dead: list[DeadLetter] = field(default_factory=list)
    usages: int = 0


class _Packing:
    """One partition's message in the making."""

    __slots__ = ("count", "head", "parts", "size")

    def __init__(self, head: bytes) -> None:
        self.head = head
        self.parts: list[bytes] = []
        self.size = 0
        self.count = 0

    def add(self, part: bytes) -> None:
        self.parts.append(part)
        self.size += len(part) + 1
        self.count += 1

    @property
    def full(self) -> bool:
        return self.size >= ROUND_BYTES_MAX or self.count >= PACKED_MAX

    def value(self) -> bytes:
        return self.head + b",".join(self.parts) + _TAIL


def rounds(
    records: Sequence[SourceRecord],
    partitions: int,
    limits: Limits,
    now_us: int,
    genuine: Genuine = nobody_corrects,
) -> Iterator[Round]:
    """Yield the rounds that records lead to, in order; total over any bytes. `genuine` knows who may correct.

    A round holds usages or corrections, so that both keep the order of their offsets.
    """
    corrects = False
    packing: dict[int, _Packing] = {}
    current = Round()
    for record in records:
        head = f'{{"p":{record.partition},"o":{record.offset},"i":'
        middle = f',"t":{max(record.timestamp_ms, -1)},"u":'
        for nth, path, text, dead, is_correction in _usages(record, limits, now_us, genuine):
            if is_correction is not corrects and packing:
                current.packed = {number: each.value() for number, each in packing.items()}
                yield current
                packing, current = {}, Round()
            corrects = is_correction
            full = False
            if dead is not None:
                current.dead.append(dead)
                full = len(current.dead) >= DEAD_MAX
            else:
                home = quick.home(path, partitions)
                pack = packing.get(home)
                if pack is None:
                    pack = packing[home] = _Packing(CORRECTIONS_HEAD if is_correction else _HEAD)
                pack.add(text if is_correction else b"%b%d%b%b}" % (head.encode(), nth, middle.encode(), text))
                current.usages += 1
                full = pack.full
            if full:
                current.packed = {number: each.value() for number, each in packing.items()}
                yield current
                packing, current = {}, Round()
    if packing or current.dead:
        current.packed = {number: each.value() for number, each in packing.items()}
        yield current


class _Item(NamedTuple):
    """One usage or correction of a record: its place, its agent's path and its JSON; or a dead letter."""

    nth: int
    path: str
    text: bytes
    dead: DeadLetter | None = None
    is_correction: bool = False


def _usages(record: SourceRecord, limits: Limits, now_us: int, genuine: Genuine) -> Iterator[_Item]:
    if not record.value:
        yield _Item(0, "", b"", DeadLetter(record, "the record has no value", None, 0))
        return
    quickly = quick.usages(record.value)
    if quickly is not None:
        for nth, (each, who, ts_us, _) in enumerate(quickly):
            fault = _fault_of_time(ts_us, limits, now_us)
            yield _timely(record, nth, who.path, quick.encode(each), fault, single=len(quickly) == 1)
        return
    if _says_correction(record.value):
        yield _corrected(record, limits, now_us, genuine)
        return
    try:
        usages = decode_usages(record.value)
    except ValidationError as error:
        yield from _salvaged(record, error, limits, now_us)
        return
    for nth, usage in enumerate(usages):
        fault = _fault_of_time(to_us(usage.ts), limits, now_us)
        yield _timely(record, nth, usage.agent_path, encode(usage), fault, single=len(usages) == 1)


def _says_correction(value: bytes) -> bool:
    """Say whether a record means to be a correction; one field more than a usage may have."""
    if b'"correction"' not in value:
        return False
    try:
        message = json.loads(value)
    except (ValueError, RecursionError):
        return False
    return isinstance(message, dict) and message.get("type") == CORRECTION_TYPE


def _corrected(record: SourceRecord, limits: Limits, now_us: int, genuine: Genuine) -> _Item:
    try:
        correction = genuine(record)
    except Refused as refusal:
        return _Item(0, "", b"", DeadLetter(record, f"correction: {refusal}"[:REASON_CHARS_MAX], None, 0))
    fault = _fault_of_time(to_us(correction.at), limits._replace(age_us_max=AGE_US_MAX), now_us, "at")
    if fault is None and to_us(correction.ts) > to_us(correction.at) + limits.ahead_us_max:
        fault = (
            f"ts: {correction.ts.isoformat()} is after at, {correction.at.isoformat()}: no usage is corrected before it"
        )
    if fault is not None:
        return _Item(0, "", b"", DeadLetter(record, f"correction: {fault}", None, 0))
    packed = PackedCorrection(p=record.partition, o=record.offset, t=max(record.timestamp_ms, -1), c=correction)
    return _Item(0, correction.agent_path, encode(packed), is_correction=True)


def _timely(record: SourceRecord, nth: int, path: str, text: bytes, fault: str | None, *, single: bool) -> _Item:
    if fault is None:
        return _Item(nth, path, text)
    return _Item(nth, path, text, DeadLetter(record, fault, None if single else text, nth))


def _fault_of_time(ts_us: int, limits: Limits, now_us: int, field: str = "ts") -> str | None:
    age_us = now_us - ts_us
    if age_us > limits.age_us_max:
        said, most_s = from_us(ts_us).isoformat(), limits.age_us_max // 1_000_000
        return f"{field}: {said} is {age_us // 1_000_000} s old; the most is {most_s} s"
    if -age_us > limits.ahead_us_max:
        said, most_s = from_us(ts_us).isoformat(), limits.ahead_us_max // 1_000_000
        return f"{field}: {said} is {-age_us // 1_000_000} s ahead of the clock; the most is {most_s} s"
    return None


def _salvaged(record: SourceRecord, error: ValidationError, limits: Limits, now_us: int) -> Iterator[_Item]:
    """Yield the good usages of a pack that has bad ones, and each bad one by itself; else the whole record."""
    items = _pack_items(record.value or b"")
    if items is None:
        unreadable = dict(record.headers).get(UNREADABLE)
        why = unreadable.decode("utf-8", "replace") if unreadable else reason(error)
        yield _Item(0, "", b"", DeadLetter(record, why, None, 0))
        return
    for nth, item in enumerate(items):
        text = json.dumps(item).encode()
        try:
            usage = Usage.model_validate_json(text)
        except ValidationError as fault:
            yield _Item(nth, "", text, DeadLetter(record, reason(fault), text, nth))
            continue
        late = _fault_of_time(to_us(usage.ts), limits, now_us)
        yield _timely(record, nth, usage.agent_path, encode(usage), late, single=False)


def _pack_items(value: bytes) -> list[object] | None:
    try:
        pack = json.loads(strip_confluent_prefix(value))
    except (ValueError, RecursionError):
        return None
    if not isinstance(pack, dict) or set(pack) - {"v", "usages"} or repr(pack.get("v", 1)) != "1":
        return None
    items = pack.get("usages")
    return items if isinstance(items, list) and 1 <= len(items) <= PACK_MAX else None


def reason(error: ValidationError) -> str:
    """Return what is wrong with a message in one line: each field at fault, without its value."""
    faults = error.errors(include_input=False, include_url=False, include_context=False)
    # A union names each of its members in the location; a person wants the field.
    lines = []
    for fault in faults[:FAULTS_MAX]:
        field = ".".join(str(part) for part in fault["loc"] if part not in ("Usage", "UsagePack"))
        lines.append(f"{field}: {fault['msg']}" if field else fault["msg"])
    more = len(faults) - FAULTS_MAX
    return ("; ".join(lines) + (f"; and {more} more" if more > 0 else ""))[:REASON_CHARS_MAX]
