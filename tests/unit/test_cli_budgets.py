"""`spendfuse budgets`: every mistake at once, and what applying a file would change."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from spendfuse.adapters.budget_file import parse, with_versions
from spendfuse.cli.app import app
from spendfuse.cli.budgets import Change, InForce, difference
from spendfuse.client.follow import Record
from spendfuse.wire.base import encode

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result

GOOD = """version: 1
workspaces:
  acme: {timezone: Europe/Amsterdam}
budgets:
  - id: research
    scope: agent:acme/research/*
    caps: [{amount: 50 USD, window: day, warn: [80%]}]
  - id: whole
    scope: workspace:acme
    caps: [{amount: 5M tokens, window: month}]
"""
BAD = """version: 1
budgets:
  - id: research
    scope: agent:acme/research/*
    caps:
      - amount: 50,00 USD
        window: fortnight
  - id: research
    scope: nobody
    limits: []
"""


def invoke(*words: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(words), input=stdin)


def record(key: str, value: bytes | None) -> Record:
    return Record("spendfuse.budgets.v1", 0, 0, 0, key.encode(), value)


def in_force(text: str) -> InForce:
    found, state = parse(text, name="before"), InForce()
    for settings in found.workspaces:
        state.on_record(record(f"workspace/{settings.workspace}", encode(settings)))
    for budget in found.budgets:
        state.on_record(record(budget.id, encode(budget)))
    return state


def changes(text: str, state: InForce, *, prune: bool = False) -> tuple[list[Change], list[tuple[str, Any]]]:
    found = parse(text, name="after", zones=state.zones)
    wanted = with_versions(found.budgets, state.budgets)
    return difference(wanted, found.workspaces, state, prune=prune)


def test_all_mistakes_of_a_file_are_said_at_once_with_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(BAD, encoding="utf-8")
    result = invoke("budgets", "check", str(file))
    assert result.exit_code == 64
    lines = {int(line.split(":")[1]) for line in result.stderr.splitlines() if line.strip().startswith(str(file))}
    assert {6, 7, 8, 9, 10} <= lines
    assert result.stdout == ""


def test_the_mistakes_as_json_say_the_same(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(BAD, encoding="utf-8")
    result = invoke("budgets", "check", str(file), "--json")
    assert result.exit_code == 64
    said = json.loads(result.stdout)
    assert said["ok"] is False
    assert {6, 7, 8, 9, 10} <= {fault["line"] for fault in said["faults"]}


def test_a_good_file_from_standard_input_is_listed() -> None:
    result = invoke("budgets", "check", "-", stdin=GOOD)
    assert result.exit_code == 0
    assert "50 USD a day" in result.stdout
    assert "2 budgets, 1 workspaces, no mistakes" in result.stdout


def test_a_first_apply_publishes_everything_workspaces_first() -> None:
    found, records = changes(GOOD, InForce())
    assert [(change.state, change.key) for change in found] == [
        ("new", "workspace/acme"), ("new", "research"), ("new", "whole"),
    ]  # fmt: skip
    assert [key for key, _ in records] == ["workspace/acme", "research", "whole"]


def test_applying_the_same_file_again_publishes_nothing() -> None:
    found, records = changes(GOOD, in_force(GOOD))
    assert {change.state for change in found} == {"unchanged"}
    assert records == []


def test_a_changed_cap_is_published_with_the_next_version_and_nothing_else() -> None:
    found, records = changes(GOOD.replace("50 USD", "60 USD"), in_force(GOOD))
    assert [(change.state, change.key) for change in found if change.state != "unchanged"] == [("changed", "research")]
    ((key, budget),) = records
    assert (key, budget.version, budget.caps[0].amount) == ("research", 2, 60 * 10**9)
    assert "caps" in next(change.what for change in found if change.key == "research")


@pytest.mark.parametrize(
    ("prune", "state", "published"), [(False, "not in the file", []), (True, "withdrawn", ["whole"])]
)
def test_a_budget_that_the_file_lacks_is_withdrawn_only_when_asked(
    prune: bool, state: str, published: list[str]
) -> None:
    without = GOOD[: GOOD.index("  - id: whole")]
    found, records = changes(without, in_force(GOOD), prune=prune)
    assert [change.key for change in found if change.state == state] == ["whole"]
    assert [key for key, value in records if value is None] == published


def test_a_tombstone_ends_a_budget_and_bytes_that_are_none_are_counted() -> None:
    state = in_force(GOOD)
    state.on_record(record("whole", None))
    state.on_record(record("research", b"\xff{"))
    assert set(state.budgets) == {"research"}
    assert state.unreadable == 1
