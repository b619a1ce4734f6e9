"""An emitter faster than the pipeline: its lag is told, decisions are not called live meanwhile, nothing is lost."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from faults.test_faust_cures import Recovering, calls
from pipeline import scenario
from spendfuse.embedded.tansu import BrokerUnavailableError, EmbeddedBroker
from spendfuse.settings import BrokerSettings
from spendfuse.wire import Heartbeat
from spendfuse.wire.topics import ALERTS, HEARTBEATS

if TYPE_CHECKING:
    from pathlib import Path

STALE_LAG_S = 2
BACKLOG = 2_500
"""Messages, of which the slow worker takes at most 250 a second: ten seconds of work."""


def beats(watch: scenario.Watch) -> list[Heartbeat]:
    return [Heartbeat.model_validate_json(record.value or b"") for record in watch.records[HEARTBEATS.name]]


def lag_alerts(watch: scenario.Watch) -> list[str]:
    told = [json.loads(record.value or b"") for record in watch.records[ALERTS.name]]
    return [alert["severity"] for alert in told if alert["kind"] == "lag"]


@pytest.mark.broker
async def test_a_backlog_is_told_as_stale_until_it_is_worked_off(tmp_path: Path) -> None:
    try:
        broker = EmbeddedBroker(tmp_path).start()
    except BrokerUnavailableError as error:
        pytest.skip(str(error))
    with broker:
        settings = BrokerSettings.from_env(
            {}, bootstrap_servers=broker.bootstrap_servers, fetch_max_wait_ms=20, producer_max_batch_size=1,
            session_timeout_ms=6_000, rebalance_timeout_ms=6_000,
        )  # fmt: skip
        slow = Recovering(settings, tmp_path, SPENDFUSE_STALE_LAG_S=str(STALE_LAG_S))
        with slow.worker:
            async with scenario.watching(slow.deployed, *scenario.CHANGELOGS) as watch:
                await slow.produce(10)
                await watch.until(lambda: calls(watch) == 10, "the first sums")
                await watch.until(lambda: bool(beats(watch)) and beats(watch)[-1].ready, "a heartbeat that is ready")
                assert not any(beat.stale for beat in beats(watch)), "live, and nothing waits"
                producing = asyncio.create_task(slow.produce(BACKLOG))
                await watch.until(lambda: beats(watch)[-1].stale, "a heartbeat that says stale")
                assert calls(watch) < BACKLOG, "stale, although all was done"
                await watch.until(lambda: "critical" in lag_alerts(watch), "the alert")
                await producing
                await watch.until(lambda: calls(watch) == slow.sent, "the last sums")
                await watch.until(lambda: not beats(watch)[-1].stale, "a heartbeat that is live again")
                await watch.until(lambda: lag_alerts(watch)[-1:] == ["info"], "the alert that it is over")
                assert lag_alerts(watch) == ["critical", "info"], "each is said once"
