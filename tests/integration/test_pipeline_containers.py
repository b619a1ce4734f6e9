"""The worker and the audit as processes, against Apache Kafka and ClickHouse in containers."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from pipeline import scenario
from spendfuse.embedded.processes import ChildFailedError, ChildProcess, free_port
from spendfuse.embedded.tansu import brokers_known
from spendfuse.settings import BrokerSettings
from workers import broker_env

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.docker, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
READY_DEADLINE_S = 120.0
DATABASE, USER, PASSWORD = "spendfuse", "spendfuse", "only-for-this-test"
HTTP_PORT = 8_123
CONTROLLER_PORT = 9_093


def docker_missing() -> str | None:
    """Return why no container can be started here, or None."""
    docker: Any = pytest.importorskip("docker", reason="containers need the testcontainers package")
    try:
        docker.from_env(timeout=5).ping()
    except docker.errors.DockerException as error:
        return f"no Docker engine answers: {str(error)[:200]}"
    return None


def image_of(service: str) -> str:
    """The image docker-compose.yml runs, so that one version is tested and shipped."""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    image: str = compose["services"][service]["image"]
    return image


def wait(ready: Callable[[], bool], what: str) -> None:
    give_up_at = time.monotonic() + READY_DEADLINE_S
    while not ready():
        if time.monotonic() > give_up_at:
            raise ChildFailedError(f"{what} was not ready after {READY_DEADLINE_S:g} s")
        time.sleep(0.1)


@pytest.fixture(scope="module")
def ending() -> Iterator[ExitStack]:
    reason = docker_missing()
    if reason is not None:
        pytest.skip(reason)
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def kafka(ending: ExitStack) -> BrokerSettings:
    from testcontainers.core.container import DockerContainer

    port = free_port()
    container = DockerContainer(image_of("kafka")).with_envs(
        KAFKA_NODE_ID="1",
        KAFKA_PROCESS_ROLES="broker,controller",
        KAFKA_CONTROLLER_QUORUM_VOTERS=f"1@127.0.0.1:{CONTROLLER_PORT}",
        KAFKA_CONTROLLER_LISTENER_NAMES="CONTROLLER",
        KAFKA_INTER_BROKER_LISTENER_NAME="BROKER",
        KAFKA_LISTENER_SECURITY_PROTOCOL_MAP="CONTROLLER:PLAINTEXT,BROKER:PLAINTEXT",
        KAFKA_LISTENERS=f"BROKER://0.0.0.0:{port},CONTROLLER://127.0.0.1:{CONTROLLER_PORT}",
        # The port inside is the one outside, so that what the broker advertises is true for both.
        KAFKA_ADVERTISED_LISTENERS=f"BROKER://127.0.0.1:{port}",
        KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR="1",
        KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR="1",
        KAFKA_TRANSACTION_STATE_LOG_MIN_ISR="1",
        KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS="0",
        KAFKA_AUTO_CREATE_TOPICS_ENABLE="false",
    )
    container.ports[port] = ("127.0.0.1", port)  # type: ignore[assignment]  # with_bind_ports would bind every interface
    ending.enter_context(container)
    wait(lambda: brokers_known("127.0.0.1", port) == 1, "Apache Kafka")
    return BrokerSettings.from_env(
        {},
        bootstrap_servers=f"127.0.0.1:{port}",
        session_timeout_ms=6_000,
        rebalance_timeout_ms=6_000,
        heartbeat_interval_ms=1_000,
    )


@pytest.fixture(scope="module")
def clickhouse(ending: ExitStack) -> int:
    """The HTTP port of a ClickHouse."""
    import urllib.request

    from testcontainers.core.container import DockerContainer

    port = free_port()
    container = DockerContainer(image_of("clickhouse")).with_envs(
        CLICKHOUSE_USER=USER,
        CLICKHOUSE_PASSWORD=PASSWORD,
        CLICKHOUSE_DEFAULT_ACCESS_MANAGEMENT="1",
    )
    container.ports[HTTP_PORT] = ("127.0.0.1", port)  # type: ignore[assignment]  # the same
    ending.enter_context(container)

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    wait(answers, "ClickHouse")
    return port


@pytest.fixture(scope="module")
def deployed(kafka: BrokerSettings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[scenario.Deployment]:
    with scenario.deployment(kafka, tmp_path_factory.mktemp("pipeline-containers")) as made:
        made.only("worker-1")
        yield made


@pytest.fixture(scope="module")
def audit(deployed: scenario.Deployment, clickhouse: int, ending: ExitStack) -> ChildProcess:
    ready = deployed.directory / "audit.ready"
    env = {
        **deployed.worker("worker-1")._env,
        **broker_env(deployed.broker),
        "SPENDFUSE_READY_FILE": str(ready),
        "SPENDFUSE_CLICKHOUSE_URL": f"http://{USER}@127.0.0.1:{clickhouse}/{DATABASE}",
        "SPENDFUSE_CLICKHOUSE_PASSWORD": PASSWORD,
    }
    log = deployed.directory / "audit.log"
    process = ChildProcess("audit", [sys.executable, "-m", "spendfuse.audit"], log_path=log, env=env)
    ending.enter_context(process)
    process.wait_until(ready.exists, READY_DEADLINE_S)
    return process


async def test_a_halt_arrives_signed_and_the_sums_are_exact(deployed: scenario.Deployment) -> None:
    await scenario.a_halt_arrives_signed_and_the_sums_are_exact(deployed)


async def test_a_worker_killed_in_the_middle_loses_and_repeats_nothing(deployed: scenario.Deployment) -> None:
    await scenario.a_worker_killed_in_the_middle_loses_and_repeats_nothing(deployed, "worker-1")


async def test_the_trail_in_clickhouse_has_every_charge_to_the_nano(
    deployed: scenario.Deployment, audit: ChildProcess, clickhouse: int
) -> None:
    clickhouse_connect: Any = pytest.importorskip("clickhouse_connect")
    client = clickhouse_connect.get_client(
        host="127.0.0.1", port=clickhouse, username=USER, password=PASSWORD, database=DATABASE
    )
    sums = (
        "SELECT concat('agent:', workspace, '/', team, '/', agent), sum(cost_nanos), count() FROM usage_events "
        "WHERE kind = 'charge' AND workspace = 'killed' GROUP BY 1"
    )
    async with scenario.watching(deployed) as watch:
        spend = watch.truth("killed").spend
        wanted = {scope: (nanos, calls) for scope, (nanos, _, calls) in spend.items() if scope.startswith("agent:")}

        def stored() -> dict[str, tuple[int, int]]:
            return {name: (int(nanos), int(calls)) for name, nanos, calls in client.query(sums).result_rows}

        await watch.until(lambda: stored() == wanted, "the same sums in ClickHouse", READY_DEADLINE_S)
    client.close()
    assert audit.alive


def test_a_worker_told_to_stop_leaves_in_order(deployed: scenario.Deployment) -> None:
    scenario.a_worker_told_to_stop_leaves_in_order(deployed, "worker-1")
