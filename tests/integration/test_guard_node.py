"""The Node.js guard on the embedded broker: it obeys what is signed, refuses the rest, and proves that it stopped."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from shared_topics import make_topics
from spendfuse.client.keys import Signer, generate
from spendfuse.wire import Ack, Command, encode
from spendfuse.wire.control import Cause
from spendfuse.wire.signing import SIGNATURE_HEADER
from spendfuse.wire.topics import ACKS, COMMANDS, HEARTBEATS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from spendfuse.embedded.tansu import EmbeddedBroker

pytestmark = pytest.mark.broker
DEADLINE_S = 60.0
SOURCE = Path(__file__).parents[2] / "deploy" / "guards" / "node"
OLD, OLD_PUBLIC = generate("old")
NEW, NEW_PUBLIC = generate("new")
FORGER = Signer.parse(generate("new")[0])
SCOPE = "agent:test-guard-node/t/obeys"


@pytest.fixture(scope="module")
def bootstrap(tansu: EmbeddedBroker) -> str:
    make_topics(tansu.bootstrap_servers, COMMANDS, HEARTBEATS, ACKS)
    return tansu.bootstrap_servers


@pytest.fixture
def agent(bootstrap: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A running agent.mjs that knows two keys."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not on the PATH")
    directory = tmp_path / "guard"
    shutil.copytree(SOURCE, directory, ignore=shutil.ignore_patterns("node_modules"))
    install = subprocess.run(
        ["npm", "ci", "--no-audit", "--no-fund"],
        cwd=directory, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if install.returncode != 0 and re.search(r"ENOTFOUND|ECONNREFUSED|ETIMEDOUT|EAI_AGAIN", install.stderr):
        pytest.skip("npm reaches no registry")
    assert install.returncode == 0, install.stderr
    env = os.environ | {
        "SPENDFUSE_BOOTSTRAP_SERVERS": bootstrap, "SPENDFUSE_WORKSPACE": "test-guard-node", "SPENDFUSE_TEAM": "t",
        "SPENDFUSE_AGENT": "obeys", "SPENDFUSE_RUN": "r", "SPENDFUSE_FETCH_MAX_WAIT_MS": "20",
        "SPENDFUSE_PUBLIC_KEYS": f"{OLD_PUBLIC};until=2026-01-01T00:00:00Z,{NEW_PUBLIC}",
    }  # fmt: skip
    process = subprocess.Popen(
        ["node", "agent.mjs"], cwd=directory, env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=10)


def send(bootstrap: str, *orders: tuple[str, int, str, Signer]) -> None:
    async def produce() -> None:
        producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", max_batch_size=1)
        await producer.start()
        for action, seq, cap, signer in orders:
            now = datetime.now(UTC)
            command = Command(
                id=f"{seq:032x}", seq=seq, action=action, scope=SCOPE, budget="b", cap=cap,  # type: ignore[arg-type]
                issued_at=now, message=f"said {seq}", cause=Cause(usage_id="u", ts=now, partition=0, offset=0),
            )  # fmt: skip
            key, value = command.key.encode(), encode(command)
            headers = [(SIGNATURE_HEADER, signer.sign(COMMANDS.name, key, value))]
            await producer.send_and_wait(COMMANDS.name, value, key, headers=headers)
        await producer.stop()

    asyncio.run(produce())


def acks(bootstrap: str, count: int) -> list[Ack]:
    async def read() -> list[Ack]:
        consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, fetch_max_wait_ms=20, auto_offset_reset="earliest")
        await consumer.start()
        try:
            consumer.assign([TopicPartition(ACKS.name, 0)])
            found: list[Ack] = []
            give_up_at = time.monotonic() + DEADLINE_S
            while len(found) < count and time.monotonic() < give_up_at:
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    found += [Ack.model_validate_json(each.value) for each in records if each.key == SCOPE.encode()]
            return found
        finally:
            await consumer.stop()

    return asyncio.run(read())


def test_a_node_agent_stops_at_a_signed_halt_and_says_so(bootstrap: str, agent: subprocess.Popen[str]) -> None:
    assert agent.stdout is not None
    started: dict[str, Any] = json.loads(agent.stdout.readline())
    send(
        bootstrap,
        ("halt", 9, "forged", FORGER),
        ("halt", 8, "retired", Signer.parse(OLD)),
        ("warn", 7, "day", Signer.parse(NEW)),
    )
    send(bootstrap, ("halt", 10, "day", Signer.parse(NEW)))
    said, errors = agent.communicate(timeout=DEADLINE_S)
    assert agent.returncode == 3, errors
    halted = json.loads(said)
    assert (halted["seq"], halted["cut"], "said 10" in halted["halted"]) == (10, True, True)
    assert "signature: wrong: new" in errors
    assert "signature: key retired: old" in errors
    found = acks(bootstrap, 2)
    assert [(ack.seq, ack.state, ack.agent, ack.guard) for ack in found] == [
        (10, "received", SCOPE, started["guard"]), (10, "enforced", SCOPE, started["guard"]),
    ]  # fmt: skip
    assert all(ack.halt_lag_us is not None and 0 <= ack.halt_lag_us < 60_000_000 for ack in found)
