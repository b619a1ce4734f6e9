"""Looking for calls that were charged twice, part by part: every agent is in one part, and no part is too large."""

from __future__ import annotations

import random
from typing import Any

import pytest

from spendfuse.audit import reports

BOUND = 100


def agents(seed: int) -> list[dict[str, Any]]:
    """Agents in the order rows lie in, some with more calls than one part may have."""
    dice = random.Random(seed)  # noqa: S311 - the same dice in every run
    return [
        {"workspace": f"w{w}", "team": f"t{t}", "agent": f"a{a}", "calls": dice.choice([1, 5, 40, 99, 100, 101, 950])}
        for w in range(3)
        for t in range(dice.randint(1, 6))
        for a in range(dice.randint(1, 9))
    ]


def covers(part: dict[str, str], row: dict[str, Any]) -> bool:
    """As the query says it."""
    return (
        row["workspace"] == part["workspace"]
        and part["team_from"] <= row["team"] <= part["team_to"]
        and (part["agent_to"] == "" or part["agent_from"] <= row["agent"] <= part["agent_to"])
    )


@pytest.mark.parametrize("seed", range(60))
def test_every_agent_is_in_one_part_and_a_part_of_several_is_never_too_large(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reports, "CALLS_PER_SHARD", BOUND)
    rows = agents(seed)
    parts = list(reports._parts(rows))
    for row in rows:
        assert sum(covers(part, row) for part, _ in parts) == 1, row
    for part, calls in parts:
        inside = [row for row in rows if covers(part, row)]
        assert calls == sum(row["calls"] for row in inside)
        assert calls <= BOUND or len(inside) == 1
