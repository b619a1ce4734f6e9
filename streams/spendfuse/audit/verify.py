"""Verification: the database recomputes every leaf, root and link itself, and names the batch that does not fit.

Nothing is changed and nothing but verdicts leaves the database. Blocking calls.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

from spendfuse.audit.checkpoints import Checkpoint
from spendfuse.audit.database import Database
from spendfuse.audit.files import query_text
from spendfuse.wire.topics import LEDGER_RETENTION_DAYS

SLICE_ROWS: Final = 2_000_000
"""Rows whose leaves one query holds in memory, some 300 MB. Rows lie by agent and a slice is of all agents, so each
slice reads through its month's parts: fewer slices read them fewer times."""
FINDINGS_MAX: Final = 1_000
"""Findings that are kept; a trail with more has been replaced rather than changed."""
LOOKS_AT_STRAYS: Final = 3
"""A writer may finish a batch between two looks; what stays is no batch of its."""
BEGINNING: Final = datetime(1970, 1, 1, tzinfo=UTC)
END: Final = datetime(2262, 1, 1, tzinfo=UTC)

Cause = Literal[
    "altered", "deleted", "inserted", "reordered", "truncated", "expired", "missing header", "header altered",
    "header repeated", "forked chain", "unsealed after sealed", "unknown version", "checkpoint mismatch",
]  # fmt: skip
_INDENT: Final = "  "


@dataclass(frozen=True, slots=True)
class Finding:
    """One batch that does not fit; `seq` is 0 when no batch can be named."""

    partition: int
    seq: int
    cause: Cause
    detail: str

    def __str__(self) -> str:
        return f"batch {self.seq} of ledger partition {self.partition}: {self.cause}: {self.detail}"


@dataclass(slots=True)
class Report:
    """What was verified and what did not fit; `intact` when nothing was found (an expired batch is no fault)."""

    batches: int = 0
    rows: int = 0
    expired: int = 0
    unsealed_batches: int = 0
    unsealed_rows: int = 0
    in_flight_rows: int = 0
    checkpoints: int = 0
    heads: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def intact(self) -> bool:
        """Say whether everything fits."""
        return not self.findings

    def add(self, finding: Finding) -> None:
        """Keep a finding, up to FINDINGS_MAX."""
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(finding)


@dataclass(frozen=True, slots=True)
class _Slice:
    partition: int
    seq_from: int
    seq_to: int
    rows: int
    batches: int


def sql(name: str) -> str:
    """Return a query of `sql/queries` with the leaves' expression put in; raises SqlMissingError."""
    text = query_text(name)
    return text.replace("${LEAVES}", query_text("verify_leaves").rstrip()) if "${LEAVES}" in text else text


