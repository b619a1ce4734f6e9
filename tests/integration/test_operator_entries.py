"""Whatever an operator does on the command line is an entry of the ledger: who, what, when and why."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("chdb", reason="the embedded ClickHouse needs the chdb package")
pytest.importorskip("clickhouse_connect")

from audit_samples import START, charge, message
from audit_writers import DEADLINE_S, send
from spendfuse.audit import migrate, operator, retention, trail
from spendfuse.audit.batches import Collector, Message
from spendfuse.audit.database import Engine, open_embedded
from spendfuse.cli.app import app
from spendfuse.client import Meter
from spendfuse.client.keys import Verifier
from spendfuse.embedded.processes import ChildProcess
from spendfuse.embedded.stack import EmbeddedStack
from spendfuse.embedded.tansu import BrokerUnavailableError
from spendfuse.wire.ledger import LedgerBatch, LedgerEntry
from spendfuse.wire.topics import DEAD_LETTERS, LEDGER, USAGE
from topic_records import values_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.broker

BUDGETS = """version: 1
budgets:
  - id: everybody
    scope: agent:acme/research/*
    caps: [{amount: 1000000 tokens, window: day}]
"""
BY = ("--by", "ada")
FAR = datetime.now(UTC) + timedelta(days=800)


@pytest.fixture
def stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedStack]:
    """A deployment without an audit, and the command line beside it with its key."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPENDFUSE_CHDB_DIR", str(tmp_path / "clickhouse"))
    try:
        with EmbeddedStack(tmp_path / "stack", partitions=2, audit=False) as started:
            for name, value in started.env.items():
                monkeypatch.setenv(name, value)
            monkeypatch.setenv("SPENDFUSE_SIGNING_KEY_FILE", str(started.signing_key_file))
            monkeypatch.setenv("SPENDFUSE_PARTITIONS", "2")
            yield started
    except BrokerUnavailableError as error:
        pytest.skip(str(error))


def run(*words: str, code: int = 0) -> str:
    answer = CliRunner().invoke(app, list(words))
    assert answer.exit_code == code, (words, answer.output)
    return answer.output


def entries(stack: EmbeddedStack, kind: str) -> list[LedgerEntry]:
    batches = [LedgerBatch.model_validate_json(value) for value in values_of(stack.broker, LEDGER.name)]
    return [entry for batch in batches for entry in batch.entries if entry.kind == kind]


def said(stack: EmbeddedStack, verifier: Verifier | None) -> dict[str, dict[str, Any]]:
    """What operators' entries say, by action; only those that a key signed, or all."""
    found = [operator.read(json.dumps(entry.data), verifier) for entry in entries(stack, "operator")]
    return {each["action"]: each for each in found if each is not None}


def test_what_is_done_to_a_running_deployment_is_on_the_ledger_with_who_and_why(
    stack: EmbeddedStack, tmp_path: Path
) -> None:
    (tmp_path / "budgets.yaml").write_text(BUDGETS)
    run("budgets", "apply", "budgets.yaml", "--dry-run", *BY, "--reason", "only looking")
    run("budgets", "apply", "budgets.yaml", *BY, "--reason", "new team")
    run("budgets", "apply", "budgets.yaml", *BY, "--reason", "nothing to change")
    scope = "agent:acme/research/planner-7"
    run("halt", scope, *BY, "--reason", "loops", "--wait", "0")
    run("resume", scope, "--by", "bob", "--reason", "prompt fixed", "--wait", "0")
    run("keys", "rotate", "--dir", str(stack.signing_key_file.parent), *BY, "--reason", "yearly")

    orders = until(lambda: (found := entries(stack, "command"))[1:] and found, "recorded")
    assert [(e.command.action, e.command.by, e.command.reason) for e in orders if e.command] == [
        ("halt", "ada", "loops"),
        ("resume", "bob", "prompt fixed"),
    ]
    changed = until(lambda: entries(stack, "budget"), "recorded")
    assert [entry.data["id"] for entry in changed if entry.data] == ["everybody"]
    told = said(stack, Verifier.parse(stack.public_keys))
    assert {action: (each["by"], each["reason"]) for action, each in told.items()} == {
        "apply budgets": ("ada", "new team"),
        "rotate keys": ("ada", "yearly"),
    }
    assert told["apply budgets"]["budgets"] == [{"state": "new", "key": "everybody"}]
    assert told["rotate keys"]["step"] == "begin"
    for each in told.values():
        assert abs(datetime.now(UTC) - datetime.fromisoformat(each["at"])) < timedelta(seconds=DEADLINE_S * 4)


def until(look: Callable[[], Any], what: str) -> Any:
    give_up_at = time.monotonic() + DEADLINE_S
    while not (found := look()):
        assert time.monotonic() < give_up_at, f"not {what} after {DEADLINE_S:g} s"
        time.sleep(0.2)
    return found


def test_replays_and_rebuilds_are_on_the_ledger_before_they_are_done(
    stack: EmbeddedStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Meter.from_env(workspace="acme", team="research", agent="planner-7") as meter:
        meter.record(provider="anthropic", model="claude-sonnet-4-6", input=600)
    asyncio.run(send(stack.broker, USAGE.name, [(0, b"no usage")]))
    until(lambda: values_of(stack.broker, DEAD_LETTERS.name), "refused")
    until(lambda: entries(stack, "charge"), "charged")
    run("dlq", "replay", "0", *BY, "--why", "try it")
    for process in stack.processes.values():
        process.stop(DEADLINE_S)

    run("state", "rebuild", "--plan", *BY)
    words = ["state", "rebuild", "--stopped", *BY, "--reason", "changelog lost"]
    outputs: list[str] = []

    def rebuilt() -> bool:
        """The last worker's sign of life has to be 15 s old."""
        answer = CliRunner().invoke(app, words)
        outputs.append(answer.output)
        return answer.exit_code == 0 or "sign of life" not in answer.output

    until(rebuilt, "rebuilt")
    assert "the tables are written" in outputs[-1], outputs[-1]
    actions = [json.loads(entry.data["statement"])["action"] for entry in entries(stack, "operator") if entry.data]
    assert actions == ["replay dead letters", "rebuild state"], "what was refused, or only planned, is not there"
    fill(Engine(tmp_path / "clickhouse", "spendfuse"))
    run("audit", "rebuild", "--check")
    assert "--by" in run("audit", "rebuild", code=2)
    run("audit", "rebuild", *BY, "--reason", "a disk was restored")
    plan = retention.plan
    monkeypatch.setattr(retention, "plan", lambda database, days, _now: plan(database, days, FAR))
    run("audit", "retention", *BY)
    run("audit", "retention", "--apply", *BY, "--reason", "yearly")
    run("audit", "subject-key", "--out", "subject.key", "--kid", "2026")
    run("audit", "forget", "subject.key", *BY, "--reason", "asked to")

    told = said(stack, Verifier.parse(stack.public_keys))
    assert {action: (each["by"], each["reason"]) for action, each in told.items()} == {
        "replay dead letters": ("ada", "try it"),
        "rebuild state": ("ada", "changelog lost"),
        "rebuild rollups": ("ada", "a disk was restored"),
        "retention": ("ada", "yearly"),
        "forget": ("ada", "asked to"),
    }
    assert told["replay dead letters"]["offsets"] == [0]
    assert (told["rebuild state"]["from"], told["rebuild state"]["app_id"]) == ("ledger", "spendfuse")
    assert told["rebuild rollups"]["differing"] == 0
    assert told["retention"]["months"][0]["rows"] == 40


def fill(engine: Engine, upto: int = 0) -> None:
    """Make a trail of one batch; or only the first migrations of it."""
    database = open_embedded(engine)
    try:
        every = migrate.load_migrations()
        migrate.apply(database, [each for each in every if not upto or each.version <= upto])
        if not upto:
            collector = Collector(LEDGER.name, 0, 1, 1, {}, 100)
            assert collector.add(Message(0, 0, message([charge(nth, ts=START) for nth in range(40)])))
            trail.store(database, collector.seal())
    finally:
        database.close()


def test_an_upgrade_of_the_trail_is_on_the_ledger_by_hand_and_by_the_audit_process(
    stack: EmbeddedStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("audit", "migrate")
    assert said(stack, None) == {}, "a database that is new is no change of one"
    monkeypatch.setenv("SPENDFUSE_CHDB_DIR", str(tmp_path / "old"))
    fill(Engine(tmp_path / "old", "spendfuse"), upto=8)
    run("audit", "migrate", "--plan", code=1)
    assert said(stack, None) == {}
    run("audit", "migrate", *BY, "--reason", "version 2")

    (first,) = said(stack, Verifier.parse(stack.public_keys)).values()
    assert (first["action"], first["by"], first["reason"]) == ("migrate", "ada", "version 2")
    assert first["migrations"][0].startswith("0009_")
    fill(Engine(tmp_path / "older", "spendfuse"), upto=7)
    own = {name: value for name, value in os.environ.items() if not name.startswith("SPENDFUSE_")}
    env = {**own, **stack.env, "SPENDFUSE_CHDB_DIR": str(tmp_path / "older"), "SPENDFUSE_HTTP_PORT": "0"}
    with ChildProcess("audit", [sys.executable, "-m", "spendfuse.audit"], log_path=tmp_path / "audit.log", env=env):
        second = until(lambda: by_the_process(stack), "told")
    assert second["action"] == "migrate"
    assert second["migrations"][0].startswith("0008_")


def by_the_process(stack: EmbeddedStack) -> dict[str, Any]:
    found = said(stack, None).get("migrate", {})
    return found if found.get("by") == "spendfuse-audit" else {}
