"""The worker as a process, against a real Apache Kafka. The scenes follow one another on one deployment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kraft import KraftBroker, kraft_missing
from pipeline import scenario
from spendfuse.settings import BrokerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kafka

HALT_LAG_P99_MS_MAX = 2_000.0
"""A generous bound: the machine is shared. The figure itself is printed (run with -s)."""


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[scenario.Deployment]:
    reason = kraft_missing()
    if reason is not None:
        pytest.skip(reason)
    with KraftBroker() as broker:  # its own: the worker's topics have fixed names, and others use the shared one
        settings = BrokerSettings.from_env(
            {},
            bootstrap_servers=broker.bootstrap_servers,
            session_timeout_ms=6_000,
            rebalance_timeout_ms=6_000,
            heartbeat_interval_ms=1_000,
        )
        with scenario.deployment(settings, tmp_path_factory.mktemp("pipeline-kafka")) as made:
            made.only("worker-1")
            yield made


async def test_a_halt_arrives_signed_and_the_sums_are_exact(deployed: scenario.Deployment) -> None:
    await scenario.a_halt_arrives_signed_and_the_sums_are_exact(deployed)


async def test_halts_are_quick(deployed: scenario.Deployment) -> None:
    await scenario.halts_are_quick(deployed, 100, HALT_LAG_P99_MS_MAX)


async def test_bad_bytes_on_every_topic_are_said_and_the_worker_goes_on(deployed: scenario.Deployment) -> None:
    await scenario.bad_bytes_on_every_topic_are_said_and_the_worker_goes_on(deployed)


async def test_no_record_batch_stops_a_worker_or_moves_its_offsets(deployed: scenario.Deployment) -> None:
    await scenario.no_record_batch_stops_a_worker_or_moves_its_offsets(deployed, "worker-1")


async def test_a_worker_killed_in_the_middle_loses_and_repeats_nothing(deployed: scenario.Deployment) -> None:
    await scenario.a_worker_killed_in_the_middle_loses_and_repeats_nothing(deployed, "worker-1")


async def test_two_workers_share_and_one_takes_over_from_the_other(deployed: scenario.Deployment) -> None:
    await scenario.two_workers_share_and_one_takes_over_from_the_other(deployed, "worker-1", "worker-2")


def test_a_worker_told_to_stop_leaves_in_order(deployed: scenario.Deployment) -> None:
    scenario.a_worker_told_to_stop_leaves_in_order(deployed, "worker-1")
