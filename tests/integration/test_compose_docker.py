"""The deployment: brought up where a Docker engine answers; its parts, one by one, everywhere else.

Without Docker: ClickHouse's own parser takes users.xml and its grants hold (chDB is the same engine, with one user, so
each account takes its turn as that user), and a real Apache Kafka starts from server.properties.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
import uuid
from base64 import b64encode
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from kraft import KraftBroker, kraft_missing
from spendfuse.embedded.processes import free_port
from spendfuse.grafana import ALL, expand, panels
from spendfuse.pipeline.topics import ensure_topics
from spendfuse.settings import BrokerSettings
from spendfuse.wire.topics import TOPICS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).parents[2]
CLICKHOUSE = ROOT / "deploy/docker/clickhouse"
PROGRAM_S_MAX = 120
UP_S_MAX = 900
HEALTHY_S_MAX = 300
EVENT = (
    "INSERT INTO spendfuse.ledger_events (kind, recorded_at, data, src_topic, src_partition, src_offset, src_index, "
    "ledger_partition, ledger_offset) VALUES ('operator', 1, '{}', 't', 0, 0, 0, 0, 0)"
)
USAGE = (
    "INSERT INTO spendfuse.usage_events (usage_id, occurred_at, kind, usage_kind, workspace, cost_nanos, currency) "
    "VALUES ('u', 1, 'charge', 'finished', 'acme', 7, 'USD')"
)
SPENT = "SELECT sum(cost_nanos) FROM spendfuse.spend_1m"
# What nobody may do: the trail only grows, and the database reads no files and calls no one.
FORBIDDEN = (
    "DROP TABLE spendfuse.usage_events",
    "DROP DATABASE spendfuse",
    "TRUNCATE TABLE spendfuse.usage_events",
    "ALTER TABLE spendfuse.usage_events DELETE WHERE 1",
    "ALTER TABLE spendfuse.usage_events UPDATE cost_nanos = 0 WHERE 1",
    "ALTER TABLE spendfuse.usage_events MODIFY TTL toDateTime(ingested_at)",
    "DELETE FROM spendfuse.usage_events WHERE 1",
    "SELECT * FROM file('/etc/hostname', LineAsString)",
    "SELECT * FROM url('http://127.0.0.1:1/', LineAsString)",
)


def configure(directory: Path, account: str) -> dict[str, str]:
    """Write a configuration of the engine whose only usable user has an account's profile and grants."""
    users = ET.parse(CLICKHOUSE / "users.xml")  # noqa: S314 - our own file
    listed = users.getroot().find("users")
    profiles = users.getroot().find("profiles")
    assert listed is not None
    assert profiles is not None
    chosen = listed.find(account)
    removed = listed.find("default")
    assert chosen is not None
    assert removed is not None
    listed.remove(removed)
    # A server reads access_control_improvements, the engine in a process does not, and then refuses this exception.
    for profile in profiles:
        for constraints in profile.findall("constraints"):
            profile.remove(constraints)
    default = ET.SubElement(listed, "default")
    ET.SubElement(default, "password")
    default.extend(part for part in chosen if part.tag != "password")
    ET.SubElement(profiles, "default")
    ET.SubElement(ET.SubElement(users.getroot(), "quotas"), "default")
    users.write(directory / f"{account}.users.xml")
    server = ET.parse(CLICKHOUSE / "server.xml")  # noqa: S314 - our own file
    for name in ("logger", "max_server_memory_usage_to_ram_ratio"):
        part = server.getroot().find(name)
        assert part is not None
        server.getroot().remove(part)
    where = ET.SubElement(ET.SubElement(server.getroot(), "user_directories"), "users_xml")
    ET.SubElement(where, "path").text = str(directory / f"{account}.users.xml")
    config = directory / f"{account}.config.xml"
    server.write(config)
    return {"config-file": str(config)}


def program(directory: Path, account: str, statements: Sequence[str]) -> list[str | None]:
    """Run statements as an account (migrations first, if it may); return what each answered or was refused with."""
    import clickhouse_connect
    from clickhouse_connect.driver.exceptions import ClickHouseError

    from spendfuse.audit import migrate
    from spendfuse.audit.database import Database

    client = clickhouse_connect.get_client(
        interface="chdb", path=str(directory / "engine"), chdb_options=configure(directory, account)
    )
    if account == "spendfuse_migrator":
        migrate.apply(Database(client, "spendfuse"))
    if account == "spendfuse_writer":  # `audit run` looks, too, and has nothing left to do
        assert migrate.apply(Database(client, "spendfuse")) == []
    answers: list[str | None] = []
    client.command("USE spendfuse")
    for statement in statements:
        try:
            if statement.startswith(("SELECT", "WITH")):
                rows = client.query(statement).result_rows
                answers.append(str(rows[0][0]) if rows else None)
            else:
                client.command(statement)
                answers.append(None)
        except ClickHouseError as error:
            answers.append(f"error: {error}")
    client.close()
    return answers


