"""What every demo needs: the whole stack on this machine under a fast clock, budgets in force, and the trail to ask."""

import asyncio
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from aiokafka import AIOKafkaProducer

from spendfuse.audit.queries import connect_to, load
from spendfuse.client.clock import ScaledClock, wall_clock
from spendfuse.client.connection import close, producer_options
from spendfuse.client.follow import Follower, Record
from spendfuse.embedded.stack import EmbeddedStack
from spendfuse.pipeline.feed import budget_key
from spendfuse.settings import BrokerSettings
from spendfuse.wire.base import encode, from_us
from spendfuse.wire.budget import Budget, WorkspaceSettings
from spendfuse.wire.cloudevents import headers
from spendfuse.wire.control import Heartbeat
from spendfuse.wire.topics import BUDGETS, HEARTBEATS

if TYPE_CHECKING:
    from clickhouse_connect.driver.client import Client

APPLY_TIMEOUT_S: Final = 30.0
AUDIT_TIMEOUT_S: Final = 60.0
STEP_S: Final = 0.05
DEMO_ENV: Final = {"SPENDFUSE_HEARTBEAT_S": "0.5", "SPENDFUSE_BATCH_WAIT_MS": "1500"}
"""Signs of life for guards that start at once; and few, large inserts: each costs ClickHouse a tenth of a second."""
FAR_US: Final = 4_000_000_000_000_000
"""An instant after every demo, the end of `until`."""


def end_if_interrupted() -> None:
    """Raise asyncio.CancelledError if Ctrl-C was pressed: aiokafka swallows a cancellation that meets it closing."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


class Total(NamedTuple):
    """What the trail says one agent used and cost; tokens in the order of the counters."""

    calls: int
    tokens: tuple[int, int, int, int, int]
    cost_nanos: int


class DemoError(Exception):
    """The demo cannot go on; the sentence says what to do."""


def scaled_clock(event_start_us: int, factor: int, lead_s: float) -> tuple[str, ScaledClock]:
    """Return a clock that reads `event_start_us` in about `lead_s`, and the setting that gives it to others."""
    wall_us = wall_clock() + int(lead_s * 1_000_000)
    return f"scaled:{wall_us}:{event_start_us}:{factor}", ScaledClock(wall_us, event_start_us, factor)


async def apply_budgets(broker: BrokerSettings, records: Sequence[Budget | WorkspaceSettings], now: datetime) -> None:
    """Publish budgets and return when a worker says it has them all in force."""
    producer = AIOKafkaProducer(**producer_options(broker, "spendfuse-demo"))
    await producer.start()
    try:
        for record in records:
            key = budget_key(record)
            await producer.send_and_wait(
                BUDGETS.name,
                encode(record),
                key=key.encode(),
                headers=headers("budget.v1", "//spendfuse/demo", key, now),
            )
    finally:
        await close(producer)
    wanted = sum(isinstance(record, Budget) for record in records)
    in_force = asyncio.Event()

    def look(record: Record) -> None:
        if Heartbeat.model_validate_json(record.value or b"").budgets >= wanted:
            in_force.set()

    async with Follower(broker, HEARTBEATS.name, look, client_id="spendfuse-demo"):
        try:
            await asyncio.wait_for(in_force.wait(), APPLY_TIMEOUT_S)
        except TimeoutError as error:
            raise DemoError(f"no worker took the budgets in force within {APPLY_TIMEOUT_S:.0f} s") from error


class Trail:
    """The ClickHouse of a demo, asked over its HTTP endpoint as anybody would."""

    def __init__(self, stack: EmbeddedStack, workspace: str) -> None:
        """Connect; raises `DemoError` when the stack runs without an audit."""
        if stack.clickhouse is None:
            raise DemoError("the demo's stack has no audit process")
        self._client: Client = connect_to(stack.clickhouse)
        self._window = {"workspace": workspace, "since": from_us(0), "until": from_us(FAR_US)}

    def rows(self, query: str) -> list[dict[str, object]]:
        """Return the rows of a query of `sql/queries` over the whole demo."""
        result = self._client.query(load(query), parameters=self._window)
        return [dict(row) for row in result.named_results()]

    def totals(self) -> dict[str, Total]:
        """Return each agent's calls, tokens and cost."""
        totals: dict[str, Total] = {}
        for row in self.rows("totals"):
            counters = ("input", "cache_read", "cache_write_5m", "cache_write_1h", "output")
            a, b, c, d, e = (whole(row[f"{name}_tokens"]) for name in counters)
            totals[str(row["agent"])] = Total(whole(row["calls"]), (a, b, c, d, e), whole(row["cost_nanos"]))
        return totals

    def wait_for_calls(self, calls: int, acks: int = 0) -> None:
        """Return when the trail holds so many charges and enforced acknowledgements.

        Raises `DemoError` with both numbers when it does not in time.
        """
        deadline = time.monotonic() + AUDIT_TIMEOUT_S
        while True:
            have = sum(total.calls for total in self.totals().values())
            enforced = sum(row["enforced_at"] is not None for row in self.rows("halts"))
            if have >= calls and enforced >= acks:
                return
            if time.monotonic() > deadline:
                raise DemoError(
                    f"the trail holds {have} of {calls} calls and {enforced} of {acks} acknowledged stops "
                    f"after {AUDIT_TIMEOUT_S:.0f} s; see audit.log"
                )
            time.sleep(STEP_S)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def whole(value: object) -> int:
    """Return an integer that a query gave.

    Raises `TypeError` for anything else: a float has no place in a sum of money.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"the trail answered {value!r} where an integer was asked for")
    return value


def state_directory(given: Path | None) -> Path:
    """Return where a demo keeps its logs and trail."""
    return given if given is not None else Path(".spendfuse") / "demo"
