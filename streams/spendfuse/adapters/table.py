"""Any CSV or JSON Lines file to usage, by a declared mapping; streams, in constant memory.

One line is one row (a quoted newline inside a CSV field is a bad row). A bad row is reported and the rest goes on; a
file that the mapping cannot fit at all (no header, a column that is not there) raises `TableError`.
"""

import csv
import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from pydantic import ValidationError

from spendfuse.adapters.table_mapping import (
    COUNTERS,
    NAMES,
    PRESETS,
    Mapping,
    PrefixBlocks,
    Source,
    TableError,
    load_mapping,
    parse_map,
    preset,
)
from spendfuse.wire.base import from_us, to_us
from spendfuse.wire.usage import Usage

__all__ = [
    "PRESETS",
    "Mapping",
    "PrefixBlocks",
    "PrefixCache",
    "RowError",
    "Source",
    "TableError",
    "load_mapping",
    "parse_map",
    "preset",
    "read_table",
]

LINE_BYTES_MAX: Final = 1_048_576
"""Longest line that is read; a longer one is a bad row."""
BLOCKS_MAX: Final = 1_000_000
"""Most prefix blocks that are remembered; beyond it the ones not seen for longest are forgotten."""
COLUMNS_SHOWN_MAX: Final = 20
STEM_CHARS_MAX: Final = 64
_COUNT: Final = re.compile(r"([0-9]{1,18})(?:\.0*)?")
_NUMBER: Final = re.compile(r"([0-9]{1,18})(?:\.([0-9]{1,18}))?")
_INSTANT: Final = re.compile(
    r"(\d{4}-\d{2}-\d{2})[Tt ](\d{2}:\d{2}:\d{2})(?:\.(\d{1,9}))?\s*([Zz]|[+-]\d{2}:\d{2})?", re.ASCII
)
_MICROS: Final = {"s": 1_000_000, "ms": 1_000, "us": 1, "offset_ms": 1_000}


class RowError(NamedTuple):
    """A line that became no usage: its number in the file, from 1, and why."""

    row: int
    reason: str


class _BadRowError(Exception):
    """Why a row is no usage."""


class PrefixCache:
    """The blocks of earlier prompts by provider and model, the least recently used forgotten first."""

    def __init__(self, blocks_max: int = BLOCKS_MAX) -> None:
        """Start empty."""
        self._seen: OrderedDict[tuple[str, str, int | str], None] = OrderedDict()
        self._blocks_max = blocks_max

    def seen_at_head(self, provider: str, model: str, blocks: Sequence[int | str]) -> int:
        """Return how many blocks at the head were seen before, and remember all of them."""
        keys = [(provider, model, block) for block in blocks]
        head = next((place for place, key in enumerate(keys) if key not in self._seen), len(keys))
        for key in reversed(keys):  # a prompt's head is needed for every hit: it is forgotten last
            self._seen[key] = None
            self._seen.move_to_end(key)
        while len(self._seen) > self._blocks_max:
            self._seen.popitem(last=False)
        return head


def read_table(
    path: Path, mapping: Mapping, *, on_error: Callable[[RowError], None], blocks_max: int = BLOCKS_MAX
) -> Iterator[Usage]:
    """Yield the usage of each row of a `.csv`, `.tsv`, `.jsonl` or `.ndjson` file, in the order of the file.

    A row without an id column has the id `<file stem>:<line number>`, so that reading again gives the same ids.
    `on_error` is called for each bad row. Raises `TableError` when the file as a whole cannot be used.
    """
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv", ".jsonl", ".ndjson"):
        raise TableError(f"{path}: the name ends in {suffix or 'nothing'}; wanted .csv, .tsv, .jsonl or .ndjson")
    reader = _UsageReader(path, mapping, PrefixCache(blocks_max))
    try:
        file = path.open("rb")
    except OSError as error:
        raise TableError(f"{path}: cannot be read: {error.strerror or error}") from error
    with file:
        lines = _lines(file, on_error)
        delimiter = "\t" if suffix == ".tsv" else mapping.delimiter
        rows = (
            _csv_rows(lines, path, mapping, delimiter, on_error)
            if suffix in (".csv", ".tsv")
            else _json_rows(lines, on_error)
        )
        for number, row in rows:
            try:
                yield reader.usage(number, row)
            except _BadRowError as error:
                on_error(RowError(number, str(error)))


