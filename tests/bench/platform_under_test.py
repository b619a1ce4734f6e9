"""A broker, its topics and one worker, for a measurement; the broker is the embedded one or a real Apache Kafka."""

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "streams"), str(ROOT / "tests")]

from aiokafka import AIOKafkaProducer  # noqa: E402

import kraft  # noqa: E402 - the path above leads to it
from spendfuse.client.connection import producer_options  # noqa: E402
from spendfuse.client.keys import generate  # noqa: E402
from spendfuse.embedded.processes import ChildProcess  # noqa: E402
from spendfuse.embedded.tansu import EmbeddedBroker  # noqa: E402
from spendfuse.pipeline.feed import budget_key  # noqa: E402
from spendfuse.pipeline.topics import ensure_topics  # noqa: E402
from spendfuse.settings import BrokerSettings  # noqa: E402
from spendfuse.wire.base import encode  # noqa: E402
from spendfuse.wire.budget import Budget  # noqa: E402
from spendfuse.wire.topics import BUDGETS  # noqa: E402

READY_TIMEOUT_S = 90.0
PARTITIONS = 4


@dataclass
class Platform:
    """A running broker; `start_worker` adds a worker."""

    broker: BrokerSettings
    directory: Path
    private_key: str
    public_key: str

    def env(self) -> dict[str, str]:
        """Return the settings of clients and workers."""
        values = {name: str(value) for name, value in self.broker.model_dump().items() if name.startswith(_TIMINGS)}
        values |= {"bootstrap_servers": self.broker.bootstrap_servers, "public_keys": self.public_key}
        return {f"SPENDFUSE_{name.upper()}": value for name, value in values.items()}

    @contextlib.contextmanager
    def worker(self, **settings: str) -> Iterator[ChildProcess]:
        """Run a worker and yield it once it is ready."""
        ready = self.directory / "worker.ready"
        env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SPENDFUSE_")},
            **self.env(),
            "PYTHONPATH": str(ROOT / "streams"),
            "SPENDFUSE_SIGNING_KEY": self.private_key,
            "SPENDFUSE_READY_FILE": str(ready),
            "SPENDFUSE_DATA_DIR": str(self.directory / "worker"),
            **settings,
        }
        argv = [sys.executable, "-m", "spendfuse.pipeline.worker"]
        with ChildProcess("worker", argv, log_path=self.directory / "worker.log", env=env) as process:
            process.wait_until(ready.exists, READY_TIMEOUT_S)
            yield process


_TIMINGS = ("fetch_", "producer_", "session_", "rebalance_", "heartbeat_")


@contextlib.contextmanager
def platform(kind: str) -> Iterator[Platform]:
    """Start a broker of a kind (`embedded`, `kafka`) with its topics."""
    private, public = generate("bench")
    with tempfile.TemporaryDirectory(prefix="spendfuse-bench-") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        if kind == "embedded":
            started = stack.enter_context(EmbeddedBroker(directory))
            timings = vars(started.capabilities) if hasattr(started.capabilities, "__dict__") else {}
            timings = timings or {
                field: getattr(started.capabilities, field)
                for field in BrokerSettings.model_fields
                if hasattr(started.capabilities, field)
            }
            broker = BrokerSettings.from_env(
                {}, bootstrap_servers=started.bootstrap_servers,
                **{key: value for key, value in timings.items() if key in BrokerSettings.model_fields},
            )  # fmt: skip
        else:
            reason = kraft.kraft_missing()
            if reason:
                raise SystemExit(f"no real Kafka here: {reason}")
            broker = BrokerSettings.from_env(
                {}, bootstrap_servers=stack.enter_context(kraft.KraftBroker()).bootstrap_servers
            )
        asyncio.run(ensure_topics(broker, partitions=PARTITIONS, replication=1))
        yield Platform(broker, directory, private, public)


async def publish_budgets(broker: BrokerSettings, budgets: list[Budget]) -> None:
    """Publish budgets."""
    async with AIOKafkaProducer(**producer_options(broker, "bench")) as producer:
        for budget in budgets:
            await producer.send_and_wait(BUDGETS.name, encode(budget), key=budget_key(budget).encode())
