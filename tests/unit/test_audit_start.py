"""Where a partition goes on after a restart: from its header, its database, and what the group has committed."""

from __future__ import annotations

from typing import Any

import pytest

from spendfuse.audit.batches import BatchHeader
from spendfuse.audit.trail import Start, TrailError, where_to_start


class Known:
    """A database with so many batches, and rows or none."""

    def __init__(self, last_seq: int | None, *, rows: bool = False) -> None:
        self._last_seq, self._rows = last_seq, rows

    def query(self, sql: str, _parameters: object = None) -> list[tuple[Any, ...]]:
        if "audit_batches" in sql:
            return [(self._last_seq or 0, 0 if self._last_seq is None else 1)]
        return [(int(self._rows),)]


def header(seq: int, generation: int = 3) -> BatchHeader:
    return BatchHeader(
        partition=0, generation=generation, seq=seq, first_offset=10, last_offset=19, rows=5, content_sha256="0" * 64,
        marks_before={}, marks_after={},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("last", "database", "committed", "start"),
    [
        (None, Known(None), None, Start(1, 1, None)),
        (header(1), Known(None), None, Start(4, 2, header(1))),
        (header(7), Known(6, rows=True), 10, Start(4, 8, header(7))),
        (header(7), Known(7, rows=True), 20, Start(4, 8, header(7))),
    ],
    ids=["at the very first", "killed in the first batch", "killed before the batch's row", "killed after it"],
)
def test_a_partition_goes_on_behind_its_last_header(
    last: BatchHeader | None, database: Any, committed: int | None, start: Start
) -> None:
    assert where_to_start(database, 0, last, committed) == start


def test_a_new_broker_goes_on_counting_and_a_new_database_is_filled_from_the_beginning() -> None:
    new_broker = where_to_start(Known(12, rows=True), 0, None, None)
    assert (new_broker.seq, new_broker.repeat) == (13, None)
    assert new_broker.note
    new_database = where_to_start(Known(None), 0, header(12), 500)
    assert (new_database.generation, new_database.seq, new_database.repeat) == (4, 1, None)
    assert new_database.note


@pytest.mark.parametrize(
    ("last", "database", "committed", "says"),
    [
        (None, Known(12, rows=True), 500, "topic of batch headers has none"),
        (header(12), Known(None, rows=True), 500, "no audit_batches"),
        (header(12), Known(9, rows=True), 500, "last batch header is 12, the database's last batch is 9"),
        (header(12), Known(14, rows=True), 500, "last batch header is 12, the database's last batch is 14"),
    ],
)
def test_a_trail_that_contradicts_itself_is_not_continued(
    last: BatchHeader | None, database: Any, committed: int | None, says: str
) -> None:
    with pytest.raises(TrailError, match=says):
        where_to_start(database, 0, last, committed)
