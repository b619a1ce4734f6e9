"""kill -9 of workers, guards and the broker around a trip, on a real Kafka: the halt arrives, once, in bounded time.

The bound of a halt is counted from recovery: from when the worker says that it is ready, and the broker answers.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import random
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from kraft import KraftBroker, kraft_missing
from pipeline import scenario
from pipeline.samples import budget, cap
from spendfuse.client import GuardState
from spendfuse.embedded.processes import ChildFailedError, ChildProcess
from spendfuse.settings import PREFIX, BrokerSettings
from spendfuse.wire import Ack, Tokens, encode
from spendfuse.wire.topics import ACKS, USAGE
from workers import ROOT, broker_env

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pipeline.scenario import Deployment, Watch

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(240)]

SPACE = "kills"
TRIPS = 8
"""Agents that trip around one kill, 10 ms apart: so many moments of it."""
PACE_S = 0.01
AFTER_RECOVERY_S = 5.0
"""The stated bound: a worker that is ready has committed offsets and tables, and only what is unread before it."""
AT_ONCE_S = 3.0
"""Within which the first check of a guard that starts again raises: it waits 2 s at most to hear of a resume."""
GUARD = """
import sys, time
from spendfuse.client import Guard, Halted
began = time.monotonic()
with Guard.from_env(workspace=sys.argv[1], team="team-0", agent=sys.argv[2], run="run-1") as guard:
    while True:
        try:
            guard.check()
            print(guard.state.value, flush=True)
            time.sleep(0.02)
        except Halted as halted:
            command = halted.command.id if halted.command else "nobody"
            print("halted", command, time.monotonic() - began, flush=True)
            time.sleep(0.2)
"""


@dataclass
class GuardProcess:
    """A guard in a process of its own, which says what `check` says."""

    deployed: Deployment
    agent: str
    starts: int = 0
    process: ChildProcess | None = None
    logs: list[Path] = field(default_factory=list)

    def start(self) -> GuardProcess:
        self.starts += 1
        log = self.deployed.directory / f"guard-{self.agent}-{self.starts}.log"
        env = {
            **broker_env(self.deployed.broker),
            "PYTHONPATH": str(ROOT / "streams"),
            f"{PREFIX}PUBLIC_KEYS": scenario.PUBLIC,
            f"{PREFIX}GUARD_DIR": str(self.deployed.directory / "guards"),
        }
        argv = [sys.executable, "-c", GUARD, SPACE, self.agent]
        self.process = ChildProcess(f"guard of {self.agent}", argv, log_path=log, env=env).start()
        self.logs.append(log)
        return self

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()

    def lines(self) -> list[str]:
        return self.logs[-1].read_text().splitlines()

    def halted(self) -> tuple[str, float] | None:
        """The command that was obeyed first since this start, and how long after the start."""
        found = next((line.split() for line in self.lines() if line.startswith("halted ")), None)
        return None if found is None else (found[1], float(found[2]))

    @property
    def live(self) -> bool:
        return "live" in self.lines()

    def let_through(self) -> list[str]:
        """What it was, each time that `check` let the agent go on."""
        return [line for line in self.lines() if line in {state.value for state in GuardState}]


@pytest.fixture(scope="module")
def kafka() -> Iterator[KraftBroker]:
    reason = kraft_missing()
    if reason is not None:
        pytest.skip(reason)
    with KraftBroker(quick_start=True) as broker:
        yield broker


@pytest.fixture(scope="module")
def deployed(kafka: KraftBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    settings = BrokerSettings.from_env(
        {},
        bootstrap_servers=kafka.bootstrap_servers,
        session_timeout_ms=6_000,
        rebalance_timeout_ms=6_000,
        heartbeat_interval_ms=1_000,
    )
    with scenario.deployment(settings, tmp_path_factory.mktemp("halt-under-kills")) as made:
        made.only("worker-1")
        asyncio.run(_warm_up(made))
        yield made


async def _warm_up(deployed: Deployment) -> None:
    async with scenario.watching(deployed) as watch:
        await watch.apply(budget(f"agent:{SPACE}/*/*", cap(10, unit="tokens"), name=SPACE))
        await cross(watch, "warm-up")
        await watch.until(lambda: watch.halted(SPACE) != set(), "the halt of the first")


@pytest.fixture
def guards(deployed: Deployment) -> Iterator[list[GuardProcess]]:
    made: list[GuardProcess] = []
    yield made
    for guard in made:
        guard.kill()


def cross(watch: Watch, agent: str) -> object:
    """Write the usage that crosses an agent's cap of 10 tokens; done when the broker has it."""
    crossing = scenario.usage(SPACE, agent, 0, tokens=Tokens(input=10))
    return watch.producer.send_and_wait(USAGE.name, encode(crossing), key=agent.encode())


async def recovered(deployed: Deployment) -> float:
    """Start the worker again until it stays, as whoever runs it does; return when it was ready."""
    for _ in range(5):
        worker = await asyncio.to_thread(deployed.worker, "worker-1")
        with contextlib.suppress(ChildFailedError):  # it may end once more while the broker comes back
            await asyncio.to_thread(worker.until_ready)
            return time.monotonic()
    raise AssertionError(deployed.running["worker-1"].log_tail())


