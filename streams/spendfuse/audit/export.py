"""What leaves the database as proof: the whole trail as files, or one row with its path. Blocking calls.

Both are checked without spendfuse by `deploy/verifier/verify.py`, whose README is the specification of the files.
"""

import gzip
import hashlib
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Literal

from spendfuse.audit import seal
from spendfuse.audit.checkpoints import Head, open_note
from spendfuse.audit.database import Database
from spendfuse.audit.rows import Table
from spendfuse.audit.verify import BEGINNING, END, sql
from spendfuse.wire.base import rfc3339

FORMAT_VERSION: Final = 1
EXPORT_ROWS: Final = 100_000
"""Rows of a slice, and so of one file: an answer of the embedded endpoint holds at most 128 MiB."""
PROOF_HEADERS_MAX: Final = 100_000
"""Most headers between a row and the checkpoint that a proof ends at."""
NOTES_NAME: Final = "checkpoints.notes"
MANIFEST: Final = "manifest.json"
FileFormat = Literal["parquet", "jsonl"]
# Column kinds (see seal.py) -> how they leave: text, integers, and nothing that a file format could round.
_PLAIN: Final = {
    "e": "toString({0})",
    "us": "toUnixTimestamp64Micro({0})",
    "us?": "toUnixTimestamp64Micro({0})",
    "s": "toString({0})",
    "map": "mapFromArrays(arrayMap(k -> toString(k), mapKeys({0})), arrayMap(v -> toString(v), mapValues({0})))",
}
_HEADERS: Final = """
SELECT ledger_partition, seq, leaf_version, first_offset, last_offset, rows, usage_rows, leaf_sum,
  toUnixTimestamp64Milli(written_at) AS written_at_ms, toUnixTimestamp64Micro(occurred_from) AS occurred_from_us,
  toUnixTimestamp64Micro(occurred_to) AS occurred_to_us, toString(content_sha256) AS content_sha256,
  if(leaf_version = 0, '', toString(merkle_root)) AS merkle_root,
  if(leaf_version = 0, '', toString(prev_hash)) AS prev_hash,
  if(leaf_version = 0, '', toString(header_hash)) AS header_hash
FROM {db:Identifier}.audit_batches
WHERE ledger_partition = {partition:UInt16} AND seq BETWEEN {seq_from:UInt64} AND {seq_to:UInt64} ORDER BY seq
"""
HEADER_COLUMNS: Final = (
    "ledger_partition", "seq", "leaf_version", "first_offset", "last_offset", "rows", "usage_rows", "leaf_sum",
    "written_at_ms", "occurred_from_us", "occurred_to_us", "content_sha256", "merkle_root", "prev_hash", "header_hash",
)  # fmt: skip
_PARTITIONS: Final = """
SELECT ledger_partition, min(seq), max(seq), count() FROM {db:Identifier}.audit_batches
GROUP BY ledger_partition ORDER BY ledger_partition
"""
_HEADERS_AT_ONCE: Final = 20_000
_IDS: Final = {
    "usage_events": "usage_id",
    "corrections": "correction_id",
    "commands": "command_id",
    "acks": "command_id",
    "alerts": "alert_id",
    "ledger_events": "concat(src_topic, '/', toString(src_partition), '/', toString(src_offset))",
}
"""What a row is asked for by."""
PROOFS_MAX: Final = 100

Raw = Callable[[str, Mapping[str, Any], str], bytes]
"""(statement, binds, ClickHouse's name of the format) -> the answer's bytes."""


class ProofError(ValueError):
    """A proof that proves nothing; the message says at which step."""


class NoSuchRowError(LookupError):
    """No sealed row has this id, or a proof of it cannot be made; the message says which."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """What was written."""

    directory: Path
    files: int
    rows: int
    batches: int


def row_sql(table: str) -> str:
    """Return the columns of a row's leaf, in its order, as plain text and integers, with its place before them."""
    columns = ", ".join(
        f"{_PLAIN.get(kind, '{0}').format(f't.{name}')} AS {name}" for name, kind in seal.LEAF_COLUMNS[table]
    )
    return f"t.batch_seq AS batch_seq, t.batch_row AS batch_row, {columns}"


