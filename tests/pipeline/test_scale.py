"""What a deployment writes, counted: the numbers that streams/README.md ("What it costs at scale") multiplies.

What is counted here does not depend on the machine: records and bytes that leave the stages of production for a load.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any, NamedTuple

import pytest

from pipeline.samples import BOOK, budget, cap
from spendfuse.engine.ids import IDS_PER_SLOT
from spendfuse.pipeline.routing import partition_of
from spendfuse.settings import WorkerSettings
from spendfuse.testing import PipelineDriver
from spendfuse.wire.topics import LEDGER, PACKED, ROLLUPS
from workers import ROOT

DIGEST_RECORD_BYTES = 22
SETTINGS = WorkerSettings.from_env({})
FLUSHES_PER_S = 1_000 / SETTINGS.flush_interval_ms
PUBLISHED_PER_S = 1_000 / SETTINGS.rollup_interval_ms
STREAM_PER_S = 6_000
"""Messages a second that one core takes through a Faust stream: 5,600 to 7,500 were measured on two shared cores."""
README = (ROOT / "streams" / "README.md").read_text()


class Written(NamedTuple):
    """Records and bytes by what they are, of one flush."""

    records: Counter[str]
    size: Counter[str]


def flush(agents: int, partitions: int, calls: int = 1, *, runs: int = 20, capped: bool = True) -> Written:
    """Return what one flush writes when each agent makes so many calls between two flushes."""
    caps = [budget("agent:*/*/*", cap(10**15, window="month"), name="a"),
            budget("workspace:*", cap(10**15, window="month"), name="w")]  # fmt: skip
    pipeline = PipelineDriver(budgets=caps if capped else (), price_book=BOOK, partitions=partitions, autoflush=False)
    before = state(pipeline)
    for call in range(calls):
        usages = [usage(pipeline, agent, call, runs) for agent in range(agents)]
        for start in range(0, agents, 500):
            pipeline.emit(usages[start : start + 500], partition=start // 500 % partitions)
    pipeline.flush()
    after = state(pipeline)
    return Written(after.records - before.records, after.size - before.size)


def state(pipeline: PipelineDriver) -> Written:
    found = Written(Counter(), Counter())
    for topic in (PACKED, ROLLUPS, LEDGER):
        for record in pipeline.records(topic.name):
            found.records[topic.name] += 1
            found.size[topic.name] += len(record.value or b"") + len(record.key or b"")
    for change in pipeline.changelog:
        found.records[change.table] += 1
        found.size[change.table] += len(change.key) + len(change.value or b"")
    return found


def usage(pipeline: PipelineDriver, agent: int, call: int, runs: int) -> Any:
    path = f"acme/team-{agent % 10}/agent-{agent}"
    run = f"0198c2f6-7d1e-7c3a-9f00-{agent % runs:012d}"
    return pipeline.usage(
        path, id=f"0198c2f6-7d1e-7c3a-9f{call:02d}-{agent:012d}", run=run, model="claude", input=1_200, output=300
    )


def homes(agents: int, partitions: int, runs: int) -> list[set[str]]:
    """Return the shared scopes of each packed partition, by plain arithmetic over the names."""
    found: list[set[str]] = [set() for _ in range(partitions)]
    for agent in range(agents):
        home = partition_of(f"acme/team-{agent % 10}/agent-{agent}", partitions)
        found[home] |= {"workspace", f"team {agent % 10}", f"run {agent % runs}"}
    return found


@pytest.mark.parametrize(("agents", "partitions", "runs"), [(40, 4, 5), (300, 16, 20), (1_000, 64, 20)])
def test_a_flush_writes_a_record_for_each_key_it_touched_and_a_share_for_each_shared_scope(
    agents: int, partitions: int, runs: int
) -> None:
    written = flush(agents, partitions, runs=runs).records
    shared = homes(agents, partitions, runs)
    shares = sum(len(scopes) for scopes in shared)
    assert written[ROLLUPS.name] == shares
    assert written["scopes"] == agents + shares
    assert written["ids"] == sum(1 for scopes in shared if scopes), "one slot of the ring for each partition in use"
    assert written["shared"] == 1 + 10 + runs if agents > 10 else len(set().union(*shared))


def test_a_hot_workspace_costs_partitions_and_flushes_and_not_usages() -> None:
    few, many = (flush(200, 8, calls=calls).records for calls in (1, 8))
    assert few[ROLLUPS.name] == many[ROLLUPS.name]
    assert few["scopes"] == many["scopes"]
    assert few["shared"] == many["shared"]


def test_the_ring_of_ids_is_written_a_slot_at_a_time() -> None:
    once = flush(500, 1)
    assert once.records["ids"] == 1
    assert once.size["ids"] == pytest.approx(500 * DIGEST_RECORD_BYTES, abs=16)
    assert flush(500, 1, calls=4).records["ids"] == math.ceil(2_000 / IDS_PER_SLOT)


def measured() -> dict[str, float]:
    """Return the bytes that the arithmetic is made of."""
    written = flush(1_000, 16)
    per = {name: written.size[name] / written.records[name] for name in (ROLLUPS.name, "scopes")}
    return {
        "packed usage, a usage": written.size[PACKED.name] / 1_000,
        "ledger, a usage": written.size[LEDGER.name] / 1_000,
        "share of a shared scope": per[ROLLUPS.name],
        "state of a scope": per["scopes"],
    }


def rows(columns: int) -> dict[str, list[float]]:
    """Return the numbers of the section's tables of so many columns, by what they are of."""
    section = README.partition("## What it costs at scale")[2].partition("\n## ")[0]
    found = {}
    for line in section.splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        cells = [cell.replace(",", "") for cell in cells]
        if len(cells) == columns and all(re.fullmatch(r"[\d.]+", cell) for cell in cells):
            found[name] = [float(cell) for cell in cells]
    return found


