"""An audit that is dead: the worker says so once, `spendfuse status` shows how far it is behind, and it ends."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("chdb", reason="the embedded ClickHouse needs the chdb package")
pytest.importorskip("clickhouse_connect")

from audit_writers import DEADLINE_S
from spendfuse.cli.app import app
from spendfuse.client import Meter
from spendfuse.embedded.stack import EmbeddedStack
from spendfuse.embedded.tansu import BrokerUnavailableError
from spendfuse.wire.topics import ALERTS
from topic_records import values_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BOUND_S = 5
"""The least that SPENDFUSE_AUDIT_LAG_S allows."""

pytestmark = pytest.mark.broker


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[EmbeddedStack]:
    try:
        with EmbeddedStack(
            tmp_path / "stack", partitions=2, extra_env={"SPENDFUSE_AUDIT_LAG_S": str(BOUND_S)}
        ) as started:
            yield started
    except BrokerUnavailableError as error:
        pytest.skip(str(error))


def spend(stack: EmbeddedStack) -> None:
    given = {name.removeprefix("SPENDFUSE_").lower(): value for name, value in stack.env.items()}
    del given["public_keys"]
    with Meter.from_env(**given, workspace="acme", team="research", agent="planner-7") as meter:
        meter.record(provider="anthropic", model="claude-sonnet-4-6", input=600)


def until(condition: Callable[[], Any], what: str) -> Any:
    give_up_at = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < give_up_at, f"not {what} after {DEADLINE_S:g} s"
        time.sleep(0.2)
    return found


def severities(stack: EmbeddedStack) -> list[str]:
    alerts = [json.loads(value) for value in values_of(stack.broker, ALERTS.name)]
    return [alert["severity"] for alert in alerts if "the audit" in alert["message"] and alert["kind"] == "lag"]


def test_an_audit_that_is_dead_is_told_once_shown_and_told_again_when_it_has_caught_up(
    stack: EmbeddedStack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in stack.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)

    def status(*words: str) -> str:
        answer = CliRunner().invoke(app, ["status", "--once", *words])
        assert answer.exit_code == 0, answer.output
        return answer.stdout

    def audit() -> dict[str, Any]:
        return json.loads(status("--json"))["audit"] or {}

    spend(stack)
    until(lambda: audit().get("messages") == 0, "written")
    assert "ClickHouse has every message of the ledger" in status()
    assert severities(stack) == []
    dead = stack.processes["audit"]
    dead.stop(DEADLINE_S)
    spend(stack)
    until(lambda: severities(stack) == ["warning"], "told")
    shown = audit()
    assert shown["messages"] >= 1, "the usage, and the alert itself"
    assert (shown["oldest_s"] >= BOUND_S, shown["behind"]) == (True, shown["oldest_s"] > 60)
    assert "ledger messages are not in ClickHouse, the oldest for" in status()
    dead.start()
    until(lambda: severities(stack) == ["warning", "info"], "told that it is over")
    until(lambda: audit()["messages"] == 0, "caught up")
