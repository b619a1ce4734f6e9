"""Corrections: signed, applied once, into the window of the usage they correct; they free and they stop."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.samples import BOOK, INPUT_NANOS, OUTPUT_NANOS, budget, call, cap
from pipeline.test_rebuild import check_same_tables, put_in, rebuilt_for_another_kafka, rebuilt_from_ledger
from spendfuse.client.keys import Signer, generate
from spendfuse.testing import PipelineDriver
from spendfuse.wire import encode
from spendfuse.wire.correction import Correction, TokenDifferences
from spendfuse.wire.signing import SIGNATURE_HEADER
from spendfuse.wire.topics import COMMANDS, LEDGER, PACKED, USAGE

WORKER, _ = generate("worker")
OPERATOR, OPERATOR_PUBLIC = generate("operator")
STRANGER, _ = generate("stranger")
AGENT = "agent:acme/research/planner"
TEAM = "team:acme/research"
SCOPES = (AGENT, TEAM, "workspace:acme", "run:acme/run-planner")


def driver(*budgets: Any, **more: Any) -> PipelineDriver:
    keys = {"signing_key": WORKER, "public_keys": OPERATOR_PUBLIC}
    return PipelineDriver(budgets=budgets, price_book=BOOK, **(keys | more))


def totals(pipeline: PipelineDriver, window: str = "day") -> list[tuple[int, int, int]]:
    pipeline.flush()
    return [tuple(pipeline.spend(scope, "run" if scope.startswith("run:") else window)) for scope in SCOPES]


def correction(pipeline: PipelineDriver, usage: Any, name: str = "fix-1", **more: Any) -> Correction:
    values = {
        "type": "correction", "id": name, "usage_id": usage.id, "ts": usage.ts, "at": pipeline.now,
        "workspace": usage.workspace, "team": usage.team, "agent": usage.agent, "run": usage.run,
        "provider": usage.provider, "model": usage.model, "currency": "USD", "reason": "invoice", "by": "ada",
        "tokens": TokenDifferences(output=-1), "cost_nanos": -OUTPUT_NANOS,
    }  # fmt: skip
    return Correction(**(values | more))


def put(pipeline: PipelineDriver, message: Correction, key: str | None, *, topic: str = USAGE.name) -> None:
    """Write a correction to `usage.v1`, signed for a topic with a key, or not at all."""
    path, value = message.agent_path.encode(), encode(message)
    headers = [] if key is None else [(SIGNATURE_HEADER, Signer.parse(key).sign(topic, path, value))]
    pipeline.put(USAGE.name, value, key=path, headers=headers)


def test_a_usage_and_its_correction_are_the_corrected_usage_in_every_scope() -> None:
    corrected, plain = driver(), driver()
    usage = call(corrected, input=10, output=100)
    corrected.emit(usage)
    corrected.correct(usage, "fix-1", input=5, output=-40, cost_nanos=5 * INPUT_NANOS - 40 * OUTPUT_NANOS)
    plain.emit(call(plain, input=15, output=60))
    assert totals(corrected) == totals(plain)
    assert totals(corrected)[0] == (15 * INPUT_NANOS + 60 * OUTPUT_NANOS, 75, 1)


def test_the_ledger_has_the_correction_as_an_entry_of_its_own_and_the_charge_as_it_was() -> None:
    pipeline = driver()
    usage = call(pipeline, output=100)
    pipeline.emit(usage)
    pipeline.correct(usage, "fix-1", output=-40, cost_nanos=-40 * OUTPUT_NANOS)
    entries = [entry for entry in pipeline.ledger() if entry.kind in ("charge", "correction")]
    assert [entry.kind for entry in entries] == ["charge", "correction"]
    assert entries[0].charge is not None
    assert entries[0].charge.cost_nanos == 100 * OUTPUT_NANOS
    assert entries[1].correction is not None
    assert (entries[1].correction.usage_id, entries[1].correction.cost_nanos) == (usage.id, -40 * OUTPUT_NANOS)
    assert entries[1].topic == USAGE.name


@pytest.mark.parametrize(("scope", "pattern"), [(AGENT, "agent:acme/*/*"), (TEAM, "team:acme/*")])
def test_a_correction_that_brings_a_scope_below_its_cap_resumes_it_and_says_why(scope: str, pattern: str) -> None:
    pipeline = driver(budget(pattern, cap(100 * OUTPUT_NANOS)))
    usage = call(pipeline, output=100)
    pipeline.emit(usage)
    assert [command.action for command in pipeline.commands()] == ["halt"]
    pipeline.correct(usage, "fix-1", output=-1, cost_nanos=-OUTPUT_NANOS)
    halt, resume = pipeline.commands()
    assert (resume.action, resume.scope, resume.reason) == ("resume", scope, "spend was corrected")
    assert resume.seq > halt.seq
    assert resume.cause is not None
    assert resume.cause.usage_id == usage.id
    pipeline.emit(call(pipeline, output=1))
    assert [command.action for command in pipeline.commands()] == ["halt", "resume", "halt"]


@pytest.mark.parametrize("pattern", ["agent:acme/*/*", "team:acme/*"])
def test_a_correction_that_leaves_a_scope_at_its_cap_resumes_nobody(pattern: str) -> None:
    pipeline = driver(budget(pattern, cap(100 * OUTPUT_NANOS)))
    usage = call(pipeline, output=101)
    pipeline.emit(usage)
    pipeline.correct(usage, "fix-1", output=-1, cost_nanos=-OUTPUT_NANOS)
    assert [command.action for command in pipeline.commands()] == ["halt"]


@pytest.mark.parametrize("pattern", ["agent:acme/*/*", "team:acme/*"])
def test_a_correction_that_raises_a_scope_to_its_cap_halts_it(pattern: str) -> None:
    pipeline = driver(budget(pattern, cap(100 * OUTPUT_NANOS)))
    usage = call(pipeline, output=99)
    pipeline.emit(usage)
    pipeline.correct(usage, "fix-1", output=1, cost_nanos=OUTPUT_NANOS)
    (halt,) = pipeline.commands()
    assert halt.action == "halt"
    assert halt.measure is not None
    assert halt.measure.spend == 100 * OUTPUT_NANOS
    assert halt.cause is not None
    assert halt.cause.usage_id == usage.id


def test_a_correction_of_yesterday_changes_nothing_of_today() -> None:
    pipeline = driver(budget("agent:acme/*/*", cap(100 * OUTPUT_NANOS)))
    usage = call(pipeline, output=50)
    pipeline.emit(usage)
    pipeline.advance(hours=24)
    pipeline.emit(call(pipeline, output=100))
    pipeline.correct(usage, "fix-1", output=-50, cost_nanos=-50 * OUTPUT_NANOS)
    assert [command.action for command in pipeline.commands()] == ["halt"]
    assert pipeline.spend(AGENT).nanos == 100 * OUTPUT_NANOS
    assert pipeline.spend(AGENT, "month").nanos == 100 * OUTPUT_NANOS


def test_the_same_correction_written_twice_is_applied_once_and_the_other_is_a_dead_letter() -> None:
    pipeline = driver()
    usage = call(pipeline, output=100)
    pipeline.emit(usage)
    for _ in range(2):
        pipeline.correct(usage, "fix-1", output=-40, cost_nanos=-40 * OUTPUT_NANOS)
    assert pipeline.spend(AGENT).nanos == 60 * OUTPUT_NANOS
    (letter,) = pipeline.dead_letters()
    assert letter.reason.startswith("correction: duplicate: correction fix-1 was applied from")
    assert (letter.topic, letter.offset) == (USAGE.name, 2)
    assert sum(entry.kind == "correction" for entry in pipeline.ledger()) == 1


def test_a_signed_correction_that_is_copied_after_many_usages_is_still_refused() -> None:
    """Ids of usages are forgotten beyond a horizon; those of corrections are not: a copy would free a stopped agent."""
    pipeline = driver(partitions=1)
    usage = call(pipeline, output=100)
    pipeline.emit(usage)
    message = correction(pipeline, usage)
    put(pipeline, message, OPERATOR)
    pipeline._meter._pending(0).meter.seen.origins.clear()
    pipeline.crash()
    put(pipeline, message, OPERATOR)
    pipeline.advance(days=8)
    put(pipeline, message, OPERATOR)
    assert pipeline.spend(AGENT, "month").nanos == 99 * OUTPUT_NANOS
    assert [letter.reason.split(":")[1].strip() for letter in pipeline.dead_letters()] == ["duplicate", "at"]


@pytest.mark.parametrize(
    ("key", "topic", "reason"),
    [(None, USAGE.name, "unsigned"), (STRANGER, USAGE.name, "signature"), (WORKER, COMMANDS.name, "signature")],
    ids=["unsigned", "signed by a stranger", "signed for another topic"],
)
def test_what_no_operator_has_signed_changes_nothing_and_is_told(key: str | None, topic: str, reason: str) -> None:
    pipeline = driver(budget("agent:acme/*/*", cap(100 * OUTPUT_NANOS)))
    usage = call(pipeline, output=100)
    pipeline.emit(usage)
    before = totals(pipeline)
    put(pipeline, correction(pipeline, usage), key, topic=topic)
    assert totals(pipeline) == before
    assert [command.action for command in pipeline.commands()] == ["halt"]
    (letter,) = pipeline.dead_letters()
    assert letter.reason.startswith(f"correction: {reason}: ")
    assert letter.topic == USAGE.name
    assert [entry.kind for entry in pipeline.ledger() if entry.kind in ("correction", "rejected")] == ["rejected"]


def test_a_correction_signed_by_an_operators_key_is_applied() -> None:
    pipeline = driver()
    usage = call(pipeline, output=100)
    pipeline.emit(usage)
    put(pipeline, correction(pipeline, usage), OPERATOR)
    assert pipeline.spend(AGENT).nanos == 99 * OUTPUT_NANOS


def test_a_correction_under_another_agents_key_is_refused() -> None:
    pipeline = driver()
    usage = call(pipeline, output=100)
    pipeline.emit(usage)
    value = encode(correction(pipeline, usage))
    headers = [(SIGNATURE_HEADER, Signer.parse(OPERATOR).sign(USAGE.name, b"acme/research/other", value))]
    pipeline.put(USAGE.name, value, key=b"acme/research/other", headers=headers)
    assert pipeline.spend(AGENT).nanos == 100 * OUTPUT_NANOS
    assert pipeline.dead_letters()[0].reason.startswith("correction: key: ")


def test_a_correction_in_another_currency_is_refused() -> None:
    pipeline = driver()
    usage = call(pipeline, output=100)
    pipeline.emit(usage)
    pipeline.correct(usage, "fix-1", cost_nanos=-1, currency="EUR")
    assert pipeline.spend(AGENT).nanos == 100 * OUTPUT_NANOS
    assert "currency: EUR is not USD" in pipeline.dead_letters()[0].reason


def test_a_correction_that_takes_more_than_was_charged_counts_as_zero_and_raises_an_alert() -> None:
    pipeline = driver()
    usage = call(pipeline, output=100)
    pipeline.emit(usage)
    pipeline.correct(usage, "fix-1", output=-150, cost_nanos=-150 * OUTPUT_NANOS)
    assert [row[:2] for row in totals(pipeline)] == [(0, 0)] * 4
    (alert,) = [alert for alert in pipeline.alerts() if alert.kind == "correction"]
    assert (alert.scope, alert.usage_id) == (AGENT, usage.id)
    pipeline.emit(call(pipeline, output=60))
    assert pipeline.spend(AGENT).nanos == 10 * OUTPUT_NANOS  # the signed sum is what was kept


def test_after_a_crash_at_any_record_a_correction_is_in_every_sum_once() -> None:
    for records in range(40):
        pipeline = driver(budget("team:acme/*", cap(100 * OUTPUT_NANOS)), autoflush=False)
        usage = call(pipeline, output=100)
        pipeline.emit(usage)
        pipeline.flush()
        pipeline.crash(after_records=records)
        pipeline.correct(usage, "fix-1", output=-40, cost_nanos=-40 * OUTPUT_NANOS)
        pipeline.flush()
        pipeline.crash()
        assert totals(pipeline) == [(60 * OUTPUT_NANOS, 60, 1)] * 4, f"killed after {records} records"
        assert [command.action for command in pipeline.commands()][-1] == "resume"
        assert sum(entry.kind == "correction" for entry in pipeline.ledger()) == 1


def test_packed_messages_hold_usages_or_corrections_and_keep_the_order_of_their_offsets() -> None:
    pipeline = driver(partitions=1, autoflush=False)
    usage = call(pipeline, output=10)
    pipeline.emit(usage)
    pipeline.correct(usage, "fix-1", output=-1, cost_nanos=-OUTPUT_NANOS)
    pipeline.emit(call(pipeline, output=10))
    pipeline.flush()
    values = [record.value or b"" for record in pipeline.records(PACKED.name)]
    assert [b'"corrections"' in value for value in values] == [False, True, False]
    assert pipeline.spend(AGENT).nanos == 19 * OUTPUT_NANOS
    assert pipeline.records(LEDGER.name)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_order_split_or_repetition_of_usages_and_corrections_changes_the_totals(data: st.DataObject) -> None:
    calls = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=4), label="output tokens")
    fixes = data.draw(
        st.lists(st.tuples(st.integers(0, len(calls) - 1), st.integers(-50, 50).filter(bool)), max_size=5),
        label="(nth call, difference)",
    )
    pipeline = driver(partitions=2, autoflush=False)
    usages = [call(pipeline, output=tokens) for tokens in calls]
    steps = [("usage", nth) for nth in range(len(calls))] + [("fix", nth) for nth in range(len(fixes))]
    order = data.draw(st.permutations(steps), label="order")
    again = data.draw(st.lists(st.sampled_from(steps), max_size=4), label="again")
    for what, nth in [*order, *again]:
        if what == "usage":
            pipeline.emit(usages[nth])
        else:
            of, tokens = fixes[nth]
            pipeline.correct(usages[of], f"fix-{nth}", output=tokens, cost_nanos=tokens * OUTPUT_NANOS)
        if data.draw(st.booleans(), label="crash"):
            pipeline.crash()
    tokens = sum(calls) + sum(difference for _, difference in fixes)
    assert totals(pipeline) == [(max(tokens, 0) * OUTPUT_NANOS, max(tokens, 0), len(calls))] * 4


def corrected_pipeline() -> tuple[PipelineDriver, Any]:
    """A team that was halted, and resumed by a correction of one of its two calls."""
    pipeline = driver(budget("team:acme/*", cap(150 * OUTPUT_NANOS)))
    usage = call(pipeline, output=100)
    pipeline.emit(usage)
    pipeline.emit(call(pipeline, "acme/research/other", output=60))
    pipeline.advance(minutes=5)
    pipeline.correct(usage, "fix-1", output=-40, cost_nanos=-40 * OUTPUT_NANOS)
    assert [command.action for command in pipeline.commands()] == ["halt", "resume"]
    return pipeline, usage


def test_tables_rebuilt_from_the_ledger_have_its_corrections_and_know_them_again() -> None:
    pipeline, usage = corrected_pipeline()
    rebuilt = rebuilt_from_ledger(pipeline)
    check_same_tables(pipeline, rebuilt)
    put_in(pipeline, rebuilt)
    pipeline.correct(usage, "fix-1", output=-40, cost_nanos=-40 * OUTPUT_NANOS)
    assert pipeline.spend(TEAM) == (120 * OUTPUT_NANOS, 120, 2)
    assert pipeline.dead_letters()[0].reason.startswith("correction: duplicate")


def test_a_new_kafka_takes_the_corrections_of_the_trail_over_and_refuses_them_from_a_spool() -> None:
    old, usage = corrected_pipeline()
    new = driver(start=old.now_us)
    put_in(new, rebuilt_for_another_kafka(old, new))
    assert new.spend(TEAM) == (120 * OUTPUT_NANOS, 120, 2)
    new.correct(usage, "fix-1", output=-40, cost_nanos=-40 * OUTPUT_NANOS)
    assert new.spend(TEAM) == (120 * OUTPUT_NANOS, 120, 2)
    assert new.dead_letters()[0].reason.startswith("correction: duplicate")