async def halted_once(watch: Watch, agents: list[str], since: float) -> None:
    """Each agent's halt is there within the bound, and whatever was written again is the same command."""
    scopes = {f"agent:{SPACE}/team-0/{agent}" for agent in agents}
    left_s = AFTER_RECOVERY_S - (time.monotonic() - since)
    await watch.until(lambda: watch.halted(SPACE) >= scopes, "the halt of every agent", max(left_s, 0.1))
    for scope in scopes:
        said = [each for each in watch.commands(SPACE) if each.scope == scope]
        assert {each.action for each in said} == {"halt"}
        assert len({(each.id, each.seq) for each in said}) == 1, said


async def obeyed_once(watch: Watch, guard: GuardProcess, since: float) -> None:
    """The guard halted within the bound, and has said so once."""
    left_s = AFTER_RECOVERY_S - (time.monotonic() - since)
    await watch.until(lambda: guard.halted() is not None, "the guard's halt", max(left_s, 0.1))
    scope = f"agent:{SPACE}/team-0/{guard.agent}"

    def acks() -> list[str]:
        values = [Ack.model_validate(json.loads(record.value or b"")) for record in watch.records[ACKS.name]]
        return sorted(ack.state for ack in values if ack.scope == scope)

    await watch.until(lambda: len(acks()) >= 2, "the acknowledgements")
    assert acks() == ["enforced", "received"]


async def start_guard(watch: Watch, guards: list[GuardProcess], deployed: Deployment, agent: str) -> GuardProcess:
    guard = await asyncio.to_thread(GuardProcess(deployed, agent).start)
    guards.append(guard)
    await watch.until(lambda: guard.live, "a live guard")
    return guard


async def test_a_worker_killed_around_a_trip_halts_once_it_is_back(
    deployed: Deployment, guards: list[GuardProcess]
) -> None:
    dice = random.Random(4)  # noqa: S311 - moments of a kill
    async with scenario.watching(deployed) as watch:
        for attempt in range(2):
            agents = [f"w{attempt}-{nth}" for nth in range(TRIPS)]
            guard = await start_guard(watch, guards, deployed, agents[TRIPS // 2])
            kill_after = dice.uniform(0, TRIPS * PACE_S)
            began = time.monotonic()
            killed = False
            for agent in agents:
                if not killed and time.monotonic() - began > kill_after:
                    deployed.running["worker-1"].kill()
                    killed = True
                await cross(watch, agent)
                await asyncio.sleep(PACE_S)
            deployed.running["worker-1"].kill()
            before = len(watch.halted(SPACE))
            since = await recovered(deployed)
            await halted_once(watch, agents, since)
            await obeyed_once(watch, guard, since)
            print(f"{before} halts before the kill, {len(watch.halted(SPACE))} after recovery")  # noqa: T201


async def test_a_guard_killed_at_its_halt_obeys_at_once_when_it_starts_again(
    deployed: Deployment, guards: list[GuardProcess]
) -> None:
    async with scenario.watching(deployed) as watch:
        guard = await start_guard(watch, guards, deployed, "g0")
        await cross(watch, "g0")
        await watch.until(lambda: guard.halted() is not None, "the halt")
        await asyncio.to_thread(guard.kill)
        command, _ = guard.halted() or ("", 0)
        await asyncio.to_thread(guard.start)
        await watch.until(lambda: guard.halted() is not None, "the halt after the guard's restart")
        assert guard.halted() is not None
        again, after_s = guard.halted() or ("", 0.0)
        assert again == command
        assert after_s < AT_ONCE_S
        assert not guard.let_through(), "it let the agent go on first"


async def test_a_broker_killed_around_a_trip_brings_the_halt_when_it_is_back(
    kafka: KraftBroker, deployed: Deployment, guards: list[GuardProcess]
) -> None:
    async with scenario.watching(deployed) as watch:
        known = await start_guard(watch, guards, deployed, "b-known")
        fresh = await start_guard(watch, guards, deployed, "b-fresh")
        await cross(watch, "b-known")
        await watch.until(lambda: known.halted() is not None, "the halt of the one that is known")
        command, _ = known.halted() or ("", 0.0)
        kept = deployed.directory / "guards"
        await watch.until(lambda: any(command.encode() in _decoded(file) for file in kept.glob("*.json")), "its file")
        await cross(watch, "b-fresh")
        await asyncio.sleep(random.Random(5).uniform(0, 0.02))  # noqa: S311 - the moment of the kill
        await asyncio.to_thread(kafka.kill)
        # A guard that starts without any broker still knows of its halt.
        await asyncio.to_thread(known.kill)
        await asyncio.to_thread(known.start)
        await watch.until(lambda: known.halted() is not None, "the halt that was kept")
        again, after_s = known.halted() or ("", 0.0)
        assert again == command
        assert after_s < AT_ONCE_S
        assert not known.let_through(), "it let the agent go on first"
        await asyncio.to_thread(kafka.restart)
        since = await recovered(deployed)
        await halted_once(watch, ["b-fresh"], since)
        await obeyed_once(watch, fresh, since)


def _decoded(file: Path) -> bytes:
    try:
        return b"".join(base64.b64decode(each["value"]) for each in json.loads(file.read_text())["records"])
    except (OSError, ValueError):
        return b""