def export(
    database: Database,
    raw: Raw,
    directory: Path,
    *,
    file_format: FileFormat,
    now: datetime,
    since: datetime = BEGINNING,
    until: datetime = END,
    notes: bytes = b"",
    slice_rows: int = EXPORT_ROWS,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Bundle:
    """Write every header, the rows of the batches from `since` to before `until`, and the checkpoints.

    The directory must not exist or be empty. Raises OSError, and what the driver raises.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty: export into a new directory")
    files: dict[str, str] = {}
    batches = _write_headers(database, directory, files)
    bind = {"since": since, "until": until, "slice_rows": slice_rows}
    slices = [tuple(map(int, row)) for row in database.query(sql("verify_slices"), bind)]
    done, total = 0, sum(each[3] for each in slices)
    for nth, (partition, seq_from, seq_to, should, _) in enumerate(slices):
        place = {"partition": partition, "seq_from": seq_from, "seq_to": seq_to}
        for table in seal.LEAF_COLUMNS:
            _write_rows(raw, directory, files, table=table, nth=nth, place=place, file_format=file_format)
        done += should
        progress(done, total)
    if notes:
        _write(directory, files, NOTES_NAME, notes)
    manifest = {
        "format": FORMAT_VERSION,
        "exported_at": rfc3339(now),
        "database": database.name,
        "since": rfc3339(since),
        "until": rfc3339(until),
        "slices": [{"partition": p, "seq_from": a, "seq_to": z, "rows": n} for p, a, z, n, _ in slices],
        "files": files,
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return Bundle(directory, len(files) + 1, total, batches)


def _write_headers(database: Database, directory: Path, files: dict[str, str]) -> int:
    lines: list[str] = []
    for partition, first, last, _ in database.query(_PARTITIONS):
        for seq in range(int(first), int(last) + 1, _HEADERS_AT_ONCE):
            until = min(seq + _HEADERS_AT_ONCE - 1, int(last))
            lines += [json.dumps(header) for header in headers(database, int(partition), seq, until)]
    _write(directory, files, "headers.jsonl.gz", gzip.compress("".join(f"{each}\n" for each in lines).encode()))
    return len(lines)


def headers(database: Database, partition: int, seq_from: int, seq_to: int) -> list[dict[str, Any]]:
    """Return the headers of some batches, hashes in hex, times in the units of their names."""
    bind = {"partition": partition, "seq_from": seq_from, "seq_to": seq_to}
    return [
        {
            name: value.decode() if isinstance(value, bytes) else value
            for name, value in zip(HEADER_COLUMNS, row, strict=True)
        }
        for row in database.query(_HEADERS, bind)
    ]


def _write_rows(
    raw: Raw,
    directory: Path,
    files: dict[str, str],
    *,
    table: str,
    nth: int,
    place: Mapping[str, int],
    file_format: FileFormat,
) -> None:
    statement = (
        f"SELECT {row_sql(table)} FROM {{db:Identifier}}.{table} AS t "  # noqa: S608 - names of our own
        "WHERE t.ledger_partition = {partition:UInt16} AND t.batch_seq BETWEEN {seq_from:UInt64} AND {seq_to:UInt64} "
        "ORDER BY t.batch_seq, t.batch_row"
    )
    content = raw(statement, place, "Parquet" if file_format == "parquet" else "JSONEachRow")
    if file_format == "jsonl":
        if not content:
            return
        content = gzip.compress(content, 6, mtime=0)
    suffix = "parquet" if file_format == "parquet" else "jsonl.gz"
    _write(directory, files, f"{table}-{nth:05d}.{suffix}", content)


def _write(directory: Path, files: dict[str, str], name: str, content: bytes) -> None:
    (directory / name).write_bytes(content)
    files[name] = hashlib.sha256(content).hexdigest()


def prove(
    database: Database, raw: Raw, identity: str, notes: Sequence[tuple[str, Mapping[int, int]]] = ()
) -> list[Any]:
    """Return a proof of each sealed row of an id: its fields, its path to the root, its header, and those after it.

    `notes` are signed checkpoints with the heads they have (partition -> seq), oldest first: the proof goes on to the
    first one that covers the row, so that nobody needs to believe the database. Raises NoSuchRowError.
    """
    proofs: list[Any] = []
    for table, name in _IDS.items():
        statement = (
            f"SELECT {row_sql(table)} FROM {{db:Identifier}}.{table} AS t "  # noqa: S608 - names of our own
            f"WHERE {name} = {{identity:String}} AND t.batch_seq > 0 ORDER BY t.batch_seq, t.batch_row "
            f"LIMIT {PROOFS_MAX}"
        )
        found = raw(statement, {"identity": identity}, "JSONEachRow").splitlines()
        proofs += [_proof(database, table, json.loads(line), notes) for line in found]
    if not proofs:
        raise NoSuchRowError(
            f"no sealed row has the id {identity!r}: give the id of a usage, a command or an alert, or "
            "topic/partition/offset of an event"
        )
    return proofs


def _proof(
    database: Database, table: str, row: dict[str, Any], notes: Sequence[tuple[str, Mapping[int, int]]]
) -> dict[str, Any]:
    partition, seq, place = int(row["ledger_partition"]), int(row["batch_seq"]), int(row["batch_row"])
    bind = {"partition": partition, "seq_from": seq, "seq_to": seq}
    found = sorted((int(at), leaf) for _, _, _, at, leaf, _ in database.query(sql("verify_leaves"), bind))
    leaves = [leaf if isinstance(leaf, bytes) else bytes(leaf, "latin-1") for _, leaf in found]
    sealed = headers(database, partition, seq, seq)
    root = seal.merkle_root(leaves).hex()
    if [at for at, _ in found] != list(range(len(found))) or [each["merkle_root"] for each in sealed] != [root]:
        raise NoSuchRowError(
            f"batch {seq} of ledger partition {partition} is not what was sealed, so nothing in it can be proved: "
            "run `spendfuse audit verify`"
        )
    proof = {
        "format": FORMAT_VERSION, "table": table, "row": row, "leaf": leaves[place].hex(), "size": len(leaves),
        "path": [each.hex() for each in seal.audit_path(leaves, place)], "headers": sealed, "checkpoint": "",
    }  # fmt: skip
    for note, heads in notes:
        last = heads.get(partition, 0)
        if seq <= last < seq + PROOF_HEADERS_MAX:
            proof |= {"headers": headers(database, partition, seq, last), "checkpoint": note}
            break
    return proof


def check_proof(proof: Mapping[str, Any], keys: Mapping[str, bytes]) -> str:
    """Return what a proof proves, as a sentence; raises ProofError at the first step that does not hold."""
    try:
        table, row = proof["table"], proof["row"]
        columns = {name: [_value(kind, row[name])] for name, kind in seal.LEAF_COLUMNS[table]}
        (leaf,) = seal.leaves(Table(table, columns))
        place, path = int(row["batch_row"]), [bytes.fromhex(each) for each in proof["path"]]
        root = seal.root_of_path(leaf, place, int(proof["size"]), path)
        chain = [_fields(header) for header in proof["headers"]]
        hashes = [str(header["header_hash"]) for header in proof["headers"]]
        note = str(proof["checkpoint"])
    except (LookupError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise ProofError(f"this is no proof: {type(error).__name__}: {error}") from error
    first = chain[0] if chain else None
    if first is None or root is None or root.hex() != first.merkle_root or int(proof["size"]) != first.rows:
        raise ProofError("the row does not lead to the root of its batch: it, its place or its path was changed")
    if (first.partition, first.seq) != (int(row["ledger_partition"]), int(row["batch_seq"])):
        raise ProofError("the header is that of another batch")
    for nth, (fields, own) in enumerate(zip(chain, hashes, strict=True)):
        if seal.header_hash(fields) != own:
            raise ProofError(f"the header of batch {fields.seq} does not hash to its own hash")
        if nth and fields.prev_hash != hashes[nth - 1]:
            raise ProofError(f"batch {fields.seq} does not follow batch {chain[nth - 1].seq}")
    where = f"row {place} of batch {first.seq} of ledger partition {first.partition}"
    if not note:
        return f"{where} is in the tree of its header {hashes[0]}; no checkpoint is part of the proof"
    checkpoint = open_note(note, keys)
    if Head(first.partition, chain[-1].seq, hashes[-1]) not in checkpoint.heads:
        raise ProofError("the checkpoint has another header: it was signed over another chain")
    return f"{where} was sealed before the checkpoint that was signed at {rfc3339(checkpoint.at)}"


def _fields(header: Mapping[str, Any]) -> seal.HeaderFields:
    values = {**header, "partition": header["ledger_partition"]}
    kinds = seal.HeaderFields.__annotations__
    return seal.HeaderFields(**{name: kinds[name](values[name]) for name in seal.HeaderFields._fields})


def _value(kind: str, value: Any) -> Any:
    """Return a value as rows have it: a program may have quoted a large integer, as JSON's readers like."""
    if kind in {"s", "e", "map"}:
        return value
    if kind == "i64s":
        return [int(each) for each in value]
    return None if value is None else int(value)
