"""Batches: runs of ledger messages that go into ClickHouse as one, formed alike however often they are formed.

Pure: no I/O, no clock. A batch follows from its header's `seq` and `marks_before` and the messages themselves, so
that after a crash the same rows are inserted under the same tokens, and ClickHouse knows them again.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, NamedTuple

from pydantic import Field, ValidationError
from pydantic_core import from_json, to_json

from spendfuse.audit import seal
from spendfuse.audit.rows import Place, Row, Table, UnfitError, entry_row, tables, unreadable_row
from spendfuse.wire.base import Offset, Partition, WireModel, encode
from spendfuse.wire.ledger import LEDGER_BATCH_MAX, LedgerBatch, LedgerEntry
from spendfuse.wire.packed import INDEX_BITS

BATCH_BYTES_MAX: Final = 16_777_216
"""Most bytes of ledger messages in one batch (one message always fits)."""
MARKS_BYTES_MAX: Final = 400_000
"""Most bytes all marks of a partition may take in a header, which holds them twice and must fit one message."""
MARK_IDS_MAX: Final = 16
"""Most ids remembered at one origin position: the caps that one usage may cross at once."""
_MARK_OVERHEAD_BYTES: Final = 32
_DOMAIN: Final = b"spendfuse-batch-v1\0"

Mark = tuple[int, tuple[str, ...]]
"""The last origin position of a lane, and the ids of the entries that lay there."""
Marks = Mapping[str, Mark]


class Message(NamedTuple):
    """One message of the ledger; `value` is None for a tombstone, which the ledger should not have."""

    offset: int
    timestamp_ms: int
    value: bytes | None


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Number = Annotated[int, Field(ge=0, lt=2**64)]


class Seal(WireModel):
    """What proves a batch's rows: the root of their tree, and the chain to the batch before it.

    `header_hash` covers all of it, and of the header what `seal.HeaderFields` names. `written_at_ms` is the ledger's
    time of the last message, `occurred_*_us` span the usage (0 without any): all follow from the messages.
    """

    leaf_version: Annotated[int, Field(ge=1, le=255)]
    leaf_sum: Number
    usage_rows: Annotated[int, Field(ge=0)]
    written_at_ms: Number
    occurred_from_us: Number
    occurred_to_us: Number
    merkle_root: Sha256
    prev_hash: Sha256
    header_hash: Sha256


class BatchHeader(WireModel):
    """What is written before a batch's rows (`batches.v1`, key = ledger partition).

    `generation` grows with each owner of the partition: a late word of a former owner never counts.
    `content_sha256` covers topic, partition, seq and every message with its offset.
    Version 1 has no seal: its rows are unsealed, and stay so when they are inserted again.
    """

    v: Literal[1, 2] = 1
    partition: Partition
    generation: Annotated[int, Field(ge=0)]
    seq: Annotated[int, Field(ge=1)]
    first_offset: Offset
    last_offset: Offset
    rows: Annotated[int, Field(ge=0)]
    content_sha256: Sha256
    marks_before: dict[str, Mark]
    marks_after: dict[str, Mark]
    seal: Seal | None = None

    @property
    def link(self) -> str:
        """Return the hash that the next header holds: this one's, or the content's of a batch that is not sealed."""
        return self.seal.header_hash if self.seal else self.content_sha256


@dataclass(frozen=True, slots=True)
class Batch:
    """A header and the rows it speaks of."""

    header: BatchHeader
    tables: tuple[Table, ...]

    def token(self, table: str) -> str:
        """Return the deduplication token of this batch's insert into a table: the header's hash.

        ClickHouse remembers tokens for each table, so one serves all of them. Version 1 had the table's name in it.
        """
        sealed = self.header.seal
        return sealed.header_hash if sealed else f"{self.header.content_sha256}:{table}"

    @property
    def batch_row(self) -> Table:
        """Return the row of `audit_batches`, to be inserted after all others."""
        header = self.header
        row = {
            "ledger_partition": header.partition,
            "generation": header.generation,
            "seq": header.seq,
            "first_offset": header.first_offset,
            "last_offset": header.last_offset,
            "rows": header.rows,
            "content_sha256": header.content_sha256,
        }
        if header.seal is not None:
            sealed = header.seal
            row |= {
                "leaf_version": sealed.leaf_version,
                "leaf_sum": sealed.leaf_sum,
                "usage_rows": sealed.usage_rows,
                "written_at": sealed.written_at_ms,
                "occurred_from": sealed.occurred_from_us,
                "occurred_to": sealed.occurred_to_us,
                "merkle_root": sealed.merkle_root,
                "prev_hash": sealed.prev_hash,
                "header_hash": sealed.header_hash,
            }
        return Table("audit_batches", {name: [value] for name, value in row.items()})


class BatchMismatchError(Exception):
    """The ledger no longer says what a header says it said."""


@dataclass(frozen=True, slots=True)
class _Fact:
    """One entry of a message; or the bytes that are none, and why."""

    entry: LedgerEntry | None
    raw: bytes
    reason: str
    index: int


@dataclass(frozen=True, slots=True)
class _Decoded:
    message: Message
    facts: tuple[_Fact, ...]


class Collector:
    """The open batch of one ledger partition: messages in, sealed batches out."""

    def __init__(
        self,
        topic: str,
        partition: int,
        generation: int,
        seq: int,
        marks: Marks,
        rows_max: int,
        *,
        link: str = seal.GENESIS,
    ) -> None:
        """Start with the number of the next batch, and the marks and link after the last one."""
        self.topic = topic
        self.partition = partition
        self.generation = generation
        self.seq = seq
        self.marks: dict[str, Mark] = dict(marks)
        self.link = link
        self._rows_max = rows_max
        self._open: list[_Decoded] = []
        self._rows = 0
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._open)

    @property
    def is_full(self) -> bool:
        """Say whether the open batch should be sealed now."""
        return self._rows >= self._rows_max or self.size_bytes >= BATCH_BYTES_MAX

    def add(self, message: Message) -> bool:
        """Take a message; False when it does not fit any more: seal first, then add it again."""
        decoded = _decode(message)
        rows, size = len(decoded.facts), len(message.value or b"")
        if self._open and (self._rows + rows > self._rows_max or self.size_bytes + size > BATCH_BYTES_MAX):
            return False
        self._open.append(decoded)
        self._rows += rows
        self.size_bytes += size
        return True

    def seal(self) -> Batch:
        """Return the open batch and begin the next; raises ValueError when nothing was added."""
        batch = _form(self.topic, self.partition, self.generation, self.seq, self.marks, self._open, self.link)
        self.seq += 1
        self.marks = dict(batch.header.marks_after)
        self.link = batch.header.link
        self._open, self._rows, self.size_bytes = [], 0, 0
        return batch


def form_again(topic: str, header: BatchHeader, messages: Sequence[Message]) -> Batch:
    """Return the batch of a header, formed anew from the ledger; raises BatchMismatchError when it is another one."""
    inside = [message for message in messages if header.first_offset <= message.offset <= header.last_offset]
    if not inside:
        raise BatchMismatchError(_mismatch(header, "no message of it is left"))
    decoded = [_decode(message) for message in inside]
    link = header.seal.prev_hash if header.seal else None
    batch = _form(topic, header.partition, header.generation, header.seq, header.marks_before, decoded, link)
    if batch.header.content_sha256 != header.content_sha256:
        raise BatchMismatchError(_mismatch(header, f"its messages hash to {batch.header.content_sha256[:12]}... now"))
    if batch.header.link != header.link:
        raise BatchMismatchError(
            _mismatch(
                header, "its rows hash to another root now: it was begun by another version, which must finish it"
            )
        )
    return Batch(header, batch.tables)


def _mismatch(header: BatchHeader, what: str) -> str:
    return (
        f"batch {header.seq} of ledger partition {header.partition} (offsets {header.first_offset} to "
        f"{header.last_offset}, SHA-256 {header.content_sha256[:12]}...): {what}"
    )


def _form(
    topic: str,
    partition: int,
    generation: int,
    seq: int,
    marks_before: Marks,
    decoded: Sequence[_Decoded],
    link: str | None,
) -> Batch:
    if not decoded:
        raise ValueError("a batch has at least one message")
    marks = dict(marks_before)
    rows: list[tuple[str, Row]] = []
    for item in decoded:
        place = Place(topic, partition, item.message.offset, item.message.timestamp_ms)
        rows += _rows(item.facts, place, marks)
    for nth, (_, row) in enumerate(rows):
        row["batch_seq"], row["batch_row"] = (0, 0) if link is None else (seq, nth)
    header = BatchHeader(
        partition=partition,
        generation=generation,
        seq=seq,
        first_offset=decoded[0].message.offset,
        last_offset=decoded[-1].message.offset,
        rows=len(rows),
        content_sha256=_content_sha256(topic, partition, seq, (item.message for item in decoded)),
        marks_before=dict(marks_before),
        marks_after=marks,
    )
    columns = tables(rows)
    if link is not None:
        written_at_ms = max(0, *(item.message.timestamp_ms for item in decoded))
        header = header.model_copy(update={"v": 2, "seal": _seal(header, columns, link, written_at_ms)})
    return Batch(header, columns)


def _seal(header: BatchHeader, columns: Sequence[Table], link: str, written_at_ms: int) -> Seal:
    leaves: list[bytes] = [b""] * header.rows
    for table in columns:
        for place, leaf in zip(table.columns["batch_row"], seal.leaves(table), strict=True):
            leaves[place] = leaf
    occurred = [us for table in columns if table.name == "usage_events" for us in table.columns["occurred_at"]]
    fields = seal.HeaderFields(
        leaf_version=seal.LEAF_VERSION,
        partition=header.partition,
        seq=header.seq,
        first_offset=header.first_offset,
        last_offset=header.last_offset,
        rows=header.rows,
        usage_rows=len(occurred),
        leaf_sum=seal.leaf_sum(leaves),
        written_at_ms=written_at_ms,
        occurred_from_us=min(occurred, default=0),
        occurred_to_us=max(occurred, default=0),
        content_sha256=header.content_sha256,
        merkle_root=seal.merkle_root(leaves).hex(),
        prev_hash=link,
    )
    return Seal(
        leaf_version=fields.leaf_version,
        leaf_sum=fields.leaf_sum,
        usage_rows=fields.usage_rows,
        written_at_ms=fields.written_at_ms,
        occurred_from_us=fields.occurred_from_us,
        occurred_to_us=fields.occurred_to_us,
        merkle_root=fields.merkle_root,
        prev_hash=fields.prev_hash,
        header_hash=seal.header_hash(fields),
    )


def _content_sha256(topic: str, partition: int, seq: int, messages: Iterable[Message]) -> str:
    digest = hashlib.sha256(_DOMAIN)
    digest.update(f"{topic}\n{partition}\n{seq}\n".encode())
    for message in messages:
        value = message.value
        # A tombstone has length -1: it is not an empty message.
        digest.update(f"{message.offset} {-1 if value is None else len(value)}\n".encode())
        digest.update(value or b"")
    return digest.hexdigest()


def _rows(facts: Iterable[_Fact], place: Place, marks: dict[str, Mark]) -> Iterable[tuple[str, Row]]:
    for fact in facts:
        if fact.entry is None:
            yield unreadable_row(fact.raw, fact.reason, place, fact.index)
            continue
        try:
            if _seen(fact.entry, marks):
                continue
            yield entry_row(fact.entry, place)
        except UnfitError as error:
            yield unreadable_row(encode(fact.entry), str(error), place, fact.index)


def _seen(entry: LedgerEntry, marks: dict[str, Mark]) -> bool:
    """Say whether an entry lies at or below its lane's mark; if not, move the mark to it.

    A lane is one origin partition and one kind of entry, charge and duplicate together (a replay may turn the one
    into the other); entries of different kinds come from different writers, in no order among each other.
    """
    lane = "usage" if entry.kind in ("charge", "duplicate") else entry.kind
    key = f"{entry.topic}/{entry.partition}/{lane}"
    position = (entry.offset << INDEX_BITS) | entry.index
    identity = _identity(entry)
    last, ids = marks.get(key, (-1, ()))
    if position < last or (position == last and (not identity or identity in ids)):
        return True
    if last < 0 and sum(len(known) + _MARK_OVERHEAD_BYTES for known in marks) > MARKS_BYTES_MAX:
        raise UnfitError(f"one origin too many: {entry.topic}/{entry.partition}, and the batch header has no room")
    marks[key] = (position, ((*(ids if position == last else ()), identity)[-MARK_IDS_MAX:] if identity else ()))
    return False


def _identity(entry: LedgerEntry) -> str:
    """Return what tells entries of one origin apart: one usage may cross several caps; '' where it cannot be."""
    message = entry.command or entry.alert
    return message.id if message is not None and entry.kind in ("command", "decision", "alert") else ""


def _decode(message: Message) -> _Decoded:
    value = message.value
    if value is None:
        return _Decoded(message, (_Fact(None, b"", "a tombstone: the ledger is never compacted", 0),))
    try:
        entries = LedgerBatch.model_validate_json(value).entries
    except ValidationError as error:
        return _Decoded(message, _salvage(value, _why(error)))
    return _Decoded(message, tuple(_Fact(entry, b"", "", nth) for nth, entry in enumerate(entries)))


def _salvage(value: bytes, reason: str) -> tuple[_Fact, ...]:
    """Keep the good entries of a message that holds a bad one: no money is lost for a neighbour's fault."""
    whole = (_Fact(None, value, reason, 0),)
    try:
        document: Any = from_json(value)
    except ValueError:
        return whole
    entries = document.get("entries") if isinstance(document, dict) and document.get("v", 1) == 1 else None
    if not isinstance(entries, list) or not 0 < len(entries) <= LEDGER_BATCH_MAX:
        return whole
    return tuple(_salvaged(entry, nth) for nth, entry in enumerate(entries))


def _salvaged(entry: Any, nth: int) -> _Fact:
    raw = to_json(entry)
    try:
        return _Fact(LedgerEntry.model_validate_json(raw), b"", "", nth)
    except ValidationError as error:
        return _Fact(None, raw, _why(error), nth)


def _why(error: ValidationError) -> str:
    faults = error.errors(include_input=False, include_url=False, include_context=False)
    return "; ".join(f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in faults[:5])
