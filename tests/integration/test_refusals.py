"""A worker process whose state does not fit its topics ends with 65 and the sentence, and does not hang."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from aiokafka.admin import AIOKafkaAdminClient

from pipeline import scenario
from spendfuse.client.connection import admin_options
from spendfuse.pipeline.refusal import EXIT_REFUSED
from spendfuse.settings import PREFIX
from workers import ROOT, broker_env

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


async def test_on_the_embedded_broker_tables_are_rebuilt_once_a_person_says_that_no_worker_runs(
    deployed: scenario.Deployment,
) -> None:
    worker = await counted_and_stopped(deployed)
    admin = AIOKafkaAdminClient(**admin_options(deployed.broker, "test-refusals"))
    await admin.start()
    await admin.delete_topics([CHANGELOG])
    await admin.close()
    said = await asyncio.to_thread(rebuild, deployed)
    assert said.returncode == 1
    assert "The embedded broker never forgets a member: there, say --stopped" in said.stderr
    give_up_at = time.monotonic() + 2 * DEADLINE_S
    while (said := await asyncio.to_thread(rebuild, deployed, "--stopped")).returncode:
        assert "gave a sign of life" in said.stderr, said.stderr
        assert time.monotonic() < give_up_at, "its last heartbeat grows old"
    assert json.loads(said.stdout)["charges"] == 10
    worker.begin()
    await asyncio.to_thread(worker.until_ready)
    async with scenario.watching(deployed, *scenario.CHANGELOGS) as watch:
        await watch.emit(scenario.usage(SPACE, "a3", 77), partition=2)
        await watch.check_sums(SPACE, 11)
        await watch.check_state(SPACE)


def rebuild(deployed: scenario.Deployment, *options: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith(PREFIX)}
    own = {f"{PREFIX}SIGNING_KEY": scenario.PRIVATE, f"{PREFIX}PRICE_BOOK_FILE": str(deployed.directory / "book.json")}
    argv = [sys.executable, "-c", "from spendfuse.cli import main; main()", "state", "rebuild", "--json", *options]
    env |= broker_env(deployed.broker) | own | {"PYTHONPATH": str(ROOT / "streams")}
    return subprocess.run(
        argv, env=env, cwd=deployed.directory, capture_output=True, text=True, timeout=100, check=False
    )