def _lines(file: BinaryIO, on_error: Callable[[RowError], None]) -> Iterator[tuple[int, str]]:
    number = 0
    while line := file.readline(LINE_BYTES_MAX + 1):
        number += 1
        if len(line) > LINE_BYTES_MAX and not line.endswith(b"\n"):
            on_error(RowError(number, f"the line is longer than {LINE_BYTES_MAX:,} bytes"))
            while line and not line.endswith(b"\n"):
                line = file.readline(LINE_BYTES_MAX)
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            on_error(RowError(number, f"not UTF-8 at byte {error.start}"))
            continue
        if text.strip():
            yield number, text


def _csv_rows(
    lines: Iterator[tuple[int, str]],
    path: Path,
    mapping: Mapping,
    delimiter: str,
    on_error: Callable[[RowError], None],
) -> Iterator[tuple[int, dict[str, Any]]]:
    header: list[str] | None = None
    for number, line in lines:
        try:
            cells = next(csv.reader([line], delimiter=delimiter, strict=True))
        except csv.Error as error:
            on_error(RowError(number, f"not one CSV row: {error}"))
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            _check_header(header, path, mapping)
        elif len(cells) != len(header):
            on_error(RowError(number, f"{len(cells)} fields, but the header has {len(header)}"))
        else:
            yield number, dict(zip(header, cells, strict=True))
    if header is None:
        raise TableError(f"{path}: no header line: the first line must name the columns")


def _check_header(header: list[str], path: Path, mapping: Mapping) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    missing = [name for name in mapping.columns() if name not in header]
    if not twice and not missing:
        return
    found = ", ".join(repr(name[:80]) for name in header[:COLUMNS_SHOWN_MAX])
    wrong = [f"no column {name!r}" for name in missing] + [f"two columns {name[:80]!r}" for name in twice]
    raise TableError(f"{path}: {'; '.join(wrong)}. The header has: {found}. Change the mapping or the header.")


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number")


