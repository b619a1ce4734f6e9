"""Worker processes for tests: started against a broker, awaited until they are ready, ended by their pid."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

from spendfuse.embedded.processes import ChildProcess
from spendfuse.settings import PREFIX, BrokerSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from spendfuse.embedded.tansu import EmbeddedBroker

ROOT = Path(__file__).parents[1]
READY_DEADLINE_S = 60.0
STOP_GRACE_S = 15.0
SESSION_MS = 2_000
"""The embedded broker lets the first member of a group wait half of it, and who follows a killed one all of it."""
MODULE = "spendfuse.pipeline.worker"


class WorkerProcess(ChildProcess):
    """One worker; a context manager that starts it, waits until it is ready, and ends it."""

    def __init__(
        self, directory: Path, name: str, broker: BrokerSettings, env: Mapping[str, str], *, module: str = MODULE
    ) -> None:
        """`directory` takes its log, ready file and data; `env` are its settings beside those of the broker."""
        self.ready_file = directory / f"{name}.ready"
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(PREFIX)}
        own = {
            "PYTHONPATH": os.pathsep.join([str(ROOT / "streams"), str(ROOT / "tests")]),
            f"{PREFIX}READY_FILE": str(self.ready_file),
            f"{PREFIX}DATA_DIR": str(directory / name),
            f"{PREFIX}HEARTBEAT_S": "0.5",
        }
        super().__init__(
            name,
            [sys.executable, "-m", module],
            log_path=directory / f"{name}.log",
            env={**inherited, **broker_env(broker), **own, **env},
        )

    def __enter__(self) -> Self:
        self.begin()
        self.until_ready()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop(STOP_GRACE_S)

    def begin(self) -> None:
        """Start, again after a kill, without waiting."""
        self.ready_file.unlink(missing_ok=True)
        self.start()

    def until_ready(self) -> None:
        """Wait until it says that it is ready; ChildFailedError, with its last lines, if it does not."""
        self.wait_until(self.ready_file.exists, READY_DEADLINE_S)

    @property
    def log(self) -> str:
        """All it has written, of this start and those before."""
        return self.log_path.read_text(errors="replace")


def quick_settings(broker: EmbeddedBroker) -> BrokerSettings:
    """Return what clients of an embedded broker need, with sessions so short that no test waits long for its group."""
    able = broker.capabilities
    return BrokerSettings.from_env(
        {},
        bootstrap_servers=broker.bootstrap_servers,
        fetch_max_wait_ms=able.fetch_max_wait_ms,
        producer_max_batch_size=able.producer_max_batch_size,
        session_timeout_ms=SESSION_MS,
        rebalance_timeout_ms=SESSION_MS,
        heartbeat_interval_ms=SESSION_MS // 5,
    )


def broker_env(broker: BrokerSettings) -> dict[str, str]:
    """Return the environment that leads to a broker (without security: tests' brokers have none)."""
    names = (
        "bootstrap_servers",
        "fetch_max_wait_ms",
        "producer_max_batch_size",
        "session_timeout_ms",
        "rebalance_timeout_ms",
        "heartbeat_interval_ms",
    )
    return {PREFIX + name.upper(): str(getattr(broker, name)) for name in names}
