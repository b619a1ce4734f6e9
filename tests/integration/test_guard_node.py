"""The Node.js guard: it obeys what is signed, refuses the rest, proves that it stopped, and is stopped by no batch."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cramjam
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError

import raw_batches
from shared_topics import make_topics
from spendfuse.client.keys import Signer, generate
from spendfuse.pipeline.proofs import GuardKeys
from spendfuse.pipeline.records import SourceRecord
from spendfuse.wire import Ack, Command, encode
from spendfuse.wire.control import Cause
from spendfuse.wire.signing import SIGNATURE_HEADER
from spendfuse.wire.topics import ACKS, COMMANDS, HEARTBEATS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kraft import KraftBroker
    from spendfuse.embedded.tansu import EmbeddedBroker

pytestmark = pytest.mark.broker
DEADLINE_S = 60.0
SOURCE = Path(__file__).parents[2] / "deploy" / "guards" / "node"
OLD, OLD_PUBLIC = generate("old")
NEW, NEW_PUBLIC = generate("new")
GUARD, GUARD_PUBLIC = generate("node")
FORGER = Signer.parse(generate("new")[0])
SCOPE = "agent:test-guard-node/t/obeys"


@pytest.fixture(scope="module")
def bootstrap(tansu: EmbeddedBroker) -> str:
    make_topics(tansu.bootstrap_servers, COMMANDS, HEARTBEATS, ACKS)
    return tansu.bootstrap_servers


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guard with its dependency installed."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not on the PATH")
    directory = tmp_path_factory.mktemp("node") / "guard"
    shutil.copytree(SOURCE, directory, ignore=shutil.ignore_patterns("node_modules"))
    install = subprocess.run(
        ["npm", "ci", "--no-audit", "--no-fund"],
        cwd=directory, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if install.returncode != 0 and re.search(r"ENOTFOUND|ECONNREFUSED|ETIMEDOUT|EAI_AGAIN", install.stderr):
        pytest.skip("npm reaches no registry")
    assert install.returncode == 0, install.stderr
    return directory


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(package: Path) -> Iterator[Start]:
    """Start agent.mjs, that knows two keys."""
    processes = []

    def run(bootstrap: str, **more: str) -> subprocess.Popen[str]:
        env = os.environ | {
            "SPENDFUSE_BOOTSTRAP_SERVERS": bootstrap, "SPENDFUSE_WORKSPACE": "test-guard-node", "SPENDFUSE_TEAM": "t",
            "SPENDFUSE_AGENT": "obeys", "SPENDFUSE_RUN": "r", "SPENDFUSE_FETCH_MAX_WAIT_MS": "20",
            "SPENDFUSE_PUBLIC_KEYS": f"{OLD_PUBLIC};until=2026-01-01T00:00:00Z,{NEW_PUBLIC}",
            "SPENDFUSE_SYNC_TIMEOUT_S": "60", **more,
        }  # fmt: skip
        process = subprocess.Popen(
            ["node", "agent.mjs"], cwd=package, env=env, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        processes.append(process)
        return process

    yield run
    for process in processes:
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


def acks(bootstrap: str, count: int) -> list[tuple[Ack, str | None]]:
    """Read acks, each with the id of the enrolled key that proves it; None where it is only claimed."""
    keys = GuardKeys.parse(GUARD_PUBLIC)

    def proved(each: Any) -> tuple[Ack, str | None]:
        ack = Ack.model_validate_json(each.value)
        record = SourceRecord(ACKS.name, 0, each.offset, 0, each.key, each.value, headers=tuple(each.headers))
        proof = keys.proof(record, ack)
        return ack, proof["kid"] if proof is not None else None

    async def read() -> list[tuple[Ack, str | None]]:
        consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, fetch_max_wait_ms=20, auto_offset_reset="earliest")
        await consumer.start()
        try:
            consumer.assign([TopicPartition(ACKS.name, 0)])
            found: list[tuple[Ack, str | None]] = []
            give_up_at = time.monotonic() + DEADLINE_S
            while len(found) < count and time.monotonic() < give_up_at:
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    found += [proved(each) for each in records if each.key == SCOPE.encode()]
            return found
        finally:
            await consumer.stop()

    return asyncio.run(read())


def test_a_node_agent_stops_at_a_signed_halt_and_says_so(bootstrap: str, start: Start) -> None:
    agent = start(bootstrap, SPENDFUSE_GUARD_KEY=GUARD)
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
    assert [(ack.seq, ack.state, ack.agent, ack.guard, kid) for ack, kid in found] == [
        (10, "received", SCOPE, started["guard"], "node"), (10, "enforced", SCOPE, started["guard"], "node"),
    ]  # fmt: skip
    assert all(ack.halt_lag_us is not None and 0 <= ack.halt_lag_us < 60_000_000 for ack, _ in found)


def signed_record(seq: int) -> bytes:
    """A record with a genuine halt; its message is long and repeats itself, so that every codec has work to do."""
    command = Command(
        id=f"{seq:032x}", seq=seq, action="halt", scope=SCOPE, budget="b", cap="day", issued_at=datetime.now(UTC),
        message=f"said {seq} " + "and said it again " * 20,
    )  # fmt: skip
    key, value = command.key.encode(), encode(command)
    header = Signer.parse(NEW).sign(COMMANDS.name, key, value)
    return raw_batches.record(value, [(SIGNATURE_HEADER.encode(), header)], key=key)


def lz4(payload: bytes) -> bytes:
    machine = cramjam.lz4.Compressor(level=9, content_checksum=False, block_linked=False)
    machine.compress(payload)
    return bytes(machine.finish())


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "snappy": lambda payload: bytes(cramjam.snappy.compress_raw(payload)),
    "lz4": lz4,
}


def garbage() -> dict[str, bytes]:
    """Batches that a broker takes and kafkajs cannot read, or should not believe."""
    one = raw_batches.record(b"v")
    headers = [(b"\xff\xfe", b"x"), (b"spendfuse-sig", b"nonsense")]
    far = raw_batches.record(b"v", nth=1_000_000)
    return {
        "header name": raw_batches.batch(raw_batches.record(b"v", headers)),
        "no records": raw_batches.batch(b"\xff" * 20),
        "another offset": raw_batches.batch(far),
        "cut off": raw_batches.batch(one[:-1]),
        "more than its records": raw_batches.batch(one + b"\x00"),
    }


@pytest.mark.kafka
def test_no_batch_stops_a_node_guard_and_what_it_has_no_codec_for_makes_it_blind(
    kraft: KraftBroker, start: Start
) -> None:
    servers = kraft.bootstrap_servers
    make_topics(servers, COMMANDS, HEARTBEATS, ACKS)
    agent = start(servers)
    assert agent.stdout is not None
    started: dict[str, Any] = json.loads(agent.stdout.readline())
    assert started["state"] != "syncing"
    written = 0
    for raw in garbage().values():
        try:
            asyncio.run(raw_batches.produce(servers, COMMANDS.name, 0, raw))
            written += 1
        except KafkaError:
            continue  # this Kafka does not take it
    assert written >= 2
    send(servers, ("halt", 20, "day", Signer.parse(NEW)))
    said, errors = agent.communicate(timeout=DEADLINE_S)
    assert agent.returncode == 3, errors
    assert json.loads(said)["seq"] == 20
    assert "cannot read the record batch" in errors
    # A guard that starts after all this reads it from the beginning.
    send(servers, ("resume", 21, "day", Signer.parse(NEW)))
    again = start(servers, SPENDFUSE_FAIL_MODE="closed")
    said, errors = again.communicate(timeout=DEADLINE_S)
    assert "the guard is blind" in said, errors  # no worker is there; it has read the resume behind the garbage
    for nth, (codec, compress) in enumerate(COMPRESSIONS.items()):
        agent = start(servers)
        assert agent.stdout is not None
        agent.stdout.readline()
        raw = raw_batches.batch(compress(signed_record(30 + 2 * nth)), codec=codec)
        asyncio.run(raw_batches.produce(servers, COMMANDS.name, 0, raw))
        said, errors = agent.communicate(timeout=DEADLINE_S)
        assert agent.returncode == 3, (codec, errors)
        assert json.loads(said)["seq"] == 30 + 2 * nth, codec
        send(servers, ("resume", 31 + 2 * nth, "day", Signer.parse(NEW)))
    # What others can read may be a halt: zstd is Node's own from 22.15 on.
    packed = raw_batches.batch(bytes(cramjam.zstd.compress(signed_record(50))), codec="zstd")
    asyncio.run(raw_batches.produce(servers, COMMANDS.name, 0, packed))
    unable = start(servers, SPENDFUSE_FAIL_MODE="bounded", SPENDFUSE_GRACE_S="0.2")
    said, errors = unable.communicate(timeout=DEADLINE_S)
    assert unable.returncode == 3, errors
    assert ("no codec 4" in errors and "the grace of 0.2 s" in said) or '"seq":50' in said