def test_the_bytes_in_the_readme_are_those_that_are_written() -> None:
    told = {name: numbers[0] for name, numbers in rows(1).items()}
    for name, size in measured().items():
        assert told[name] == pytest.approx(size, rel=0.1), f"{name}: {size:.0f} bytes; say so in streams/README.md"


def per_second(partitions: int, rate: int, sizes: dict[str, float]) -> dict[str, float]:
    """Return what a second of `rate` usages costs, in one workspace that has a cap, over so many partitions."""
    each = rate / partitions  # usages a second of one partition
    hot = partitions * min(PUBLISHED_PER_S, each)
    slots = partitions * min(FLUSHES_PER_S, each)
    slot_bytes = IDS_PER_SLOT / 2 * DIGEST_RECORD_BYTES  # half full on average
    return {
        "usages of a partition, a second": each,
        "shares of the hot workspace, a second": hot,
        "cores for that one scope": hot / STREAM_PER_S,
        "records of remembered ids, a second": slots,
        "MB of remembered ids, a second": slots * slot_bytes / 1e6,
        "MB of ledger, a second": rate * sizes["ledger, a usage"] / 1e6,
        "GB of ledger, a day": rate * sizes["ledger, a usage"] * 86_400 / 1e9,
    }


def test_the_arithmetic_in_the_readme_is_right() -> None:
    sizes = {name: numbers[0] for name, numbers in rows(1).items()}
    told = rows(3)
    for column, (partitions, rate) in enumerate([(16, 2_000), (64, 20_000), (1_000, 20_000)]):
        for name, number in per_second(partitions, rate, sizes).items():
            assert told[name][column] == pytest.approx(number, rel=0.03, abs=0.06), (name, partitions, number)


def test_the_interval_that_the_readme_advises_keeps_a_hot_workspace_within_one_core() -> None:
    for partitions in (64, 240, 1_000):
        interval_ms = max(SETTINGS.rollup_interval_ms, math.ceil(partitions / 6))
        assert partitions * 1_000 / interval_ms <= STREAM_PER_S
