"""A worker process whose state does not fit its topics ends with 65 and the sentence, and does not hang."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from aiokafka.admin import AIOKafkaAdminClient

from pipeline import scenario
from spendfuse.client.connection import admin_options
from spendfuse.pipeline.refusal import EXIT_REFUSED

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workers import WorkerProcess

pytestmark = pytest.mark.broker
SPACE = "refusing"
CHANGELOG = scenario.CHANGELOGS[0]
DEADLINE_S = 30.0


@pytest.fixture
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[scenario.Deployment]:
    with scenario.embedded_deployment(tmp_path_factory.mktemp("refusals"), "worker") as made:
        yield made


async def counted_and_stopped(deployed: scenario.Deployment) -> WorkerProcess:
    """Let the worker count some usage, and end in order: so that its groups have read far."""
    async with scenario.watching(deployed, *scenario.CHANGELOGS) as watch:
        for number in range(10):
            await watch.emit(scenario.usage(SPACE, f"a{number}", number), partition=number % scenario.PARTITIONS)
        await watch.check_sums(SPACE, 10)
        await watch.check_state(SPACE)
    worker = deployed.running["worker"]
    assert await asyncio.to_thread(worker.stop, 20.0) == 0
    return worker


def refused(worker: WorkerProcess) -> str:
    worker.begin()
    assert worker.wait(DEADLINE_S) == EXIT_REFUSED, worker.log_tail()
    assert not worker.ready_file.exists()
    return worker.log


async def test_a_state_record_of_another_version_is_refused(deployed: scenario.Deployment) -> None:
    worker = await counted_and_stopped(deployed)
    async with scenario.watching(deployed, CHANGELOG) as watch:
        agents = lambda: [each for each in watch.records[CHANGELOG] if b"/agent:" in (each.key or b"")]  # noqa: E731
        await watch.until(agents, "an agent's state")
        record = agents()[-1]
        await watch.producer.send_and_wait(CHANGELOG, b"\x09future", key=record.key, partition=record.partition)
    said = await asyncio.to_thread(refused, worker)
    assert "codec version b'\\\\t'" in said
    assert "write the state anew with `spendfuse state rebuild`" in said


async def test_a_lost_changelog_is_refused(deployed: scenario.Deployment) -> None:
    worker = await counted_and_stopped(deployed)
    admin = AIOKafkaAdminClient(**admin_options(deployed.broker, "test-refusals"))
    await admin.start()
    await admin.delete_topics([CHANGELOG])
    await admin.close()
    said = await asyncio.to_thread(refused, worker)
    assert f"{CHANGELOG} does not exist" in said
    assert "`spendfuse state rebuild` writes the state anew" in said
