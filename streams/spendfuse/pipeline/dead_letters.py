"""Dead letters read back: what was refused, why, where it came from, and the record that offers it once more."""

from typing import Any, Final, NamedTuple

from spendfuse.client.follow import Record
from spendfuse.pipeline.publish import DEAD_VALUE_BYTES_MAX
from spendfuse.pipeline.records import Headers
from spendfuse.wire.topics import DEAD_LETTERS, TOPICS, USAGE

REPLAY_HEADER: Final = "spendfuse-replay-of"
"""Marks a replay: `topic/partition/offset` of the dead letter it came from."""
HEADER_CHARS_MAX: Final = 1_000
_ANY_PARTITION: Final = frozenset({USAGE.name})
_KNOWN: Final = frozenset(topic.name for topic in TOPICS)


class Letter(NamedTuple):
    """One dead letter: `offset` is its own, the `origin` fields are those of the record that was refused.

    An origin number is -1 where the header is missing or no number: anybody may have written it.
    """

    offset: int
    timestamp_ms: int
    reason: str
    topic: str
    origin_partition: int
    origin_offset: int
    nth: int
    key: bytes | None
    value: bytes
    headers: Headers

    @property
    def origin(self) -> str:
        """Return where the refused record lies, `topic/partition/offset`."""
        return f"{self.topic or '?'}/{self.origin_partition}/{self.origin_offset}"


class Replay(NamedTuple):
    """The record that offers a dead letter's bytes again; `partition` None lets the producer choose."""

    topic: str
    value: bytes
    partition: int | None
    headers: Headers


class Filter(NamedTuple):
    """Which letters are meant: a part of the reason (any case), the origin topic, and times in ms since the epoch."""

    reason: str = ""
    topic: str = ""
    since_ms: int | None = None
    until_ms: int | None = None
    offsets: frozenset[int] = frozenset()

    def takes(self, letter: Letter) -> bool:
        """Say whether a letter is meant."""
        return (
            self.reason.casefold() in letter.reason.casefold()
            and self.topic in {"", letter.topic}
            and (self.since_ms is None or letter.timestamp_ms >= self.since_ms)
            and (self.until_ms is None or letter.timestamp_ms < self.until_ms)
            and (not self.offsets or letter.offset in self.offsets)
        )


def read_letter(record: Record) -> Letter:
    """Return a record of the dead letter topic as a letter; total over any bytes."""

    def text(name: str) -> str:
        return (record.header(name) or b"").decode("utf-8", "replace")[:HEADER_CHARS_MAX]

    def number(name: str) -> int:
        said = text(name)
        return int(said) if said.isascii() and said.isdigit() and len(said) < 20 else -1  # noqa: PLR2004 - 64 bits

    return Letter(
        offset=record.offset,
        timestamp_ms=record.timestamp_ms,
        reason=text("spendfuse-reason"),
        topic=text("spendfuse-topic"),
        origin_partition=number("spendfuse-partition"),
        origin_offset=number("spendfuse-offset"),
        nth=number("spendfuse-index"),
        key=record.key,
        value=record.value or b"",
        headers=record.headers,
    )


def why_not(letter: Letter, *, force: bool) -> str | None:
    """Return why a letter cannot be replayed, or None."""
    if not letter.value:
        return "it has no bytes: what was refused had no value"
    if len(letter.value) >= DEAD_VALUE_BYTES_MAX:
        return f"it holds only the first {DEAD_VALUE_BYTES_MAX} bytes of what was refused"
    if letter.topic not in _KNOWN or letter.topic == DEAD_LETTERS.name:
        return f"its origin {letter.topic or '(not said)'!r} is no topic that spendfuse reads"
    if letter.topic != USAGE.name and not force:
        return f"it came from {letter.topic}, and only {USAGE.name} is replayed unless forced"
    if letter.topic not in _ANY_PARTITION and letter.origin_partition < 0:
        return "its origin partition is not known"
    return None


def replay_of(letter: Letter) -> Replay:
    """Return the record that offers a letter's bytes again.

    Usage may lie on any partition; on other topics the partition is part of what a record means, so it is the same.
    """
    return Replay(
        letter.topic,
        letter.value,
        None if letter.topic in _ANY_PARTITION else letter.origin_partition,
        [(REPLAY_HEADER, f"{DEAD_LETTERS.name}/0/{letter.offset}".encode())],
    )


def escaped(value: bytes, length_max: int) -> str:
    """Return bytes as one line of printable characters: UTF-8 where it is, everything else escaped as in Python."""
    text = value[:length_max].decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def row(letter: Letter) -> dict[str, Any]:
    """Return a letter as plain data for a program, without its bytes."""
    return {
        "offset": letter.offset,
        "timestamp_ms": letter.timestamp_ms,
        "reason": letter.reason,
        "topic": letter.topic,
        "partition": letter.origin_partition,
        "origin_offset": letter.origin_offset,
        "index": letter.nth,
        "bytes": len(letter.value),
    }
