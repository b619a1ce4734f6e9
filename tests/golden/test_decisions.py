"""Frozen decisions: scenarios in, commands and alerts out, as any language's port must give them.

`SPENDFUSE_GOLDEN_WRITE=1` writes the expectations anew; see `decisions/README.md`.
"""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from factories import calls
from spendfuse.engine.ids import SeenIds
from spendfuse.engine.meter import PartitionMeter
from spendfuse.engine.orders import Effects
from spendfuse.engine.policies import Policies
from spendfuse.engine.prices import PriceBook
from spendfuse.engine.rollup import apply_rollup, reconsider_shared
from spendfuse.engine.state import SharedState
from spendfuse.wire import Alert, Budget, Command, PackedUsage, PriceRow, Rollup
from spendfuse.wire.base import WireModel, to_us
from spendfuse.wire.control import CommandWindow

FOLDER = Path(__file__).parent / "decisions"
SCENARIOS = sorted(FOLDER.glob("*.json"))
WRITE = os.environ.get("SPENDFUSE_GOLDEN_WRITE") == "1"


def parsed(model: type[WireModel], value: Any) -> Any:
    """Return a message as a reader of its JSON would see it."""
    return model.model_validate_json(json.dumps(value))


def plain(messages: list[Any]) -> list[Any]:
    return [message.model_dump(mode="json", exclude_none=True) for message in messages]


class Play:
    """One deployment: meters by packed partition, and the shared scopes behind them."""

    def __init__(self, scenario: dict[str, Any]) -> None:
        rows = [parsed(PriceRow, row) for row in scenario["price_book"]["rows"]]
        self.book = PriceBook(version=scenario["price_book"]["version"], currency="USD", rows=rows)
        self.policies = Policies()
        self.meters: dict[int, PartitionMeter] = {}
        self.shared: dict[str, SharedState] = defaultdict(SharedState)
        self.steps = 0

    def take(self, step: dict[str, Any]) -> dict[str, Any]:
        """Take one step and return what it led to."""
        self.steps += 1
        now_us = to_us(parsed(CommandWindow, {"kind": "day", "label": "", "timezone": "", "start": step["now"]}).start)
        effects = Effects()
        if "budgets" in step:
            self.policies = Policies([parsed(Budget, each) for each in step["budgets"]])
            self._reconsider(effects, now_us)
        kinds: list[str] = []
        if "usages" in step:
            kinds = self._apply(step, effects, now_us)
        found = {
            "commands": plain(effects.commands),
            "shadow": plain(effects.shadow),
            "alerts": plain(effects.alerts),
            "ledger": kinds,
        }
        return {name: value for name, value in found.items() if value}

    def _apply(self, step: dict[str, Any], effects: Effects, now_us: int) -> list[str]:
        partition = step.get("packed_partition", 0)
        if partition not in self.meters:
            self.meters[partition] = PartitionMeter(partition, lambda _: None, SeenIds())
        meter = self.meters[partition]
        usages = [parsed(PackedUsage, each) for each in step["usages"]]
        outcome = meter.apply(calls(usages), self.policies, self.book, now_us)
        _gather(effects, outcome.effects)
        for scope in sorted(outcome.touched):
            rollup = meter.rollup(scope, self.steps, now_us)
            if rollup is not None:
                _, led = apply_rollup(
                    self.shared[scope],
                    Rollup.model_validate_json(rollup.model_dump_json()),
                    self.policies,
                    now_us=now_us,
                    price_book=self.book.version,
                )
                _gather(effects, led)
        return [entry.kind for entry in outcome.entries]

    def _reconsider(self, effects: Effects, now_us: int) -> None:
        for _, meter in sorted(self.meters.items()):
            for scope in sorted(scope for scope in meter.states if scope.startswith("agent:")):
                _gather(effects, meter.reconsider(scope, self.policies, self.book, now_us))
        for scope in sorted(self.shared):
            state = self.shared[scope]
            led = reconsider_shared(scope, state, self.policies, now_us=now_us, price_book=self.book.version)
            _gather(effects, led)


def _gather(into: Effects, effects: Effects | None) -> None:
    if effects is not None:
        into.commands += effects.commands
        into.shadow += effects.shadow
        into.alerts += effects.alerts


@pytest.mark.parametrize("path", SCENARIOS, ids=[path.stem for path in SCENARIOS])
def test_a_scenario_leads_to_the_decisions_it_always_led_to(path: Path) -> None:
    scenario = json.loads(path.read_text())
    play = Play(scenario)
    found = [play.take(step) for step in scenario["steps"]]
    if WRITE:
        for step, led in zip(scenario["steps"], found, strict=True):
            step["expected"] = led
        path.write_text(json.dumps(scenario, indent=1, ensure_ascii=False) + "\n")
        pytest.skip("SPENDFUSE_GOLDEN_WRITE=1: the expectations were written, not compared")
    for nth, (step, led) in enumerate(zip(scenario["steps"], found, strict=True)):
        assert led == step["expected"], f"step {nth} at {step['now']}"


def test_every_action_and_a_step_without_any_are_among_the_scenarios() -> None:
    """A golden file that expects nothing proves nothing."""
    scenarios = [json.loads(path.read_text())["steps"] for path in SCENARIOS]
    steps = [step for scenario in scenarios for step in scenario]
    commands = [command for step in steps for command in step["expected"].get("commands", [])]
    assert {command["action"] for command in commands} == {"warn", "degrade", "halt", "resume"}
    assert any(not step["expected"].get("commands") for step in steps)
    assert any(step["expected"].get("shadow") for step in steps)
    assert len(SCENARIOS) >= 12
    for scenario in scenarios:
        ids = [command["id"] for step in scenario for command in step["expected"].get("commands", [])]
        assert len(set(ids)) == len(ids)


def test_what_is_expected_is_valid_by_the_wire_models() -> None:
    for path in SCENARIOS:
        for step in json.loads(path.read_text())["steps"]:
            for name, model in (("commands", Command), ("shadow", Command), ("alerts", Alert)):
                for message in step["expected"].get(name, []):
                    try:
                        parsed(model, message)
                    except ValidationError as error:
                        pytest.fail(f"{path.name}: {error}")
