"""A rotation on a running stack: whoever knows only the new key knows of the halt that the old one signed."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING

import pytest
from aiokafka import AIOKafkaProducer
from typer.testing import CliRunner

from spendfuse.cli.app import app
from spendfuse.client import Guard, Meter
from spendfuse.client.keys import PublicKey, format_public_keys, parse_public_keys
from spendfuse.embedded.processes import ChildProcess
from spendfuse.embedded.tansu import BrokerUnavailableError, EmbeddedBroker
from spendfuse.pipeline.feed import budget_key
from spendfuse.pipeline.topics import ensure_topics
from spendfuse.settings import BrokerSettings
from spendfuse.wire import Budget, Cap, WindowSpec, encode
from spendfuse.wire.topics import BUDGETS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.broker
DEADLINE_S = 60.0
WHO = {"workspace": "acme", "team": "research", "agent": "planner", "run": "r"}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerSettings]:
    """A broker of its own: a worker owns all topics of one."""
    try:
        started = EmbeddedBroker(tmp_path / "broker").start()
    except BrokerUnavailableError as error:
        pytest.skip(str(error))
    with started:
        settings = BrokerSettings.from_env(
            {}, bootstrap_servers=started.bootstrap_servers, fetch_max_wait_ms=20, producer_max_batch_size=1,
        )  # fmt: skip
        asyncio.run(ensure_topics(settings, partitions=1, replication=1))
        yield settings


def worker(broker: BrokerSettings, keys: Path, directory: Path) -> ChildProcess:
    env = {name: value for name, value in os.environ.items() if not name.startswith("SPENDFUSE_")} | {
        "SPENDFUSE_BOOTSTRAP_SERVERS": broker.bootstrap_servers, "SPENDFUSE_FETCH_MAX_WAIT_MS": "20",
        "SPENDFUSE_PRODUCER_MAX_BATCH_SIZE": "1", "SPENDFUSE_PARTITIONS": "1",
        "SPENDFUSE_SESSION_TIMEOUT_MS": "2000", "SPENDFUSE_REBALANCE_TIMEOUT_MS": "2000",
        "SPENDFUSE_HEARTBEAT_INTERVAL_MS": "400",
        "SPENDFUSE_SIGNING_KEY_FILE": str(keys / "signing.key"), "SPENDFUSE_PUBLIC_KEYS_FILE": str(keys / "public.key"),
        "SPENDFUSE_READY_FILE": str(directory / "ready"), "SPENDFUSE_DATA_DIR": str(directory / "data"),
    }  # fmt: skip
    return ChildProcess(
        "worker", [sys.executable, "-m", "spendfuse.pipeline.worker"], log_path=directory / "worker.log", env=env
    )


def client(broker: BrokerSettings) -> dict[str, object]:
    return WHO | {
        "bootstrap_servers": broker.bootstrap_servers, "fetch_max_wait_ms": 20, "producer_max_batch_size": 1,
    }  # fmt: skip


def guard_halts(broker: BrokerSettings, public: str, directory: Path) -> bool:
    """Whether a guard that starts now, and remembers nothing, is halted."""
    os.environ["SPENDFUSE_GUARD_DIR"] = str(directory)
    try:
        with Guard.from_env(**client(broker), public_keys=public, sync_timeout_s=DEADLINE_S, fail_mode="open") as guard:
            return guard.wait_halted(DEADLINE_S) is not None
    finally:
        del os.environ["SPENDFUSE_GUARD_DIR"]


async def publish(broker: BrokerSettings, budget: Budget) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=broker.bootstrap_servers, max_batch_size=1)
    await producer.start()
    await producer.send_and_wait(BUDGETS.name, encode(budget), key=budget_key(budget).encode())
    await producer.stop()


def keys_command(*arguments: str) -> None:
    done = CliRunner().invoke(app, ["keys", *arguments])
    assert done.exit_code == 0, done.output


def test_a_halt_outlives_the_key_that_signed_it(broker: BrokerSettings, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys_command("new", "--out", str(keys), "--kid", "old")
    old = (keys / "public.key").read_text().strip()
    cap = Cap(id="day", unit="tokens", amount=1_000, window=WindowSpec(kind="day"))
    asyncio.run(publish(broker, Budget(id="agents", version=1, scope="agent:acme/*/*", caps=[cap])))
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    with worker(broker, keys, tmp_path / "first") as first:
        first.wait_until((tmp_path / "first" / "ready").exists, DEADLINE_S)
        with Meter.from_env(**client(broker)) as meter:
            meter.record(provider="anthropic", model="claude-sonnet-4-5", input=2_000)
        assert guard_halts(broker, old, tmp_path / "a")
    keys_command("rotate", "--dir", str(keys), "--kid", "new")
    keys_command("rotate", "--dir", str(keys), "--finish", "--overlap", "1h")
    public = parse_public_keys((keys / "public.key").read_text())
    only_new = format_public_keys({"new": public["new"]})
    ended = format_public_keys({"new": public["new"], "old": PublicKey(public["old"].raw, until_us=1)})
    with worker(broker, keys, tmp_path / "second") as second:
        second.wait_until((tmp_path / "second" / "ready").exists, DEADLINE_S)
        assert guard_halts(broker, only_new, tmp_path / "b")
        assert guard_halts(broker, ended, tmp_path / "c")
        assert "signed again" in (tmp_path / "second" / "worker.log").read_text()
