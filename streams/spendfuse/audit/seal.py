"""Seals: the leaf of a row, the tree of a batch, the chain of headers. Pure, and small enough to be checked by reading.

A leaf is the SHA-256 of typed fields in ClickHouse's RowBinary form (integers little-endian, strings behind their
length), so that the database computes the same from its columns; no JSON is ever serialised again. The tree is that of
RFC 6962, its domain bytes too: 0 before a leaf, 1 before a node; 2 is before a header.
"""

import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from spendfuse.audit.rows import Table

LEAF_VERSION: Final = 1
"""Version of the leaf; columns that are added later belong to a later version."""
GENESIS: Final = "0" * 64
"""What the first header of a chain has for its predecessor."""
EMPTY_ROOT: Final = hashlib.sha256().hexdigest()
NOT_SEALED: Final = frozenset({"ingested_at", "batch_seq", "batch_row"})
"""Columns outside the leaf: ClickHouse's own clock, and the row's place in the tree, which the tree itself proves."""

_LEAF, _NODE, _HEADER = 0, 1, 2
_SHORT_MAX: Final = 127

Columns = tuple[tuple[str, str], ...]
_ORIGIN: Final = "src_topic:s src_partition:u16 src_offset:u64 src_index:u16 ledger_partition:u16 ledger_offset:u64"


def _columns(text: str) -> Columns:
    return tuple((name, kind) for name, _, kind in (word.partition(":") for word in text.split()))


LEAF_COLUMNS: Final[Mapping[str, Columns]] = {
    "usage_events": _columns(
        "usage_id:s kind:e usage_kind:e workspace:s team:s agent:s run:s root_run:s parent_run:s workflow:s provider:s "
        "model:s tier:s currency:s price_book:s priced_by:s source:s tags:map rates:i64s occurred_at:us recorded_at:us "
        "input_tokens:u32 cache_read_tokens:u32 cache_write_5m_tokens:u32 cache_write_1h_tokens:u32 output_tokens:u32 "
        f"reasoning_tokens:u32 cost_nanos:i64 tier_known:u8 late:u8 {_ORIGIN}"
    ),
    "corrections": _columns(
        "correction_id:s usage_id:s workspace:s team:s agent:s run:s root_run:s parent_run:s workflow:s provider:s "
        "model:s tier:s currency:s reason:s note:s stated_by:s tags:map occurred_at:us stated_at:us recorded_at:us "
        "input_tokens:i64 cache_read_tokens:i64 cache_write_5m_tokens:i64 cache_write_1h_tokens:i64 output_tokens:i64 "
        f"reasoning_tokens:i64 cost_nanos:i64 late:u8 {_ORIGIN}"
    ),
    "commands": _columns(
        "command_id:s action:e scope:s scope_kind:s workspace:s budget:s cap:s window_kind:s window_label:s "
        "window_timezone:s unit:s cause_usage_id:s price_book:s issued_by:s reason:s message:s degrade_models:map "
        "degrade_max_output_tokens:i64? expires_at:us? window_start:us? window_end:us? cause_ts:us? decided_only:u8 "
        "seq:u64 budget_version:u64 issued_at:us cap_amount:i64 spend:i64 committed:i64 fraction_bp:u64 "
        f"cause_partition:u16 cause_offset:u64 cause_produced_at_ms:i64 recorded_at:us {_ORIGIN}"
    ),
    "acks": _columns(
        "command_id:s scope:s scope_kind:s workspace:s budget:s cap:s agent:s run:s guard:s state:e halt_lag_us:i64? "
        f"seq:u64 at:us recorded_at:us {_ORIGIN}"
    ),
    "alerts": _columns(
        "alert_id:s kind:s severity:s scope:s scope_kind:s workspace:s budget:s cap:s unit:s usage_id:s message:s "
        f"ts:us cap_amount:i64 spend:i64 committed:i64 fraction_bp:u64 recorded_at:us {_ORIGIN}"
    ),
    "ledger_events": _columns(f"kind:s data:s recorded_at:us {_ORIGIN}"),
}
"""The fields of a leaf, in their order: table -> (column, kind of value)."""

# s text, e enumeration as text, uN/i64 integers, us microseconds since the epoch, ? may be null, i64s list, map sorted.
_STRUCT: Final = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "i64": "q", "us": "q"}


class HeaderFields(NamedTuple):
    """What a header's hash covers; hashes are lower-case hex, times as named."""

    leaf_version: int
    partition: int
    seq: int
    first_offset: int
    last_offset: int
    rows: int
    usage_rows: int
    leaf_sum: int
    written_at_ms: int
    occurred_from_us: int
    occurred_to_us: int
    content_sha256: str
    merkle_root: str
    prev_hash: str


