"""The wheel as a user gets it: alone in a clean environment, with nothing but what the client depends on."""

import asyncio
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from spendfuse.client.follow import Follower, Record
from spendfuse.embedded.tansu import EmbeddedBroker
from spendfuse.pipeline.topics import ensure_topics
from spendfuse.settings import BrokerSettings
from spendfuse.wire.topics import USAGE
from spendfuse.wire.usage import decode_usages

ROOT = Path(__file__).resolve().parents[2]
INSTALL_TIMEOUT_S = 180

pytestmark = [pytest.mark.timeout(INSTALL_TIMEOUT_S * 2)]

EMIT = """
from spendfuse.client import Guard, Halted, Meter
with Meter.from_env(workspace="acme", team="research", agent="wheel", run="r1") as meter:
    meter.record(provider="anthropic", model="claude-sonnet-4-6", input=1200, output=800, id="from-the-wheel")
    assert meter.flush(20), meter.stats
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out)],
        check=True, capture_output=True, cwd=ROOT,
    )  # fmt: skip
    return next(out.glob("spendfuse-*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", str(home / "env")], check=True)
    pins = re.findall(r"^([a-z0-9-]+==[^ ;]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    (home / "constraints.txt").write_text("\n".join(pins))
    executable = home / "env" / "bin" / "python"
    subprocess.run(
        [str(executable), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
         "--constraint", str(home / "constraints.txt"), str(wheel)],
        check=True, capture_output=True, timeout=INSTALL_TIMEOUT_S,
    )  # fmt: skip
    return executable


def test_the_wheel_carries_the_data_that_the_command_line_needs(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "spendfuse/py.typed",
        "spendfuse/data/sql/migrations/0001_database.sql",
        "spendfuse/data/sql/queries/totals.sql",
        "spendfuse/data/schemas/json/usage.v1.schema.json",
        "spendfuse/data/schemas/pricebook/2026-11-23.json",
        "spendfuse/data/grafana/dashboards/wallet.json",
        "spendfuse/demo/budgets.yaml",
    ):
        assert wanted in names
    assert not [name for name in names if name.startswith("tests/")]


@pytest.mark.broker
async def test_a_clean_environment_imports_the_client_and_emits(python: Path, tmp_path: Path) -> None:
    with EmbeddedBroker(tmp_path) as started:
        broker = BrokerSettings.from_env(
            {}, bootstrap_servers=started.bootstrap_servers, fetch_max_wait_ms=20, producer_max_batch_size=1
        )
        await ensure_topics(broker, partitions=2, replication=1)
        env = {"SPENDFUSE_BOOTSTRAP_SERVERS": started.bootstrap_servers, "SPENDFUSE_PRODUCER_MAX_BATCH_SIZE": "1"}
        done = await asyncio.to_thread(
            subprocess.run, [str(python), "-I", "-c", EMIT], env=env, capture_output=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        seen: list[Record] = []
        async with Follower(broker, USAGE.name, seen.append) as follower:
            await asyncio.wait_for(follower.caught_up(), 20)
    (usage,) = decode_usages(seen[0].value or b"")
    assert (usage.id, usage.agent_path, usage.tokens.total) == ("from-the-wheel", "acme/research/wheel", 2000)
    assert dict(seen[0].headers)["ce_type"] == b"dev.spendfuse.usage.v1"


@pytest.mark.parametrize("extra", ["faust", "chdb", "clickhouse_connect", "yaml", "typer", "aiohttp"])
def test_the_client_brings_none_of_the_server_side(python: Path, extra: str) -> None:
    done = subprocess.run([str(python), "-I", "-c", f"import {extra}"], capture_output=True, check=False)
    assert b"ModuleNotFoundError" in done.stderr


def test_the_bare_command_says_which_extra_it_needs(python: Path) -> None:
    done = subprocess.run([str(python.parent / "spendfuse"), "status"], capture_output=True, check=False, timeout=60)
    assert done.returncode != 0
    assert b"spendfuse[" in done.stderr
    assert b"Traceback" not in done.stderr
