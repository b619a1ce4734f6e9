"""The oracle of the chaos runs finds a difference of one nano, of one call, of one command: else it proves nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from chaos.chaos import Span, waits_alone
from chaos.oracle import Topics, judge
from pipeline.samples import BOOK, budget, call, cap, driver
from spendfuse.wire import encode

if TYPE_CHECKING:
    from chaos.oracle import Record

NAMES = ("usage", "budgets", "commands", "ledger", "rollups")


@pytest.fixture(scope="module")
def topics() -> Topics:
    pipeline = driver(
        budget("agent:acme/*/*", cap(40, unit="tokens", window="month"), name="agents"),
        budget("team:acme/research", cap(300_000, window="day"), name="team"),
        start=1_795_392_000_000_000,
    )
    for number in range(20):
        one = call(pipeline, f"acme/research/a{number % 3}", input=number, output=1)
        pipeline.emit(one, partition=number % 4)
        if number % 6 == 0:
            pipeline.emit(one, partition=(number + 1) % 4)
        if number % 5 == 1:  # upwards, so that what has halted must still have
            pipeline.correct(one, f"fix-{number}", output=2, cost_nanos=7)
            pipeline.correct(one, f"fix-{number}", output=2, cost_nanos=7)
    pipeline.emit(b"junk")
    found = {
        name: [
            (record.partition, record.offset, record.key, record.value)
            for record in pipeline.records(f"spendfuse.{name}.v1")
        ]
        for name in NAMES
    }
    changelogs: dict[str, list[Record]] = {
        table: [
            (record.partition, nth, record.key, record.value)
            for nth, record in enumerate(pipeline.changelog)
            if record.table == table
        ]
        for table in ("scopes", "shared")
    }
    return Topics(**found, **changelogs)


def test_it_agrees_with_an_undisturbed_pipeline(topics: Topics) -> None:
    verdict = judge(topics, encode(BOOK))
    assert verdict.differences == []
    assert (verdict.truth.calls, verdict.truth.duplicates, verdict.truth.junk) == (20, 4, 1)
    assert verdict.halts == 4, "three agents and the team"


@pytest.mark.parametrize("field", ["usage", "ledger", "rollups", "scopes", "shared", "commands"])
def test_a_lost_record_of_any_topic_is_a_difference(topics: Topics, field: str) -> None:
    records = [record for record in getattr(topics, field) if record[3] != b"junk"]
    last = len(records) - 1
    if field == "usage":  # the last may be a duplicate: take a record whose call came once
        ids = [json.loads(record[3] or b"{}")["id"] for record in records]
        last = next(nth for nth, name in enumerate(ids) if ids.count(name) == 1)
    broken = replace(topics, **{field: records[:last] + records[last + 1 :]})
    assert judge(broken, encode(BOOK)).differences != []


def test_a_single_nano_in_clickhouse_is_a_difference(topics: Topics) -> None:
    truth = judge(topics, encode(BOOK)).truth
    rows = [
        [scope.removeprefix("agent:"), *map(str, next(v for k, v in sums.items() if k.startswith("month")))]
        for scope, sums in truth.sums.items()
        if scope.startswith("agent:")
    ]
    assert judge(topics, encode(BOOK), rows).differences == []
    rows[0][1] = str(int(rows[0][1]) + 1)
    assert len(judge(topics, encode(BOOK), rows).differences) == 1
    assert len(judge(topics, encode(BOOK), rows[1:]).differences) == 1


def test_a_wait_is_laid_at_the_door_of_a_fault_that_has_no_other_beside_it() -> None:
    spans = [Span("kill", 0.0, 9.0), Span("restart", 20.0, 25.0), Span("kill", 24.0, 30.0), Span("restart", 40.0, 41.0)]
    waits = [(1.0, 8.0), (8.5, 10.0), (21.0, 26.0), (40.5, 40.9), (50.0, 90.0)]
    assert waits_alone(spans, waits) == {"kill": [7.0], "restart": [pytest.approx(0.4)]}
