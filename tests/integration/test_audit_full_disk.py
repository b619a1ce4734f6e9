"""A full disk under ClickHouse itself: the writer says so and waits; with room everything is in, once, and verifies."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("chdb", reason="the server that stands in for ClickHouse is chDB")
pytest.importorskip("clickhouse_connect")
pytest.importorskip("lz4", reason="clickhouse-connect compresses its inserts with lz4")

from structlog.testing import capture_logs

from audit_samples import charge, message
from audit_writers import Topics, create, rows, running, until
from faults.refusing import fill, small_disk
from integration.test_audit_outages import ClickHouse, answered, check
from spendfuse.audit import migrate
from spendfuse.audit.database import open_server
from workers import quick_settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from spendfuse.embedded.tansu import EmbeddedBroker

pytestmark = pytest.mark.broker

DISK_MB = 128
HALF, WHOLE = 40, 200


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with contextlib.ExitStack() as stack:
        try:
            mounted = stack.enter_context(small_disk(tmp_path / "clickhouse", DISK_MB))
        except OSError as error:
            pytest.skip(str(error))
        yield mounted


async def test_what_a_full_disk_does_not_take_is_tried_again_until_it_is_in_once(
    tansu: EmbeddedBroker, disk: Path
) -> None:
    topics = Topics(quick_settings(tansu), "audit-full-disk")
    await create(topics.broker, topics.ledger, topics.batches)
    clickhouse = ClickHouse(disk)
    clickhouse.start()
    clickhouse.faults.start()
    entries = [charge(nth) for nth in range(WHOLE)]
    try:
        with contextlib.closing(open_server(clickhouse.settings)) as database, capture_logs() as said:
            migrate.apply(database)
            await topics.send([(0, message(entries[:HALF]))])
            async with running(topics.writer(database)):
                await until(lambda: answered(clickhouse, HALF), "the first half")
                filler = fill(disk)
                await topics.send([(0, message(entries[HALF:]))])

                def refused() -> list[str]:
                    return [each["error"] for each in said if each["event"].startswith("ClickHouse does not take")]

                await until(lambda: len(refused()) > 1, "a batch that is refused, twice")
                assert "space" in refused()[0].lower(), "the reason is said"
                with contextlib.closing(clickhouse.open()) as reader:
                    assert rows(reader) == HALF
                filler.unlink()
                await until(lambda: answered(clickhouse, WHOLE), "everything")
            check(clickhouse, entries, 0)
    finally:
        clickhouse.faults.away()
        clickhouse.kill()