def leaves(table: Table) -> list[bytes]:
    """Return the leaf hash of each row of a table, in the rows' order; KeyError for a table that is not sealed."""
    count = table.rows
    head = bytes((_LEAF, LEAF_VERSION)) + _text(table.name)
    parts: list[Iterable[bytes]] = [[head] * count]
    run: list[tuple[str, str]] = []
    for name, kind in (*LEAF_COLUMNS[table.name], ("", "")):
        if kind in _STRUCT:
            run.append((name, kind))
            continue
        if run:  # neighbours of fixed width are packed at once: this is done for every row there is
            pack = struct.Struct("<" + "".join(_STRUCT[each] for _, each in run)).pack
            parts.append(map(pack, *(table.columns[each] for each, _ in run)))
            run = []
        if kind in {"s", "e"}:  # most columns of text repeat a few values
            values = table.columns[name]
            known = {value: _text(value) for value in set(values)}
            parts.append(map(known.__getitem__, values))
        elif kind:
            parts.append(map(_ENCODE[kind], table.columns[name]))
    sha256 = hashlib.sha256
    return [sha256(b"".join(row)).digest() for row in zip(*parts, strict=True)]


def leaf_sql(table: str) -> str:
    """Return the ClickHouse expression that computes a row's leaf, as `sql/queries/verify_leaves.sql` has it."""
    form = {"e": "toString({})", "map": "mapSort({})"}
    columns = ", ".join(form.get(kind, "{}").format(name) for name, kind in LEAF_COLUMNS[table])
    return f"SHA256(formatRow('RowBinary', toUInt8({_LEAF}), toUInt8({LEAF_VERSION}), '{table}', {columns}))"


def leaf_sum(leaf_hashes: Iterable[bytes]) -> int:
    """Return the sum of the leaves' first 8 bytes modulo 2^64: equal for equal rows in another order."""
    return sum(int.from_bytes(leaf[:8], "little") for leaf in leaf_hashes) % 2**64


def merkle_root(leaf_hashes: Sequence[bytes]) -> bytes:
    """Return the root of RFC 6962, section 2.1 (an odd node is promoted, which is the same tree)."""
    if not leaf_hashes:
        return hashlib.sha256().digest()
    level = list(leaf_hashes)
    while len(level) > 1:
        level = _parents(level)
    return level[0]


def audit_path(leaf_hashes: Sequence[bytes], index: int) -> list[bytes]:
    """Return the siblings from a leaf up to the root (RFC 6962, section 2.1.1); IndexError for no such leaf."""
    if not 0 <= index < len(leaf_hashes):
        raise IndexError(f"leaf {index} of a tree of {len(leaf_hashes)}")
    level, path = list(leaf_hashes), []
    while len(level) > 1:
        if (sibling := index ^ 1) < len(level):
            path.append(level[sibling])
        level, index = _parents(level), index // 2
    return path


def root_of_path(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes | None:
    """Return the root that a path leads to (RFC 9162, section 2.1.3.2); None for a path of another tree's shape."""
    if not 0 <= index < size:
        return None
    node, last = leaf, size - 1
    for sibling in path:
        if last == 0:
            return None
        if index & 1 or index == last:
            node = _node(sibling, node)
            while index and not index & 1:
                index, last = index >> 1, last >> 1
        else:
            node = _node(node, sibling)
        index, last = index >> 1, last >> 1
    return node if last == 0 else None


def header_hash(fields: HeaderFields) -> str:
    """Return a header's hash in hex: it names the batch, and the next header holds it as `prev_hash`."""
    numbers = struct.pack("<BBHQQQIIQqqq", _HEADER, *fields[:11])
    return hashlib.sha256(numbers + b"".join(map(_text, fields[11:]))).hexdigest()


HEADER_SQL: Final = (
    "SHA256(formatRow('RowBinary', toUInt8(2), leaf_version, ledger_partition, seq, first_offset, last_offset, rows, "
    "usage_rows, leaf_sum, toUnixTimestamp64Milli(written_at), toUnixTimestamp64Micro(occurred_from), "
    "toUnixTimestamp64Micro(occurred_to), toString(content_sha256), toString(merkle_root), toString(prev_hash)))"
)
"""The same in ClickHouse, of a row of `audit_batches`."""


def _parents(level: list[bytes]) -> list[bytes]:
    parents = [_node(level[at], level[at + 1]) for at in range(0, len(level) - 1, 2)]
    if len(level) % 2:
        parents.append(level[-1])
    return parents


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def _length(count: int) -> bytes:
    """Return a length as an unsigned LEB128, as RowBinary has it."""
    out = bytearray()
    while count > _SHORT_MAX:
        out.append(count & _SHORT_MAX | 0x80)
        count >>= 7
    out.append(count)
    return bytes(out)


def _text(value: str) -> bytes:
    raw = value.encode()
    return _length(len(raw)) + raw


def _map(value: Mapping[str, str]) -> bytes:
    # By the bytes of the key: that is how the database sorts.
    pairs = sorted((key.encode(), text) for key, text in value.items())
    return _length(len(pairs)) + b"".join(_length(len(key)) + key + _text(text) for key, text in pairs)


def _numbers(values: Sequence[int]) -> bytes:
    return _length(len(values)) + struct.pack(f"<{len(values)}q", *values)


def _number_or_null(value: int | None) -> bytes:
    return b"\1" if value is None else b"\0" + struct.pack("<q", value)


_ENCODE: Final[Mapping[str, Callable[[Any], bytes]]] = {
    "map": _map,
    "i64s": _numbers,
    "i64?": _number_or_null,
    "us?": _number_or_null,
}