def _json_rows(
    lines: Iterator[tuple[int, str]], on_error: Callable[[RowError], None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in lines:
        try:
            row = json.loads(line, parse_float=str, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            on_error(RowError(number, f"not JSON: {type(error).__name__}: {str(error)[:120]}"))
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            on_error(RowError(number, f"a JSON {type(row).__name__}, wanted an object"))


class _UsageReader:
    """Makes usage of rows by a mapping."""

    def __init__(self, path: Path, mapping: Mapping, cache: PrefixCache) -> None:
        self._mapping = mapping
        self._cache = cache
        stem = re.sub(r"[^A-Za-z0-9._+-]", "-", path.stem)[:STEM_CHARS_MAX].lstrip("._+-")
        self._stem = stem or "file"
        self._shift: timedelta | None = None
        self._turn = 0

    def usage(self, number: int, row: dict[str, Any]) -> Usage:
        """Return the usage of a row. Raises `_BadRowError`."""
        mapping = self._mapping
        names = {name: self._text(row, getattr(mapping, name), name) for name in NAMES}
        agent = names["agent"] or self._agent(row)
        fields: dict[str, Any] = {
            **{name: text for name, text in names.items() if text is not None},
            "id": self._text(row, mapping.id, "id") or f"{self._stem}:{number}",
            "ts": self._instant(row),
            "agent": agent,
            "run": names["run"] or f"{self._stem}/{agent}",
            "tokens": self._tokens(row, names["provider"] or "", names["model"] or ""),
            "source": f"import {self._stem}",
            "tags": {"synthetic": mapping.synthetic or "agent"} if mapping.synthetic or mapping.agents else {},
        }
        try:
            usage = Usage.model_validate(fields)
        except ValidationError as error:
            faults = error.errors(include_input=False, include_url=False, include_context=False)
            reasons = (f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in faults)
            raise _BadRowError("; ".join(reasons)) from error
        self._turn += 1
        return usage

    def _text(self, row: dict[str, Any], source: Source | None, field: str) -> str | None:
        if source is None:
            return None
        if source.literal is not None:
            return source.literal
        value = _cell(row, source.column or "")
        if value is None or value == "":
            return None
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise _BadRowError(f"{field}: a JSON {type(value).__name__}, wanted text or a number")
        return str(value)

    def _agent(self, row: dict[str, Any]) -> str:
        mapping = self._mapping
        if mapping.agents is None:
            return "imported"
        turn = self._turn
        if mapping.agents_by is not None:
            key = json.dumps(_cell(row, mapping.agents_by), sort_keys=True)
            turn = int.from_bytes(hashlib.sha256(key.encode("utf-8", "replace")).digest()[:8], "big")
        return f"synthetic-{turn % mapping.agents + 1:0{len(str(mapping.agents))}d}"

    def _instant(self, row: dict[str, Any]) -> datetime:
        mapping = self._mapping
        text = self._text(row, mapping.ts, "ts")
        if text is None:
            raise _BadRowError("ts: is empty")
        try:
            if mapping.ts_format == "iso":
                moment = _iso(text.strip())
            else:
                moment = from_us(_micros(text.strip(), mapping.ts_format))
                if mapping.ts_format == "offset_ms" and mapping.start is not None:
                    return from_us(to_us(moment) + to_us(mapping.start))
        except (ValueError, OverflowError) as error:
            raise _BadRowError(f"ts: {text[:80]!r} is not {mapping.ts_format}") from error
        if mapping.start is None:
            return moment
        if self._shift is None:
            self._shift = mapping.start - moment
        try:
            return moment + self._shift
        except OverflowError as error:
            raise _BadRowError(f"ts: {text[:80]!r} is out of range") from error

    def _tokens(self, row: dict[str, Any], provider: str, model: str) -> dict[str, int]:
        mapping = self._mapping
        counts = {name: self._count(row, getattr(mapping, name), name) for name in COUNTERS}
        if mapping.prefix_blocks is not None:
            counts["cache_read"] = self._cached(row, mapping.prefix_blocks, counts["input"], provider, model)
            counts["input"] -= counts["cache_read"]
        elif mapping.input_includes_cache:
            cached = counts["cache_read"] + counts["cache_write_5m"] + counts["cache_write_1h"]
            if cached > counts["input"]:
                raise _BadRowError(f"input: {counts['input']} is less than its {cached} cached tokens")
            counts["input"] -= cached
        return counts

    def _count(self, row: dict[str, Any], source: Source | None, field: str) -> int:
        text = self._text(row, source, field)
        if text is None:
            if source is not None and field in ("input", "output"):  # absent is not zero: nobody would miss the money
                raise _BadRowError(f"{field}: no value in column {source.column!r}")
            return 0
        match = _COUNT.fullmatch(text.strip())
        if match is None:
            raise _BadRowError(f"{field}: {text[:80]!r} is not a number of tokens")
        return int(match[1])

    def _cached(self, row: dict[str, Any], spec: PrefixBlocks, total: int, provider: str, model: str) -> int:
        blocks = _cell(row, spec.column)
        if not isinstance(blocks, list) or any(isinstance(b, bool) or not isinstance(b, int | str) for b in blocks):
            raise _BadRowError(f"{spec.column}: not a list of block ids")
        head = self._cache.seen_at_head(provider, model, blocks)
        return min(head, max(total - 1, 0) // spec.block_tokens) * spec.block_tokens


def _cell(row: dict[str, Any], column: str) -> Any:
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return value


def _iso(text: str) -> datetime:
    match = _INSTANT.fullmatch(text)
    if match is None:
        raise ValueError("not an instant")
    micros = (match[3] or "").ljust(6, "0")[:6]
    offset = "+00:00" if match[4] is None or match[4] in "Zz" else match[4]
    return datetime.fromisoformat(f"{match[1]}T{match[2]}.{micros}{offset}").astimezone(UTC)


def _micros(text: str, unit: str) -> int:
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ValueError("not a number")
    scale = _MICROS[unit]
    return int(match[1]) * scale + int((match[2] or "").ljust(18, "0")) * scale // 10**18
