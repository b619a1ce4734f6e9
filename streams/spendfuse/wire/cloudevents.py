"""CloudEvents 1.0, Kafka binary mode: optional on input, always set on output.

Source: cloudevents/spec, kafka-protocol-binding.md, section 3.2.
"""

from datetime import datetime
from typing import Final

from spendfuse.wire.base import rfc3339

TYPE_PREFIX: Final = "dev.spendfuse."
CONTENT_TYPE: Final = b"application/json"


def headers(kind: str, source: str, event_id: str, ts: datetime) -> list[tuple[str, bytes]]:
    """Return the headers of one message; `kind` is such as `usage.v1`, `source` a URI reference."""
    return [
        ("ce_specversion", b"1.0"),
        ("ce_type", (TYPE_PREFIX + kind).encode()),
        ("ce_source", source.encode()),
        ("ce_id", event_id.encode()),
        ("ce_time", rfc3339(ts).encode()),
        ("content-type", CONTENT_TYPE),
    ]
