"""One agent, emitted at once by a Java client, a Node client, librdkafka's rule and ours: one total, one fuse."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import zlib
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from integration.test_emitters_other_runtimes import EMITTERS, node
from kraft import KraftBroker, kraft_jars, kraft_missing
from pipeline import scenario
from pipeline.samples import budget, cap
from spendfuse.client import Meter
from spendfuse.settings import BrokerSettings, MeterSettings
from spendfuse.wire.topics import USAGE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["node"]
pytestmark = pytest.mark.kafka

SPACE, TEAM, AGENT = "foreign", "team-0", "everywhere"
PATH = f"{SPACE}/{TEAM}/{AGENT}"
JAVA_CALLS, NODE_CALLS, RDKAFKA_CALLS, OWN_CALLS = 40, 3, 40, 40
TOKENS = 300
CALLS = JAVA_CALLS + NODE_CALLS + RDKAFKA_CALLS + OWN_CALLS
CAP_TOKENS = (CALLS - 10) * TOKENS
"""No emitter reaches it alone, nor any one partition of the topic."""


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[scenario.Deployment]:
    reason = kraft_missing()
    if reason is not None:
        pytest.skip(reason)
    with KraftBroker() as broker:
        settings = BrokerSettings.from_env(
            {}, bootstrap_servers=broker.bootstrap_servers, session_timeout_ms=6_000, rebalance_timeout_ms=6_000
        )
        with scenario.deployment(settings, tmp_path_factory.mktemp("foreign")) as made:
            made.only("worker-1")
            yield made


def by_java(env: dict[str, str]) -> None:
    argv = ["java", "-cp", f"{kraft_jars()}{os.sep}*", str(EMITTERS / "java" / "Emit.java"), str(JAVA_CALLS)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.endswith(f"emitted {JAVA_CALLS}\n"), done.stderr


def by_node(directory: Path, env: dict[str, str]) -> None:
    for _ in range(NODE_CALLS):
        argv = ["node", "emit.mjs", '{"input":200,"output":100}']
        done = subprocess.run(argv, cwd=directory, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr


async def by_rdkafkas_rule(watch: scenario.Watch) -> None:
    """Where librdkafka, hence kcat, puts a key: CRC-32 of it over the partitions (its `consistent_random`)."""
    partition = zlib.crc32(PATH.encode()) % scenario.PARTITIONS
    for nth in range(RDKAFKA_CALLS):
        call = scenario.usage(SPACE, AGENT, 0, id=f"rdkafka:{nth}", tokens=scenario.Tokens(input=200, output=100))
        await watch.emit(call, partition=partition, key=PATH.encode())


def by_ours(deployed: scenario.Deployment) -> None:
    with Meter(scenario.identity(SPACE, AGENT), deployed.broker, MeterSettings.from_env({})) as meter:
        for _ in range(OWN_CALLS):
            meter.record(provider="anthropic", model="claude", input=200, output=100)


async def test_an_agent_emitted_by_four_kinds_of_client_at_once_is_one_total_and_one_fuse(
    deployed: scenario.Deployment, node: Path
) -> None:
    if shutil.which("java") is None:
        pytest.skip("java is not on the PATH")
    env = os.environ | {
        "SPENDFUSE_BOOTSTRAP_SERVERS": deployed.broker.bootstrap_servers,
        "SPENDFUSE_WORKSPACE": SPACE, "SPENDFUSE_TEAM": TEAM, "SPENDFUSE_AGENT": AGENT, "SPENDFUSE_RUN": "run-1",
        "MODEL": "claude",
    }  # fmt: skip
    async with scenario.watching(deployed, *scenario.CHANGELOGS) as watch:
        await watch.apply(budget(f"agent:{PATH}", cap(CAP_TOKENS, unit="tokens", window="month"), name=SPACE))
        await asyncio.gather(
            asyncio.to_thread(by_java, env),
            asyncio.to_thread(by_node, node, env),
            by_rdkafkas_rule(watch),
            asyncio.to_thread(by_ours, deployed),
        )
        await watch.check_sums(SPACE, CALLS)
        await watch.check_state(SPACE)
        assert watch.stored(SPACE)[f"agent:{PATH}"][1:] == [CALLS * TOKENS, CALLS]
        places = Counter(record.partition for record in watch.records[USAGE.name] if record.key == PATH.encode())
        assert len(places) > 1, f"the clients agreed on a partition, so nothing was proved: {places}"
        await watch.until(lambda: watch.halted(SPACE) == {f"agent:{PATH}"}, "the halt")
        assert len({command.id for command in watch.commands(SPACE)}) == 1
