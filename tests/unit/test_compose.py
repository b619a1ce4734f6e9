"""docker-compose.yml and the image, read as text: `docker compose config` needs Docker, these questions do not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml

from spendfuse import __version__
from spendfuse.settings import (
    PREFIX,
    AuditSettings,
    BrokerSettings,
    ClockSettings,
    Settings,
    WorkerSettings,
)

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = sorted(name for name, service in SERVICES.items() if "build" in service)
ONE_SHOTS = {"topics", "migrate"}
READS: dict[str, tuple[type[Settings], ...]] = {
    "topics": (BrokerSettings, WorkerSettings),
    "migrate": (AuditSettings,),
    "worker": (BrokerSettings, WorkerSettings, ClockSettings),
    # The audit's entry point reads the ready file's name beside its own settings.
    "audit": (BrokerSettings, AuditSettings, WorkerSettings),
}
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|(?<!PUBLIC_)KEY")
REQUIRED = re.compile(r"\$\{([A-Z_]+):\?set it in \.env\}")
OPTIONAL = "${SPENDFUSE_PUBLIC_KEYS:-}"

service_of = pytest.mark.parametrize("name", sorted(SERVICES))
ours = pytest.mark.parametrize("name", OURS)


def environment(name: str) -> dict[str, str]:
    return {key: str(value) for key, value in SERVICES[name].get("environment", {}).items()}


def mounts(name: str) -> list[list[str]]:
    return [volume.split(":") for volume in SERVICES[name].get("volumes", [])]


@service_of
def test_ports_are_published_on_loopback_only(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)
    assert "network_mode" not in SERVICES[name]
    assert not SERVICES[name].get("privileged")


@service_of
def test_images_are_pinned_to_a_release(name: str) -> None:
    repository, _, tag = SERVICES[name]["image"].rpartition(":")
    assert repository
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.\d+)?", tag)
    if name in OURS:
        assert (repository, tag) == ("spendfuse", __version__)


def test_the_images_of_the_dockerfile_are_pinned_and_the_last_one_is_not_root() -> None:
    text = (ROOT / "deploy/docker/Dockerfile").read_text()
    images = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert images
    assert all(re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", image) for image in images)
    last = text.rpartition("\nFROM ")[2]
    (user,) = re.findall(r"^USER (\d+):(\d+)$", last, re.MULTILINE)
    assert all(int(part) > 0 for part in user)
    assert f"--uid {user[0]} " in last
    for service in OURS:
        for place in SERVICES[service].get("tmpfs", []):
            if "uid=" in place:
                assert f"uid={user[0]},gid={user[1]}," in place


def test_what_the_dockerfile_copies_exists_and_reaches_the_build() -> None:
    text = (ROOT / "deploy/docker/Dockerfile").read_text()
    ignored = (ROOT / "deploy/docker/Dockerfile.dockerignore").read_text().splitlines()
    copied = [word for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE) for word in line.split()]
    assert {"requirements.lock", "pyproject.toml", "streams", "sql", "schemas"} <= set(copied)
    for path in copied:
        assert (ROOT / path).exists(), path
        assert f"!{path}" in ignored
    assert ignored[1] == "*"
    assert "--require-hashes" in text
    assert not re.search(r"pip install (?!--no-index)", text)


@service_of
def test_no_secret_is_written_down(name: str) -> None:
    for key, value in environment(name).items():
        if SECRET.search(key):
            assert REQUIRED.fullmatch(value), f"{key} is to come from .env, and compose is to stop without it"
        elif key == "SPENDFUSE_PUBLIC_KEYS":  # no secret, and none is needed as long as one key does everything
            assert value == OPTIONAL
        else:
            assert "${" not in value, f"{key}: a secret in a setting that is none?"
    assert "env_file" not in SERVICES[name], "it would hand every secret to every service"
    if "SPENDFUSE_CLICKHOUSE_URL" in environment(name):
        assert re.fullmatch(r"http://\w+@clickhouse:8123/spendfuse", environment(name)["SPENDFUSE_CLICKHOUSE_URL"])


def test_the_example_of_env_asks_for_every_secret_and_holds_none() -> None:
    lines = [line for line in (ROOT / ".env.example").read_text().splitlines() if line and not line.startswith("#")]
    asked = {line.partition("=")[0]: line.partition("=")[2] for line in lines}
    wanted = {found for name in SERVICES for value in environment(name).values() for found in REQUIRED.findall(value)}
    assert set(asked) == wanted
    assert set(asked.values()) == {""}
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()


@service_of
def test_a_service_that_stays_says_whether_it_is_well(name: str) -> None:
    service = SERVICES[name]
    if name in ONE_SHOTS:
        assert service["restart"] == "no"
        assert "healthcheck" not in service
    else:
        assert service["restart"] == "unless-stopped"
        assert {"test", "interval", "timeout", "retries", "start_period"} <= set(service["healthcheck"])


@service_of
def test_a_service_waits_for_what_it_needs(name: str) -> None:
    for other, how in SERVICES[name].get("depends_on", {}).items():
        assert other in SERVICES
        wanted = "service_completed_successfully" if other in ONE_SHOTS else "service_healthy"
        assert how["condition"] == wanted


@service_of
def test_mounted_files_exist_and_are_read_only_and_volumes_are_named(name: str) -> None:
    for source, target, *mode in mounts(name):
        assert target.startswith("/")
        if source.startswith("."):
            assert (ROOT / source).exists(), source
            assert mode == ["ro"]
        else:
            assert source in COMPOSE["volumes"]


@ours
def test_a_setting_given_to_our_image_is_one_it_reads(name: str) -> None:
    known = {PREFIX + field.upper() for group in READS[name] for field in group.model_fields}
    given = environment(name)
    assert set(given) <= known
    for group in READS[name]:
        group.from_env({key: REQUIRED.sub("given", value).removesuffix(OPTIONAL) for key, value in given.items()})


@ours
def test_our_image_runs_without_rights_on_a_root_it_cannot_write(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "user" not in service, "the image's own user is not root"
    ready = service.get("healthcheck", {}).get("test", [])
    if ready:
        assert ready[-1] == environment(name)["SPENDFUSE_READY_FILE"]
        assert any(place.startswith(ready[-1].rsplit("/", 1)[0] + ":") for place in service["tmpfs"])


@ours
def test_a_command_of_compose_is_one_the_image_has(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spendfuse", *SERVICES[name]["command"], "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "streams")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"spendfuse {' '.join(SERVICES[name]['command'])}" in done.stdout


def test_each_clickhouse_account_has_a_password_of_its_own_and_is_used_as_it_is_meant() -> None:
    users = ET.parse(ROOT / "deploy/docker/clickhouse/users.xml").getroot().find("users")  # noqa: S314 - ours
    assert users is not None
    passwords = {user.tag: user.find("password") for user in users if user.tag != "default"}
    names = {tag: password.get("from_env") for tag, password in passwords.items() if password is not None}
    assert len(set(names.values())) == len(passwords) == 4
    server = environment("clickhouse")
    assert set(names.values()) == {key for key in server if key.endswith("PASSWORD")}
    assert all(server[str(name)] == f"${{{name}:?set it in .env}}" for name in names.values())
    (default,) = (user for user in users if user.tag == "default")
    assert default.get("remove") == "remove"
    assert server["CLICKHOUSE_SKIP_USER_SETUP"] == "1"
    for service in ("migrate", "audit"):
        account = re.findall(r"//(\w+)@", environment(service)["SPENDFUSE_CLICKHOUSE_URL"])[0]
        assert environment(service)["SPENDFUSE_CLICKHOUSE_PASSWORD"] == f"${{{names[account]}:?set it in .env}}"
    assert names["grafana_reader"] in environment("grafana")


def test_kafka_is_told_what_its_clients_rely_on() -> None:
    lines = (ROOT / "deploy/kafka/server.properties").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert settings["auto.create.topics.enable"] == "false"
    advertised = dict(each.split("://") for each in settings["advertised.listeners"].split(","))
    assert {environment(name)["SPENDFUSE_BOOTSTRAP_SERVERS"] for name in ("topics", "worker", "audit")} == {
        advertised["INTERNAL"]
    }
    assert advertised["EXTERNAL"].startswith("127.0.0.1:")
    assert SERVICES["kafka"]["ports"] == [f"{advertised['EXTERNAL']}:9092"]
    assert advertised["INTERNAL"].partition(":")[0] in SERVICES
    assert any(target == settings["log.dirs"] for _, target, *_ in mounts("kafka"))