def run_as(account: str, directory: Path, *statements: str) -> list[str | None]:
    passwords = {f"CLICKHOUSE_{name}_PASSWORD": "not-a-secret" for name in ("MIGRATOR", "WRITER", "READER", "GRAFANA")}
    done = subprocess.run(
        [sys.executable, __file__, str(directory), account],
        input=json.dumps(statements),
        env={**os.environ, **passwords, "PYTHONPATH": os.pathsep.join([str(ROOT / "streams"), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
        timeout=PROGRAM_S_MAX,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4_000:]
    answers: list[str | None] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.fixture(scope="module")
def trail(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that the migrator's account has made and put one usage into."""
    pytest.importorskip("chdb", reason="the accounts are tried on the chdb package: pip install 'spendfuse[embedded]'")
    directory = tmp_path_factory.mktemp("clickhouse")
    assert run_as("spendfuse_migrator", directory, USAGE, SPENT) == [None, "7"]
    return directory


ACCOUNTS = ("spendfuse_migrator", "spendfuse_writer", "spendfuse_reader", "grafana_reader")


@pytest.mark.parametrize("account", ACCOUNTS)
def test_nobody_can_shrink_the_trail_or_reach_outside_it(trail: Path, account: str) -> None:
    for statement, answer in zip(FORBIDDEN, run_as(account, trail, *FORBIDDEN), strict=True):
        assert answer is not None, statement
        assert "ACCESS_DENIED" in answer or "READONLY" in answer, (statement, answer)


def test_the_writer_inserts_and_creates_nothing(trail: Path) -> None:
    before, event, usage, after, created = run_as(
        "spendfuse_writer", trail, SPENT, EVENT, USAGE.replace("'u'", "'another'"), SPENT,
        "CREATE TABLE spendfuse.t (x Int8) ENGINE = MergeTree ORDER BY x"
    )  # fmt: skip
    assert event is usage is None
    assert int(str(after)) == int(str(before)) + 7, "the views count what it inserts"
    assert "ACCESS_DENIED" in str(created)


@pytest.mark.parametrize("account", ["spendfuse_reader", "grafana_reader"])
def test_a_reader_sees_every_panel_and_changes_nothing(trail: Path, account: str) -> None:
    chosen = {"workspace": "acme", "team": ALL, "agent": ALL}
    asked = [expand(panel.sql, from_us=0, to_us=3_600_000_000, variables=chosen) for panel in panels()]
    for panel, answer in zip(panels(), run_as(account, trail, *asked), strict=True):
        assert not str(answer).startswith("error"), (panel.title, answer)
    for answer in run_as(account, trail, EVENT, USAGE, "CREATE VIEW spendfuse.v AS SELECT 1", "SET readonly = 0"):
        assert "READONLY" in str(answer) or "ACCESS_DENIED" in str(answer)
    (larger,) = run_as(account, trail, "SET max_memory_usage = 0")
    assert "READONLY" in str(larger)


class KafkaOfCompose(KraftBroker):
    """Apache Kafka by deploy/kafka/server.properties, with ports and a directory of the test's own."""

    def _server_properties(self, node: Any) -> str:
        text = (ROOT / "deploy/kafka/server.properties").read_text()
        inside, outside, controller = (f"127.0.0.1:{port}" for port in (node.port, free_port(), node.controller_port))
        for given, ours in {
            "INTERNAL://:19092": f"INTERNAL://{inside}",
            "INTERNAL://kafka:19092": f"INTERNAL://{inside}",
            "EXTERNAL://:9092": f"EXTERNAL://{outside}",
            "EXTERNAL://127.0.0.1:9092": f"EXTERNAL://{outside}",
            "localhost:9093": controller,
            "/var/lib/kafka/data": str(node.directory / "data"),
        }.items():
            assert given in text, f"{given} is no longer in server.properties: change this test with it"
            text = text.replace(given, ours)
        return text


@pytest.mark.kafka
async def test_a_real_kafka_runs_by_the_settings_of_compose() -> None:
    if reason := kraft_missing():
        pytest.skip(reason)
    with KafkaOfCompose() as kafka:
        broker = BrokerSettings(bootstrap_servers=kafka.bootstrap_servers)
        reports = await ensure_topics(broker, partitions=2, replication=1)
        assert all(report.created for report in reports)
        admin = AIOKafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
        await admin.start()
        try:
            producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, request_timeout_ms=2_000)
            await producer.start()
            try:
                with pytest.raises(KafkaError):
                    await producer.send_and_wait("spendfuse.typo.v1", b"x")
            finally:
                await producer.stop()
            assert set(await admin.list_topics()) == {topic.name for topic in TOPICS}
        finally:
            await admin.close()


def docker_missing() -> str | None:
    if shutil.which("docker") is None:
        return "compose needs docker, which is not on the PATH"
    for question, says in ((["info"], "no Docker engine answers"), (["compose", "version"], "docker has no compose")):
        asked = subprocess.run(["docker", *question], capture_output=True, text=True, timeout=30, check=False)
        if asked.returncode != 0:
            return f"{says}: {asked.stderr.strip()[:200]}"
    return None


@pytest.fixture
def compose(tmp_path: Path) -> Iterator[Any]:
    """Compose with secrets of its own, under a project of its own; everything of it is removed afterwards."""
    reason = docker_missing()
    if reason is not None:
        pytest.skip(reason)
    from spendfuse.client.keys import generate

    env = tmp_path / "env"
    names = [line.partition("=")[0] for line in (ROOT / ".env.example").read_text().splitlines() if "=" in line[:40]]
    secrets = {name: uuid.uuid4().hex for name in names if not name.startswith("#")}
    secrets["SPENDFUSE_SIGNING_KEY"] = generate("test")[0]
    env.write_text("".join(f"{name}={value}\n" for name, value in secrets.items()))
    project = f"spendfuse-test-{uuid.uuid4().hex[:8]}"

    def run(*arguments: str, deadline_s: float = 60) -> str:
        done = subprocess.run(
            ["docker", "compose", "--env-file", str(env), "--project-name", project, *arguments],
            cwd=ROOT, capture_output=True, text=True, timeout=deadline_s, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4_000:]
        return done.stdout

    run.secrets = secrets  # type: ignore[attr-defined]
    try:
        yield run
    finally:
        run("down", "--volumes", "--timeout", "20", deadline_s=180)


def grafana(path: str, password: str, body: dict[str, Any] | None = None) -> Any:
    login = b64encode(f"admin:{password}".encode()).decode()
    request = urllib.request.Request(
        f"http://127.0.0.1:3000{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Authorization": f"Basic {login}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - the same
        return json.load(answer)


@pytest.mark.docker
@pytest.mark.timeout(UP_S_MAX + HEALTHY_S_MAX + 300)
def test_compose_comes_up_and_grafana_answers_every_panel(compose: Any) -> None:
    compose("up", "--build", "--detach", "--wait", "--wait-timeout", str(HEALTHY_S_MAX), deadline_s=UP_S_MAX)
    password = compose.secrets["GRAFANA_ADMIN_PASSWORD"]
    board = grafana("/api/dashboards/uid/spendfuse-wallet", password)["dashboard"]
    assert [each["id"] for each in board["panels"]]
    health = grafana("/api/datasources/uid/spendfuse-clickhouse/health", password)
    assert health["status"] == "OK", health
    now_ms = int(time.time() * 1_000)
    for panel in panels():
        # The front end's share of the macros is done here; the plugin expands the rest.
        sql = expand(panel.sql, from_us=(now_ms - 3_600_000) * 1_000, to_us=now_ms * 1_000, variables={
            "workspace": "acme", "team": ALL, "agent": ALL})  # fmt: skip
        query = {
            "refId": "A", "datasource": {"type": "grafana-clickhouse-datasource", "uid": "spendfuse-clickhouse"},
            "editorType": "sql", "rawSql": sql, "format": panel.format, "queryType": "table",
            "intervalMs": 60_000, "maxDataPoints": 1_000,
        }  # fmt: skip
        asked = {"from": str(now_ms - 3_600_000), "to": str(now_ms), "queries": [query]}
        answer = grafana("/api/ds/query", password, asked)["results"]["A"]
        assert answer.get("status", 200) == 200, (panel.title, answer)
    once = compose("exec", "-T", "worker", "spendfuse", "topics", "create", "--json")
    assert len(json.loads(once)) == len(TOPICS)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(program(Path(sys.argv[1]), sys.argv[2], json.load(sys.stdin))) + "\n")
