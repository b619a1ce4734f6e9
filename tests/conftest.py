"""The brokers tests share, started once a session; their logs are in a temporary directory of the system."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kraft import KraftBroker, kraft_missing
from spendfuse.embedded.tansu import BrokerUnavailableError, EmbeddedBroker

if TYPE_CHECKING:
    from collections.abc import Iterator

os.environ.setdefault("SPENDFUSE_GUARD_DIR", "off")  # a test's guard forgets with its test, unless it says otherwise


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
