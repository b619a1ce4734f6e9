"""A run tree: the root run's cap covers every subagent below it, and its halt reaches all of them and nobody else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pipeline.samples import OUTPUT_NANOS, budget, call, cap, driver
from spendfuse.client.identity import Identity
from spendfuse.client.obey import Obedience
from spendfuse.settings import IdentitySettings
from spendfuse.wire.topics import PACKED

if TYPE_CHECKING:
    from spendfuse.testing import PipelineDriver

SUBAGENTS = 23
TREE = "run:acme/weekend"


def subagent(nth: int) -> tuple[str, str]:
    """A team and an agent of the tree: of three teams."""
    return f"team-{nth % 3}", f"sub-{nth}"


def spend_one_each(pipeline: PipelineDriver, numbers: range) -> None:
    for nth in numbers:
        team, agent = subagent(nth)
        pipeline.emit(call(pipeline, f"acme/{team}/{agent}", run=f"leaf-{nth}", root_run="weekend", input=0, output=1))


def is_halted(pipeline: PipelineDriver, team: str, agent: str, run: str, root_run: str) -> bool:
    """What a guard of that agent makes of the commands."""
    names = IdentitySettings(workspace="acme", team=team, agent=agent, run=run, root_run=root_run)
    obedience = Obedience(Identity.of(names).scopes)
    for command in pipeline.commands():
        obedience.apply(command)
    return obedience.strictest(pipeline.now_us).halt is not None


@pytest.mark.parametrize("partitions", [1, 4, 16])
def test_a_root_runs_cap_covers_all_subagents_across_teams_and_partitions(partitions: int) -> None:
    runs = budget("run:acme/*", cap(SUBAGENTS * OUTPUT_NANOS, window="run"))
    pipeline = driver(runs, partitions=partitions)
    spend_one_each(pipeline, range(SUBAGENTS - 1))
    assert pipeline.commands() == [], "one call below the cap"
    used = {record.partition for record in pipeline.records(PACKED.name)}
    assert len(used) > 1 or partitions == 1, "the subagents lie on several partitions"
    spend_one_each(pipeline, range(SUBAGENTS - 1, SUBAGENTS))
    assert [(command.action, command.scope) for command in pipeline.commands()] == [("halt", TREE)]
    for nth in range(SUBAGENTS):
        assert is_halted(pipeline, *subagent(nth), f"leaf-{nth}", "weekend")
    assert is_halted(pipeline, "team-9", "one-that-comes-later", "leaf-99", "weekend")
    assert not is_halted(pipeline, *subagent(0), "leaf-0", "another-weekend"), "the same agent in another tree goes on"
    assert not is_halted(pipeline, *subagent(0), "leaf-0", ""), "a run of its own is no part of the tree"


def test_calls_in_flight_of_subagents_count_in_the_tree() -> None:
    pipeline = driver(budget("run:acme/*", cap(10, unit="tokens", window="run")))
    for nth in range(2):
        team, agent = subagent(nth)
        started = call(
            pipeline, f"acme/{team}/{agent}", run=f"leaf-{nth}", root_run="weekend", kind="started", id=f"c{nth}",
            input=0, output=5,
        )  # fmt: skip
        pipeline.emit(started)
    assert [(command.action, command.scope) for command in pipeline.commands()] == [("halt", TREE)]
    assert pipeline.commands()[0].measure is not None
    assert (pipeline.commands()[0].measure.spend, pipeline.commands()[0].measure.committed) == (0, 10)
