"""The one answer clickhouse-go needs in its own framing: the block it greets a server with over HTTP.

clickhouse-go (Grafana's ClickHouse plugin) sends `client_protocol_version`, and expects the first block with block info
and a byte for custom serialization; the embedded engine writes blocks of revision 0, without either. This block has
both and says `revision() = 0`, after which clickhouse-go reads plain blocks of revision 0. Read in clickhouse-go:
conn_http.go takes the revision of this answer, lib/proto/block.go tests `revision > 0`.
"""

import re
import struct
from typing import Final

_HELLO: Final = re.compile(
    r"\s*SELECT\s+displayName\(\)\s*,\s*version\(\)\s*,\s*revision\(\)\s*,\s*timezone\(\)\s*(?:FORMAT\s+Native\s*)?;?\s*",
    re.IGNORECASE,
)
# Field 1 (is_overflows) is 0, field 2 (bucket_num) is -1, then the end.
_BLOCK_INFO: Final = b"\x01\x00\x02\xff\xff\xff\xff\x00"
_NO_CUSTOM_SERIALIZATION: Final = b"\x00"
_VARINT_BITS: Final = 7
_VARINT_MORE: Final = 0x80


def is_hello(statement: str) -> bool:
    """Say whether a statement is clickhouse-go's greeting."""
    return _HELLO.fullmatch(statement) is not None


def hello(display_name: str, version: str, timezone: str) -> bytes:
    """Return the block of one row that greets back: name, version, revision 0 and time zone."""
    columns = (
        ("displayName()", "String", _text(display_name)),
        ("version()", "String", _text(version)),
        ("revision()", "UInt32", struct.pack("<I", 0)),
        ("timezone()", "String", _text(timezone)),
    )
    head = _BLOCK_INFO + _varint(len(columns)) + _varint(1)
    return head + b"".join(_text(name) + _text(kind) + _NO_CUSTOM_SERIALIZATION + data for name, kind, data in columns)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= _VARINT_MORE:
        encoded.append(value & (_VARINT_MORE - 1) | _VARINT_MORE)
        value >>= _VARINT_BITS
    encoded.append(value)
    return bytes(encoded)


def _text(text: str) -> bytes:
    raw = text.encode()
    return _varint(len(raw)) + raw
