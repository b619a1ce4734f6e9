"""The brokers tests share, started once a session; their logs are in a temporary directory of the system."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kraft import KraftBroker, kraft_missing
from spendfuse.embedded.tansu import BrokerUnavailableError, EmbeddedBroker

if TYPE_CHECKING:
    from collections.abc import Iterator

MORE_THAN_CPUS = 1
PROCESSES_MAX = 8

# A shell's background job, and all it starts, ignores Ctrl-C; the programs that tests interrupt must not inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("SPENDFUSE_GUARD_DIR", "off")  # a test's guard forgets with its test, unless it says otherwise


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return how many processes `-n auto` means: more than there are CPUs, as many tests wait for a broker."""
    return min((os.cpu_count() or 1) + MORE_THAN_CPUS, PROCESSES_MAX)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a module's tests in one process and in order, for its fixtures; those of the shared Kafka likewise."""
    from xdist.scheduler import LoadScopeScheduling

    # Not pytest-xdist's own `--dist loadgroup`: its groups are lost on the way with pytest 9.2.
    class OneModuleOneProcess(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module, _, test = nodeid.partition("::")
            return "kraft" if "kraft" in test.partition("[")[2] else module

    return OneModuleOneProcess(config, log)


@pytest.fixture(scope="session")
def tansu() -> Iterator[EmbeddedBroker]:
    """The embedded broker; name your topics and groups after your test, everybody shares it."""
    with tempfile.TemporaryDirectory(prefix="spendfuse-tansu-") as directory:
        try:
            broker = EmbeddedBroker(Path(directory)).start()
        except BrokerUnavailableError as error:
            pytest.skip(str(error))
        with broker:
            yield broker


@pytest.fixture(scope="session")
def kraft() -> Iterator[KraftBroker]:
    """A real Apache Kafka of one node; name your topics and groups after your test, everybody shares it."""
    reason = kraft_missing()
    if reason is not None:
        pytest.skip(reason)
    with KraftBroker() as broker:
        yield broker
