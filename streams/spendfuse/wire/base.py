"""The manners every message shares: frozen, strict, bounded, no unknown fields."""

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    Strict,
)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
YEAR_MIN = 1970
YEAR_MAX = 9998

TOKENS_MAX = 1_000_000_000
"""Upper bound of one counter of one usage, in tokens."""
NANOS_MAX = 2**63 - 1
"""Upper bound of any amount, in nano-units: what a ClickHouse Int64 holds."""
SAFE_INTEGER_MAX = 2**53 - 1
"""Upper bound of a sequence: the largest integer a JavaScript reader keeps exact (RFC 8259, section 6)."""

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$"
ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:/@#+-]{0,127}$"
MODEL_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}$"
SCOPE_PATTERN = (
    r"^(workspace:[A-Za-z0-9._+-]{1,64}"
    r"|team:[A-Za-z0-9._+-]{1,64}/[A-Za-z0-9._+-]{1,64}"
    r"|agent:[A-Za-z0-9._+-]{1,64}/[A-Za-z0-9._+-]{1,64}/[A-Za-z0-9._+-]{1,64}"
    r"|run:[A-Za-z0-9._+-]{1,64}/[A-Za-z0-9._:/@#+-]{1,128})$"
)
LINE_PATTERN = r"^[^\x00-\x1f\x7f]*$"

Name = Annotated[
    str,
    Field(pattern=NAME_PATTERN, description="1-64 of A-Z a-z 0-9 . _ + -; no @, a name is not an e-mail address"),
]
Id = Annotated[str, Field(pattern=ID_PATTERN, description="1-128 of A-Z a-z 0-9 . _ : / @ # + -")]
ModelName = Annotated[str, Field(pattern=MODEL_PATTERN)]
Scope = Annotated[str, Field(pattern=SCOPE_PATTERN, description="whose money: kind:path")]
Line = Annotated[str, Field(max_length=512, pattern=LINE_PATTERN, description="one line, no control characters")]
TagValue = Annotated[str, Field(max_length=128, pattern=LINE_PATTERN)]
Count = Annotated[int, Field(ge=0, le=TOKENS_MAX)]
Amount = Annotated[int, Field(ge=0, le=NANOS_MAX)]
Sequence = Annotated[int, Field(ge=0, le=SAFE_INTEGER_MAX)]
OFFSET_MAX = 2**47 - 1
"""Upper bound of an offset: with the place inside a pack (16 bits) it is still a signed 64-bit position."""
Offset = Annotated[int, Field(ge=0, le=OFFSET_MAX)]
Partition = Annotated[int, Field(ge=0, le=65_535)]


_RFC3339: Final = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)


def to_utc(value: datetime) -> datetime:
    """Return the same instant with the offset written as UTC.

    Raises `ValueError` outside the years 1970 to 9998, in which every window of every zone can be computed.
    """
    # The year is checked as written, before the conversion: that one overflows at both ends of the calendar.
    if not YEAR_MIN <= value.year <= YEAR_MAX:
        raise ValueError(f"the year {value.year} is outside {YEAR_MIN} to {YEAR_MAX}: use an instant of that time")
    utc = value.astimezone(UTC)
    if utc < EPOCH:
        raise ValueError(f"{rfc3339(utc)} is before 1970-01-01T00:00:00Z: use a later instant")
    return utc


def rfc3339(value: datetime) -> str:
    """Return an instant as RFC 3339 in UTC with microseconds and `Z`."""
    return value.astimezone(UTC).isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


def to_us(value: datetime) -> int:
    """Return microseconds since the epoch (exact; `datetime.timestamp` is a float)."""
    return (value - EPOCH) // MICROSECOND


def from_us(us: int) -> datetime:
    """Return the UTC instant of microseconds since the epoch."""
    return EPOCH + timedelta(microseconds=us)


def _written_as_rfc3339(value: object) -> object:
    # pydantic also reads epoch seconds, a space for the T, and times without seconds: other emitters' schemas do not.
    if isinstance(value, datetime) or (isinstance(value, str) and _RFC3339.fullmatch(value) is not None):
        return value
    raise ValueError("must be RFC 3339 with an offset, such as 2026-11-23T14:44:46.830Z")


Instant = Annotated[
    AwareDatetime,
    Strict(False),  # behind the check of the text, which is stricter than pydantic's
    BeforeValidator(_written_as_rfc3339),
    AfterValidator(to_utc),
    PlainSerializer(rfc3339, return_type=str, when_used="json"),
    Field(description="RFC 3339 with an offset"),
]


class WireModel(BaseModel):
    """A message, or a part of one: frozen, no unknown fields, no silent coercion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def encode(message: WireModel) -> bytes:
    """Return a message as compact JSON, leaving out what is unset (`None`)."""
    return message.model_dump_json(exclude_none=True).encode()
