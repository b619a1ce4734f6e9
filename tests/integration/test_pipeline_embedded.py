"""The worker as a process, against the embedded broker. The scenes follow one another on one deployment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pipeline import scenario

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.broker


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[scenario.Deployment]:
    with scenario.embedded_deployment(tmp_path_factory.mktemp("pipeline-embedded"), "worker-1") as made:
        yield made


async def test_a_halt_arrives_signed_and_the_sums_are_exact(deployed: scenario.Deployment) -> None:
    await scenario.a_halt_arrives_signed_and_the_sums_are_exact(deployed)


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
