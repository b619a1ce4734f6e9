"""Everything on one machine without Docker: broker, topics, workers and the audit, as children of this process.

The broker forgets all when it stops, so each start has a directory of its own for logs and the trail
(`run-<UTC time>-<pid>`); only the development keys outlive it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import spendfuse
from spendfuse.audit.address import read_address
from spendfuse.client.keys import Signer, format_keys, generate
from spendfuse.embedded.processes import ChildFailedError, ChildProcess
from spendfuse.embedded.tansu import EmbeddedBroker
from spendfuse.settings import PREFIX, BrokerSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spendfuse.audit.address import Address

READY_TIMEOUT_S: Final = 90.0
TOPICS_TIMEOUT_S: Final = 30.0
STOP_GRACE_S: Final = 8.0
POLL_INTERVAL_S: Final = 0.02
WORKERS_MAX: Final = 16
RUNS_KEPT: Final = 3
"""Directories of earlier starts that are kept, for their logs and trail; older ones are removed."""
KEY_BYTES_MAX: Final = 4_096
DEV_KID: Final = "dev"
RUN_PREFIX: Final = "run-"
TRAIL_DIRECTORY: Final = "clickhouse"


class EmbeddedStack:
    """Broker, topics, `workers` workers and (unless `audit` is False) the audit; a context manager.

    `clock` is `wall` or `scaled:...` (see `parse_clock`), for workers and clients alike. `extra_env` comes last in
    the environment of workers and audit. On Linux the children die with this process, even by kill -9.
    `start` raises BrokerUnavailableError without a broker for this machine, ChildFailedError (with the last lines of
    its log) when a part does not become ready within READY_TIMEOUT_S; nothing is left running then.
    """

    def __init__(
        self,
        directory: Path,
        *,
        partitions: int = 4,
        clock: str = "wall",
        audit: bool = True,
        workers: int = 1,
        extra_env: Mapping[str, str] | None = None,
    ) -> None:
        if not 0 <= workers <= WORKERS_MAX:
            raise ValueError(f"workers must be 0 to {WORKERS_MAX}, not {workers}")
        self.directory = directory.resolve()
        self.partitions = partitions
        self.clock = clock
        self.processes: dict[str, ChildProcess] = {}
        self.clickhouse: Address | None = None
        self._with_audit = audit
        self._workers = workers
        self._extra_env = dict(extra_env or {})
        self._run: Path | None = None
        self._broker: EmbeddedBroker | None = None
        self._public_keys = ""

    def __enter__(self) -> Self:
        return self if self._broker is not None else self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    @property
    def broker(self) -> BrokerSettings:
        """How clients reach the broker, with the timings it needs; ChildFailedError unless started."""
        if self._broker is None:
            raise ChildFailedError("the embedded stack is not started: use it as `with EmbeddedStack(directory)`")
        capabilities = self._broker.capabilities
        return BrokerSettings.from_env(
            {},
            bootstrap_servers=self._broker.bootstrap_servers,
            fetch_max_wait_ms=capabilities.fetch_max_wait_ms,
            producer_max_batch_size=capabilities.producer_max_batch_size,
            session_timeout_ms=capabilities.session_timeout_ms,
            rebalance_timeout_ms=capabilities.rebalance_timeout_ms,
            heartbeat_interval_ms=capabilities.heartbeat_interval_ms,
        )

    @property
    def public_keys(self) -> str:
        """What a guard needs to check commands: `kid=<base64>`, for SPENDFUSE_PUBLIC_KEYS."""
        return self._public_keys

    @property
    def env(self) -> dict[str, str]:
        """What an agent's environment needs to emit usage and obey: servers, timings, public keys, clock."""
        broker = self.broker
        values = {
            "bootstrap_servers": broker.bootstrap_servers,
            "fetch_max_wait_ms": str(broker.fetch_max_wait_ms),
            "producer_max_batch_size": str(broker.producer_max_batch_size),
            "session_timeout_ms": str(broker.session_timeout_ms),
            "rebalance_timeout_ms": str(broker.rebalance_timeout_ms),
            "heartbeat_interval_ms": str(broker.heartbeat_interval_ms),
            "public_keys": self._public_keys,
            "clock": self.clock,
        }
        return {PREFIX + name.upper(): value for name, value in values.items()}

    @property
    def signing_key_file(self) -> Path:
        """The file (0600) of the private key that signs commands."""
        return self.directory / "keys" / "signing.key"

    @property
    def public_key_file(self) -> Path:
        """The file of the public key."""
        return self.directory / "keys" / "public.key"

    @property
    def run_directory(self) -> Path:
        """Where this start keeps its logs and its trail; ChildFailedError unless started."""
        if self._run is None:
            raise ChildFailedError("the embedded stack is not started: it has no logs yet")
        return self._run

    def start(self) -> Self:
        """Start everything and return once all of it is ready."""
        if self._broker is not None:
            raise ChildFailedError("the embedded stack is already started: stop it first")
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._public_keys = self._keys()
        self._run = self._new_run()
        try:
            self._broker = EmbeddedBroker(self._run)
            self._broker.start()
            self._create_topics()
            for number in range(1, self._workers + 1):
                self._start_part(f"worker-{number}", "spendfuse.pipeline.worker", self._worker_env(number))
            if self._with_audit:
                self._start_part("audit", "spendfuse.audit", self._audit_env())
            self._wait_ready(READY_TIMEOUT_S)
            if self._with_audit:
                self.clickhouse = read_address(self._run / TRAIL_DIRECTORY)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End everything: workers and audit first and together, so that they part from the broker in order."""
        processes = list(self.processes.values())
        self.processes.clear()
        self.clickhouse = None
        try:
            if processes:
                with ThreadPoolExecutor(len(processes), thread_name_prefix="spendfuse-stop") as pool:
                    list(pool.map(lambda process: process.stop(STOP_GRACE_S), processes))
        finally:
            broker, self._broker = self._broker, None
            if broker is not None:
                broker.stop()

    def failed(self) -> str | None:
        """Return the name of a part that has ended by itself, None while all run; its log is in `run_directory`."""
        if self._broker is not None and not self._broker.alive:
            return "tansu"
        return next((name for name, process in self.processes.items() if not process.alive), None)

    def ready_file(self, name: str) -> Path:
        """Return the file that exists while a part (`worker-1`, `audit`) is ready."""
        return self.run_directory / f"{name}.ready"

    def _keys(self) -> str:
        """Return the public keys, made together with the private key when there is none."""
        directory = self.signing_key_file.parent
        directory.mkdir(mode=0o700, exist_ok=True)
        if self.signing_key_file.exists():
            with self.signing_key_file.open(encoding="utf-8") as file:
                signer = Signer.parse(file.read(KEY_BYTES_MAX))
            public = format_keys({signer.kid: signer.public_bytes})
        else:
            private, public = generate(DEV_KID)
            descriptor = os.open(self.signing_key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(private + "\n")
        self.public_key_file.write_text(public + "\n", encoding="utf-8")
        return public

    def _new_run(self) -> Path:
        earlier = sorted(path for path in self.directory.glob(f"{RUN_PREFIX}*") if path.is_dir())
        for path in earlier[: max(0, len(earlier) - RUNS_KEPT)]:
            shutil.rmtree(path, ignore_errors=True)
        run = self.directory / f"{RUN_PREFIX}{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{os.getpid()}"
        run.mkdir(mode=0o700)
        return run

    def _create_topics(self) -> None:
        from spendfuse.pipeline.topics import ensure_topics  # noqa: PLC0415 - brings the admin client

        async def create() -> None:
            async with asyncio.timeout(TOPICS_TIMEOUT_S):
                await ensure_topics(self.broker, partitions=self.partitions, replication=1)

        # In a thread of its own: the caller may be in a running event loop.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, create()).result()

    def _worker_env(self, number: int) -> dict[str, str]:
        return {
            "SPENDFUSE_PARTITIONS": str(self.partitions),
            "SPENDFUSE_SIGNING_KEY_FILE": str(self.signing_key_file),
            "SPENDFUSE_DATA_DIR": str(self.run_directory / f"worker-{number}"),
        }

    def _audit_env(self) -> dict[str, str]:
        return {"SPENDFUSE_CHDB_DIR": str(self.run_directory / TRAIL_DIRECTORY), "SPENDFUSE_HTTP_PORT": "0"}

    def _start_part(self, name: str, module: str, env: Mapping[str, str]) -> None:
        # Settings of the caller's environment are for the caller: a part gets what the stack says.
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(PREFIX)}
        process = ChildProcess(
            name,
            [sys.executable, "-m", module],
            log_path=self.run_directory / f"{name}.log",
            env={
                **inherited,
                **_python_path(),
                **self.env,
                **env,
                "SPENDFUSE_READY_FILE": str(self.ready_file(name)),
                **self._extra_env,
            },
        )
        self.processes[name] = process
        process.start()

    def _wait_ready(self, deadline_s: float) -> None:
        give_up_at = time.monotonic() + deadline_s
        waiting = dict(self.processes)
        while waiting:
            left_s = give_up_at - time.monotonic()
            for name, process in list(waiting.items()):
                if self.ready_file(name).exists():
                    del waiting[name]
                elif left_s <= 0 or not process.alive:
                    process.wait_until(lambda: False, 0.0)  # raises, with the last lines of its log
            time.sleep(POLL_INTERVAL_S)


def _python_path() -> dict[str, str]:
    """Return PYTHONPATH with this package's root, when it runs from a checkout that is not installed."""
    root = Path(spendfuse.__file__).resolve().parents[1]
    if root.name in {"site-packages", "dist-packages"}:
        return {}
    inherited = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{root}{os.pathsep}{inherited}" if inherited else str(root)}