def verify(
    database: Database,
    *,
    now: datetime,
    since: datetime = BEGINNING,
    until: datetime = END,
    checkpoints: Sequence[Checkpoint] = (),
    dropped_before: datetime = BEGINNING,
    slice_rows: int = SLICE_ROWS,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Report:
    """Return what does not fit among the batches that the ledger took from `since` to before `until`.

    The chain of headers is always followed whole. `dropped_before` is the instant before which usage was dropped with a
    retention entry. `progress` is called with rows done and rows in all. Raises what the driver raises.
    """
    report = Report()
    for finding in _chain(database):
        report.add(finding)
    _against_checkpoints(database, checkpoints, report)
    _strays(database, report)
    expired_before = now - timedelta(days=LEDGER_RETENTION_DAYS)
    _unsealed(database, expired_before, report)
    slices = [
        _Slice(*map(int, row))
        for row in database.query(
            sql("verify_slices"), {"since": since, "until": until, "slice_rows": slice_rows}
        )
    ]  # fmt: skip
    total = sum(each.rows for each in slices)
    progress(0, total)
    for each in slices:
        _verify_slice(database, each, expired_before, dropped_before, report)
        progress(report.rows, total)
    report.findings.sort(key=lambda finding: (finding.partition, finding.seq))
    return report


def _verify_slice(
    database: Database, each: _Slice, expired_before: datetime, dropped_before: datetime, report: Report
) -> None:
    bad = database.query(
        sql("verify_batches"),
        {
            "partition": each.partition,
            "seq_from": each.seq_from,
            "seq_to": each.seq_to,
            "expired_before": expired_before,
            "dropped_before": dropped_before,
        },
    )
    report.batches += each.batches
    report.rows += each.rows
    for seq, found, should, gap, cause in bad:
        if cause == "expired":
            report.expired += 1
        else:
            report.add(Finding(each.partition, int(seq), cause, _about_rows(cause, int(found), int(should), int(gap))))


def _about_rows(cause: str, found: int, should: int, gap: int) -> str:
    rows = f"{found:,} of {should:,} rows are there"
    return {
        "inserted": f"{found:,} rows are there for {should:,}; the first place taken wrongly is row {gap}",
        "truncated": f"{rows}: those from row {gap} on are gone",
        "deleted": f"{rows}: the first one missing is row {gap}",
        "reordered": f"its {should:,} rows are the ones that were sealed, in another order",
    }.get(cause, f"its {should:,} rows are not what was sealed")


def _chain(database: Database) -> Iterator[Finding]:
    about = {
        "forked chain": "it does not follow batch {before}: another header was written in the place of one of them",
        "header repeated": "the same header is there more than once",
        "header altered": "its fields do not hash to its own hash",
        "unsealed after sealed": "it has no seal though the batch before it has one",
        "unknown version": "its leaf version is newer than this program: upgrade spendfuse",
    }
    for partition, seq, before, cause in database.query(sql("verify_chain")):
        if cause == "missing header":
            text = f"batches {before + 1} to {seq - 1} have no header" if seq > before + 1 else "the chain goes back"
            yield Finding(int(partition), int(before) + 1, cause, text)
        else:
            yield Finding(int(partition), int(seq), cause, about[cause].format(before=before))


def _strays(database: Database, report: Report) -> None:
    """Find rows without a header, in looks apart: what a writer was about to finish is finished by the next one."""
    rows: list[tuple[int, ...]] = []
    for _ in range(LOOKS_AT_STRAYS):
        rows = [tuple(int(value) for value in row) for row in database.query(sql("verify_strays"))]
        if all(seq == head + 1 for _, seq, _, head in rows):
            break
    for partition, seq, found, head in rows:
        if seq == head + 1:
            report.in_flight_rows += found
        else:
            what = "rows say they are of this batch, which has no sealed header"
            report.add(Finding(partition, seq, "inserted" if seq > head else "missing header", f"{found:,} {what}"))


def _unsealed(database: Database, expired_before: datetime, report: Report) -> None:
    for partition, batches, should, found, since in database.query(sql("verify_unsealed")):
        report.unsealed_batches += int(batches)
        report.unsealed_rows += int(found)
        said = f"{int(found):,} rows without a batch are there, {int(should):,} were written before there were seals"
        if found > should:
            report.add(Finding(int(partition), 0, "inserted", said))
        elif found < should and since.replace(tzinfo=UTC) >= expired_before:
            report.add(Finding(int(partition), 0, "deleted", said))


_HEADERS_OF: Final = """
SELECT toString(if(leaf_version = 0, content_sha256, header_hash)) FROM {db:Identifier}.audit_batches
WHERE ledger_partition = {partition:UInt16} AND seq = {seq:UInt64} LIMIT 10
"""
_LAST_SEQ: Final = "SELECT max(seq) FROM {db:Identifier}.audit_batches WHERE ledger_partition = {partition:UInt16}"


def _against_checkpoints(database: Database, checkpoints: Iterable[Checkpoint], report: Report) -> None:
    asked: dict[tuple[int, int], list[str]] = {}
    for checkpoint in checkpoints:
        report.checkpoints += 1
        for head in checkpoint.heads:
            report.heads += 1
            place = (head.partition, head.seq)
            if place not in asked:
                bind = {"partition": head.partition, "seq": head.seq}
                asked[place] = [str(row[0]) for row in database.query(_HEADERS_OF, bind)]
            if head.header_hash in asked[place]:
                continue
            report.add(Finding(head.partition, head.seq, *_about_head(database, checkpoint, head, asked[place])))


def _about_head(database: Database, checkpoint: Checkpoint, head: Any, found: Sequence[str]) -> tuple[Cause, str]:
    at = checkpoint.at.isoformat()
    if found:
        return "checkpoint mismatch", (
            f"the checkpoint of {at} has it as {head.header_hash[:12]}..., the database as {found[0][:12]}...: the "
            "chain was rewritten, or this database was filled anew from the ledger after that"
        )
    last = database.query(_LAST_SEQ, {"partition": head.partition})[0][0]
    if int(last) < head.seq:
        return "truncated", f"the checkpoint of {at} has it, the database ends at batch {last}"
    return "missing header", f"the checkpoint of {at} has it, the database does not"
