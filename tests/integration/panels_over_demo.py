"""Run every panel's SQL over the trail a demo left behind; prints what failed or came out empty as JSON.

A process of its own: one process opens one ClickHouse directory.
"""

import json
import sys
from pathlib import Path

from spendfuse.audit.database import Engine, open_embedded
from spendfuse.grafana import ALL, expand, panels


def main(directory: Path) -> None:
    """Open the directory an audit process has left."""
    database = open_embedded(Engine(directory, "spendfuse"))
    database.command("USE spendfuse")
    bounds = database.query(
        "SELECT toUnixTimestamp64Micro(min(occurred_at)), toUnixTimestamp64Micro(max(occurred_at)), sum(cost_nanos) "
        "FROM spendfuse.usage_events WHERE kind = 'charge'"
    )[0]
    inserted = database.query(
        "SELECT toUnixTimestamp64Micro(min(inserted_at)), toUnixTimestamp64Micro(max(inserted_at)) "
        "FROM spendfuse.audit_batches"
    )[0]
    variables = {"workspace": "acme", "team": ALL, "agent": ALL, "datasource": "spendfuse-clickhouse"}
    failed, empty = [], []
    for panel in panels():
        # The demo's usage has a time of its own; ClickHouse's inserts have the wall's.
        first_us, last_us = inserted if "FROM audit_batches" in panel.sql else bounds[:2]
        sql = expand(panel.sql, from_us=first_us - 1_000_000, to_us=last_us + 3_600_000_000, variables=variables)
        try:
            rows = database._client.query(sql).result_rows  # no binds: a panel is sent as it stands
        except Exception as error:  # noqa: BLE001 - whatever it is, the test names the panel
            failed.append(f"{panel.title}: {error}")
            continue
        if not rows:
            empty.append(panel.title)
    print(json.dumps({"panels": len(panels()), "failed": failed, "empty": empty, "spend_nanos": bounds[2]}))  # noqa: T201 - the answer


if __name__ == "__main__":
    main(Path(sys.argv[1]))
