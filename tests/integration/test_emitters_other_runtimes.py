"""The examples for other runtimes, run as their READMEs say: their usage decodes, and a halt reaches them."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka import AIOKafkaProducer

from shared_topics import make_topics, usage_records
from spendfuse.client.keys import Signer, generate
from spendfuse.wire import Command, Tokens, Usage, decode_usages, encode
from spendfuse.wire.signing import SIGNATURE_HEADER
from spendfuse.wire.topics import COMMANDS, USAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEADLINE_S = 60.0
EMITTERS = Path(__file__).parents[2] / "deploy" / "emitters"
PRIVATE, PUBLIC = generate("test")
SIGNER = Signer.parse(PRIVATE)
WORKSPACE = "test-emitters"


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("tansu", marks=pytest.mark.broker),
        pytest.param("kraft", marks=pytest.mark.kafka),
    ],
)
def bootstrap(request: pytest.FixtureRequest) -> str:
    servers: str = request.getfixturevalue(request.param).bootstrap_servers
    make_topics(servers, USAGE, COMMANDS)
    return servers


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Node.js example, installed from its lock file in a directory of its own."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not on the PATH")
    directory = tmp_path_factory.mktemp("node") / "example"
    shutil.copytree(EMITTERS / "node", directory, ignore=shutil.ignore_patterns("node_modules"))
    install = subprocess.run(
        ["npm", "ci", "--no-audit", "--no-fund"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    if install.returncode != 0 and re.search(r"ENOTFOUND|ECONNREFUSED|ETIMEDOUT|EAI_AGAIN", install.stderr):
        pytest.skip("npm reaches no registry")
    assert install.returncode == 0, install.stderr
    return directory


@pytest.fixture(scope="module")
def kcat() -> None:
    if shutil.which("kcat") is None:
        pytest.skip("kcat is not on the PATH (apt install kcat)")


def environment(bootstrap: str, agent: str, **more: str) -> dict[str, str]:
    return os.environ | {
        "SPENDFUSE_BOOTSTRAP_SERVERS": bootstrap,
        "SPENDFUSE_WORKSPACE": WORKSPACE,
        "SPENDFUSE_TEAM": "t",
        "SPENDFUSE_AGENT": agent,
        "SPENDFUSE_RUN": f"run-{agent}",
        "SPENDFUSE_PUBLIC_KEYS": PUBLIC,
        "SPENDFUSE_FETCH_MAX_WAIT_MS": "20",
        **more,
    }


def usages_of(bootstrap: str, agent: str, count: int) -> list[Usage]:
    records = usage_records(bootstrap, f"{WORKSPACE}/t/{agent}", count)
    return [usage for record in records for usage in decode_usages(record.value)]


def send_commands(bootstrap: str, *commands: tuple[Command, Signer]) -> None:
    async def produce() -> None:
        producer = AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all", max_batch_size=1)
        await producer.start()
        for command, signer in commands:
            key, value = command.key.encode(), encode(command)
            headers = [(SIGNATURE_HEADER, signer.sign(COMMANDS.name, key, value))]
            await producer.send_and_wait(COMMANDS.name, value, key, headers=headers)
        await producer.stop()

    asyncio.run(produce())


def order(agent: str, action: str, seq: int, **more: Any) -> Command:
    return Command.model_validate(
        {
            "id": f"{seq:032x}",
            "seq": seq,
            "action": action,
            "scope": f"agent:{WORKSPACE}/t/{agent}",
            "budget": "b",
            "cap": "day",
            "issued_at": datetime.now(UTC),
            "message": f"said {action}",
            **more,
        }
    )


class Follow:
    """A running follow.mjs; its lines of standard output as they come."""

    def __init__(self, directory: Path, env: dict[str, str], *arguments: str) -> None:
        self.process = subprocess.Popen(
            ["node", "follow.mjs", *arguments],
            cwd=directory,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: queue.Queue[str] = queue.Queue()
        self.errors: list[str] = []
        self._threads = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.lines.put)),
            threading.Thread(target=self._read, args=(self.process.stderr, self.errors.append)),
        ]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _read(stream: Any, take: Callable[[str], None]) -> None:
        for line in stream:
            take(line)

    def next(self) -> dict[str, Any]:
        try:
            line: dict[str, Any] = json.loads(self.lines.get(timeout=DEADLINE_S))
        except queue.Empty:
            pytest.fail(f"follow.mjs printed nothing more; its errors: {''.join(self.errors)}")
        return line

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(10)
        for thread in self._threads:
            thread.join(10)


@pytest.fixture
def follow(bootstrap: str, node: Path) -> Iterator[Callable[..., Follow]]:
    started: list[Follow] = []

    def start(agent: str, *arguments: str) -> Follow:
        started.append(Follow(node, environment(bootstrap, agent), *arguments))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def test_the_usage_that_node_emits_decodes(bootstrap: str, node: Path) -> None:
    done = subprocess.run(
        ["node", "emit.mjs", '{"input":11,"cache_read":22,"output":33,"reasoning":3}'],
        cwd=node,
        env=environment(bootstrap, "node"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (usage,) = usages_of(bootstrap, "node", 1)
    assert done.stdout == f"emitted {usage.id}\n"
    assert usage.tokens == Tokens(input=11, cache_read=22, output=33, reasoning=3)
    assert (usage.agent_path, usage.run, usage.model) == (f"{WORKSPACE}/t/node", "run-node", "claude-sonnet-4-6")
    assert abs(datetime.now(UTC) - usage.ts) < timedelta(minutes=2)


def test_node_obeys_the_signed_and_ignores_the_forged_the_old_and_the_expired(
    bootstrap: str, follow: Callable[..., Follow]
) -> None:
    forger = Signer.parse(generate("test")[0])
    yesterday = datetime.now(UTC) - timedelta(days=1)
    send_commands(
        bootstrap,
        (order("obeys", "halt", 9, cap="forged"), forger),
        (order("obeys", "halt", 5, cap="past", expires_at=yesterday), SIGNER),
        (order("someone-else", "halt", 6), SIGNER),
        (order("obeys", "halt", 7), SIGNER),
        (order("obeys", "resume", 6), SIGNER),
        (order("obeys", "warn", 8), SIGNER),
    )
    following = follow("obeys")
    scope = f"agent:{WORKSPACE}/t/obeys"
    assert following.next() == {"action": "halt", "scope": scope, "seq": 7, "message": "said halt"}
    send_commands(bootstrap, (order("obeys", "resume", 10), SIGNER))
    assert following.next() == {"action": "go"}
    soon = datetime.now(UTC) + timedelta(seconds=2)
    send_commands(bootstrap, (order("obeys", "halt", 11, expires_at=soon), SIGNER))
    assert following.next()["seq"] == 11
    assert following.next() == {"action": "go"}  # it expired, without a message
    assert datetime.now(UTC) >= soon
    following.stop()
    refusals = [line for line in following.errors if line.startswith("refused the command at offset")]
    assert len(refusals) == 1  # of the forged one; the others were rightly signed


def test_node_ends_at_a_halt_that_comes_while_it_follows(bootstrap: str, follow: Callable[..., Follow]) -> None:
    following = follow("ends", "--until-halted")
    assert following.next() == {"action": "go"}
    send_commands(bootstrap, (order("ends", "halt", 1, scope=f"run:{WORKSPACE}/run-ends"), SIGNER))
    assert following.next()["action"] == "halt"
    assert following.process.wait(DEADLINE_S) == 3


@pytest.mark.usefixtures("kcat")
def test_the_usage_that_kcat_emits_decodes_and_kcat_shows_commands(bootstrap: str) -> None:
    done = subprocess.run(
        [EMITTERS / "kcat" / "emit.sh", "kcat:call-1"],
        env=environment(bootstrap, "kcat"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "ApiVersionRequest failed: Local: Read underflow" in done.stderr:
        pytest.skip("this kcat's librdkafka is too old for the embedded broker (2.0.2 is, 2.16.0 is not)")
    assert (done.returncode, done.stdout) == (0, "emitted kcat:call-1\n"), done.stderr
    (usage,) = usages_of(bootstrap, "kcat", 1)
    assert (usage.id, usage.run) == ("kcat:call-1", "run-kcat")
    assert usage.tokens == Tokens(input=200, cache_read=100_000, output=100)
    assert abs(datetime.now(UTC) - usage.ts) < timedelta(minutes=2)
    halt = order("kcat", "halt", 1)
    send_commands(bootstrap, (halt, SIGNER))
    shown = subprocess.run(
        [EMITTERS / "kcat" / "follow.sh", "-e"],
        env=environment(bootstrap, "kcat"),
        capture_output=True,
        text=True,
        errors="replace",  # other tests of the session have put any bytes on the topic
        timeout=60,
        check=True,
    ).stdout
    # A record is "<offset> <key> <value>"; neither holds a space before the value.
    lines = [line.split(" ", 2) for line in shown.splitlines()]
    values = {line[1]: line[2] for line in lines if len(line) == 3}
    assert Command.model_validate_json(values[halt.key]) == halt
