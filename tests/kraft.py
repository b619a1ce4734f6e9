"""A real Apache Kafka (KRaft, one node or three) on 127.0.0.1, from Maven Central's jars and without Docker."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import uuid
from base64 import urlsafe_b64encode
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

from spendfuse.embedded.processes import ChildFailedError, ChildProcess, free_port
from spendfuse.embedded.tansu import brokers_known

POM = Path(__file__).with_name("kraft-pom.xml")
CACHE = Path(__file__).parents[1] / ".cache" / "kraft"
HEAP_MB = 384
# Both stay below pytest's own timeout of a test, so that it is this file's sentence that is read.
MAVEN_DEADLINE_S = 180.0
READY_DEADLINE_S = 90.0
FORMAT_DEADLINE_S = 60.0
NODES_MAX = 9
OFFSETS_PARTITIONS = 8
STOP_GRACE_S = 15.0
SESSION_TIMEOUT_MS = 4_000

_C1_ALONE = "-XX:TieredStopAtLevel=1"
"""Without the optimising compiler a node starts with two thirds of the CPU, and works at a fraction of its speed."""
_JVM = ("-XX:+UseSerialGC", "-Xshare:auto", "-Djava.awt.headless=true", "-Dlog4j2.level=WARN")


class KraftUnavailableError(RuntimeError):
    """No Apache Kafka can be started on this machine; the message says why."""


@cache
def kraft_missing() -> str | None:
    """Return why a real Kafka cannot be started here, or None; the first call may download 45 MB of jars."""
    for tool in ("java", "mvn"):
        if shutil.which(tool) is None:
            return f"a real Kafka needs {tool}, which is not on the PATH"
    try:
        kraft_jars()
    except KraftUnavailableError as error:
        return str(error)
    return None


def kraft_jars() -> Path:
    """Return the directory with the jars of kraft-pom.xml, resolved once per content of that file."""
    pom_hash = hashlib.sha256(POM.read_bytes()).hexdigest()[:16]
    jars = CACHE / pom_hash
    if jars.is_dir():
        return jars
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        # One Maven at a time, of all the processes that run tests; freed with the file, however its holder ends.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not jars.is_dir():
            # Built aside and renamed whole: an interrupted download is never mistaken for a Kafka.
            with tempfile.TemporaryDirectory(dir=CACHE, prefix="building-") as building:
                _resolve_jars(Path(building) / "jars")
                (Path(building) / "jars").rename(jars)
    return jars


def _resolve_jars(destination: Path) -> None:
    goals = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={destination}"]
    log = CACHE / "maven.log"
    maven = ChildProcess("Maven", ["mvn", "-q", "-B", "-f", str(POM), *goals], log_path=log)
    # Maven's words name registries, so they stay in the file.
    reason = f"Maven could not resolve the jars of {POM.name} (see {log.relative_to(CACHE.parents[1])})"
    try:
        with maven:
            code = maven.wait(MAVEN_DEADLINE_S)
    except ChildFailedError:
        raise KraftUnavailableError(f"{reason}: it did not finish within {MAVEN_DEADLINE_S:g} s") from None
    if code != 0 or not any(destination.glob("kafka_*.jar")):
        raise KraftUnavailableError(f"{reason}: exit code {code}")


@dataclass
class _Node:
    node_id: int
    port: int
    controller_port: int
    directory: Path
    process: ChildProcess

    @property
    def properties(self) -> Path:
        return self.directory / "server.properties"

    @classmethod
    def at(cls, node_id: int, directory: Path, *jvm: str) -> _Node:
        directory.mkdir()
        argv = _java(
            *jvm, f"-Xms{HEAP_MB // 2}m", f"-Xmx{HEAP_MB}m", "kafka.Kafka", str(directory / "server.properties")
        )
        process = ChildProcess(f"Apache Kafka node {node_id}", argv, log_path=directory / "kafka.log", cwd=directory)
        return cls(node_id, free_port(), free_port(), directory, process)


class KraftBroker:
    """Apache Kafka in KRaft mode, each node broker and controller; a context manager that starts and ends it.

    Topics are never created by naming them; groups form without delay; with three nodes a record is kept on
    all and acknowledged by two. Data lives in a temporary directory and is gone after `stop`.
    """

    def __init__(self, nodes: int = 1, *, quick_start: bool = False) -> None:
        """`quick_start`: for a Kafka that is killed and started again, with little to do between."""
        if not 1 <= nodes <= NODES_MAX:
            raise ValueError(f"a Kafka of {nodes} nodes: give 1 to {NODES_MAX}")
        self._size = nodes
        self._jvm = (_C1_ALONE,) if quick_start else ()
        self._nodes: list[_Node] = []
        self._ending = ExitStack()

    def __enter__(self) -> Self:
        return self if self._nodes else self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    @property
    def bootstrap_servers(self) -> str:
        """Every node's listener, comma separated."""
        return ",".join(f"127.0.0.1:{node.port}" for node in self._nodes)

    @property
    def pids(self) -> tuple[int, ...]:
        """The pids of the nodes that run."""
        return tuple(node.process.pid for node in self._nodes if node.process.alive)

    def start(self) -> Self:
        """Format the storage, start every node and return once each has answered with the whole cluster."""
        reason = kraft_missing()
        if reason is not None:
            raise KraftUnavailableError(reason)
        if self._nodes:
            raise ChildFailedError(f"this Kafka already runs at {self.bootstrap_servers}: stop it first")
        root = Path(self._ending.enter_context(tempfile.TemporaryDirectory(prefix="spendfuse-kraft-")))
        try:
            self._nodes = [_Node.at(i, root / f"node-{i}", *self._jvm) for i in range(1, self._size + 1)]
            self._format()
            for node in self._nodes:
                # Killed, not stopped: nobody needs the data, and the last of three could not leave in order.
                self._ending.callback(node.process.kill)
                node.process.start()
            for node in self._nodes:
                self._await(node)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End every node and delete what they stored."""
        self._nodes = []
        self._ending.close()

    def kill(self, node: int = 1) -> None:
        """Kill -9 a node (counted from 1); its data stays for `restart`."""
        self._node(node).process.kill()

    def restart(self, node: int = 1) -> None:
        """Start a node again over its own data: after a `kill`, or, if it runs, after an orderly stop."""
        it = self._node(node)
        it.process.stop(STOP_GRACE_S)
        it.process.start()
        self._await(it)

    def _node(self, node: int) -> _Node:
        for it in self._nodes:
            if it.node_id == node:
                return it
        raise ChildFailedError(f"this Kafka has no node {node}: it is started with {len(self._nodes)} node(s)")

    def _format(self) -> None:
        # Its first letter is fixed: one in 64 would begin with a dash, and be taken for an option.
        cluster_id = "A" + urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")[1:]
        formats = []
        for node in self._nodes:
            node.properties.write_text(self._server_properties(node), encoding="utf-8")
            arguments = ["format", "--cluster-id", cluster_id, "--config", str(node.properties)]
            # 4.x's tool, which lives for a second.
            argv = _java(_C1_ALONE, "kafka.tools.StorageTool", *arguments)
            log_path = node.directory / "format.log"
            formats.append(self._ending.enter_context(ChildProcess("StorageTool", argv, log_path=log_path)))
        for tool in formats:
            if tool.wait(FORMAT_DEADLINE_S) != 0:
                raise ChildFailedError(f"Kafka's storage could not be formatted:\n{tool.log_tail()}")

    def _await(self, node: _Node) -> None:
        alive = len(self.pids)
        node.process.wait_until(
            lambda: brokers_known("127.0.0.1", node.port) >= alive,
            READY_DEADLINE_S,
            f"answering at 127.0.0.1:{node.port} with {alive} broker(s)",
        )

    def _server_properties(self, node: _Node) -> str:
        replicas = min(3, self._size)
        in_sync = max(1, replicas - 1)
        voters = ",".join(f"{it.node_id}@127.0.0.1:{it.controller_port}" for it in self._nodes)
        broker = f"BROKER://127.0.0.1:{node.port}"
        values = {
            "process.roles": "broker,controller",
            "node.id": node.node_id,
            "controller.quorum.voters": voters,
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "BROKER",
            "listeners": f"{broker},CONTROLLER://127.0.0.1:{node.controller_port}",
            "advertised.listeners": broker,
            "listener.security.protocol.map": "BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": node.directory / "data",
            "auto.create.topics.enable": "false",
            "default.replication.factor": replicas,
            "min.insync.replicas": in_sync,
            "offsets.topic.num.partitions": OFFSETS_PARTITIONS,
            "offsets.topic.replication.factor": replicas,
            "transaction.state.log.num.partitions": OFFSETS_PARTITIONS,
            "transaction.state.log.replication.factor": replicas,
            "transaction.state.log.min.isr": in_sync,
            "group.initial.rebalance.delay.ms": 0,
            # 9 s by default: so long a killed node's leaderships, and its own restart, wait for its old session.
            "broker.session.timeout.ms": SESSION_TIMEOUT_MS,
            "broker.heartbeat.interval.ms": SESSION_TIMEOUT_MS // 4,
            # The default takes a third of our heap at the start.
            "log.cleaner.dedupe.buffer.size": 16 * 1024 * 1024,
            "num.network.threads": 2,
            "num.io.threads": 4,
        }
        return "".join(f"{key}={value}\n" for key, value in values.items())


def _java(*arguments: str) -> list[str]:
    return ["java", *_JVM, "-cp", f"{kraft_jars()}{os.sep}*", *arguments]
