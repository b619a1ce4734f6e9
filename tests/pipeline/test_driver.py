"""The topology of production without a broker: what a user of spendfuse may rely on, and may test the same way."""

from __future__ import annotations

import doctest
import json
from datetime import UTC, datetime, timedelta

import pytest

from pipeline.samples import BOOK, DEAR_NANOS, DOLLAR, INPUT_NANOS, OUTPUT_NANOS, budget, call, cap, driver, rates
from spendfuse.client.keys import BadSignature, Verifier, generate
from spendfuse.testing import PipelineDriver, SpendRow
from spendfuse.testing import driver as driver_module
from spendfuse.wire import Ack, PriceOverride, PriceRow, Tokens, WindowSpec, WorkspaceSettings, encode
from spendfuse.wire.budget import DegradeRule
from spendfuse.wire.topics import ACKS, COMMANDS, PACKED

PLANNER = "agent:acme/research/planner"


def test_the_example_in_the_docstring_runs() -> None:
    assert doctest.testmod(driver_module).attempted >= 7
    assert doctest.testmod(driver_module).failed == 0


def test_a_usage_costs_its_tokens_at_the_books_rates() -> None:
    pipeline = driver()
    pipeline.emit(call(pipeline, input=1_000, output=200))
    assert pipeline.spend(PLANNER) == SpendRow(1_000 * INPUT_NANOS + 200 * OUTPUT_NANOS, 1_200, 1)
    (entry,) = pipeline.ledger()
    assert entry.kind == "charge"
    assert entry.charge.cost_nanos == 1_000 * INPUT_NANOS + 200 * OUTPUT_NANOS
    assert entry.charge.price_book.startswith("test+")


@pytest.mark.parametrize("partitions", [1, 3, 8])
def test_single_and_packed_usage_of_any_key_and_partition_add_up(partitions: int) -> None:
    pipeline = driver(partitions=partitions)
    agents = [f"acme/research/a{n}" for n in range(6)]
    for partition in range(partitions):
        for key in (None, b"", b"\xff\xfe no path", b"acme/research/a0"):
            pipeline.emit(call(pipeline, agents[0], input=7), partition=partition, key=key)
            pipeline.emit([call(pipeline, agent, input=1) for agent in agents], partition=partition, key=key)
    assert pipeline.spend(f"agent:{agents[0]}") == SpendRow(
        32 * partitions * INPUT_NANOS, 32 * partitions, 8 * partitions
    )
    for agent in agents[1:]:
        assert pipeline.spend(f"agent:{agent}") == SpendRow(
            4 * partitions * INPUT_NANOS, 4 * partitions, 4 * partitions
        )
    assert pipeline.spend("team:acme/research").tokens == (28 + 24) * partitions
    assert not pipeline.dead_letters()


def test_one_agent_is_always_on_one_packed_partition() -> None:
    pipeline = driver()
    for partition in range(4):
        for number in range(20):
            pipeline.emit(call(pipeline, f"acme/t/a{number}", input=1), partition=partition)
    homes: dict[str, set[int]] = {}
    for record in pipeline.records(PACKED.name):
        for packed in json.loads(record.value)["usages"]:
            homes.setdefault(packed["u"]["agent"], set()).add(record.partition)
    assert len(homes) == 20
    assert all(len(partitions) == 1 for partitions in homes.values())
    assert len(set.union(*homes.values())) == 4


def test_a_currency_cap_halts_at_the_usage_that_reaches_it_and_not_before() -> None:
    pipeline = driver(budget("agent:acme/*/*", cap(100 * INPUT_NANOS, warn=[5_000])))
    pipeline.emit(call(pipeline, input=49))
    assert pipeline.commands() == []
    pipeline.emit(call(pipeline, input=1))
    assert [command.action for command in pipeline.commands()] == ["warn"]
    pipeline.emit(call(pipeline, input=49))
    assert len(pipeline.commands()) == 1
    pipeline.emit(call(pipeline, id="the-one", input=1))
    warn, halt = pipeline.commands()
    assert (halt.action, halt.scope, halt.cause.usage_id) == ("halt", PLANNER, "the-one")
    assert (halt.measure.spend, halt.measure.cap) == (100 * INPUT_NANOS, 100 * INPUT_NANOS)
    assert halt.expires_at == datetime(2026, 1, 6, tzinfo=UTC)
    assert halt.seq > warn.seq
    pipeline.emit(call(pipeline, input=1_000))
    assert len(pipeline.commands()) == 2, "more spend says nothing new"
    assert [alert.kind for alert in pipeline.alerts()] == ["warn", "halt"]
    assert {entry.kind for entry in pipeline.ledger()} == {"budget", "charge", "command", "alert"}


def test_a_token_cap_counts_tokens_whatever_they_cost() -> None:
    pipeline = driver(budget("agent:acme/*/*", cap(1_000, unit="tokens", window="hour")))
    pipeline.emit(call(pipeline, input=500, output=499))
    assert pipeline.commands() == []
    pipeline.emit(call(pipeline, output=1))
    (halt,) = pipeline.commands()
    assert (halt.action, halt.measure.unit, halt.measure.spend) == ("halt", "tokens", 1_000)
    pipeline.advance(hours=1)
    pipeline.emit(call(pipeline, input=1_000))
    assert len(pipeline.commands()) == 2, "a new hour is a new window"


@pytest.mark.parametrize(
    ("scope", "sharer"),
    [
        ("team:acme/research", {"agent": "acme/research/writer"}),
        ("workspace:acme", {"agent": "acme/sales/caller"}),
        ("run:acme/tree-1", {"agent": "acme/sales/caller", "run": "leaf", "root_run": "tree-1"}),
    ],
)
def test_a_shared_cap_counts_what_its_members_spend_together(scope: str, sharer: dict[str, str]) -> None:
    window = "run" if scope.startswith("run") else "day"
    pipeline = driver(budget(scope, cap(10 * INPUT_NANOS, window=window)))
    pipeline.emit(call(pipeline, "acme/research/planner", run="tree-1", input=6))
    assert pipeline.commands() == []
    pipeline.emit(call(pipeline, **sharer, input=4))
    (halt,) = pipeline.commands()
    assert (halt.action, halt.scope, halt.measure.spend) == ("halt", scope, 10 * INPUT_NANOS)
    assert pipeline.spend(scope, window) == SpendRow(10 * INPUT_NANOS, 10, 2)
    (row,) = pipeline.wallet()
    assert (row.scope, row.state, row.used) == (scope, "tripped", 10_000)


def test_a_budget_applied_in_the_middle_of_the_day_counts_from_its_beginning() -> None:
    pipeline = driver()
    pipeline.emit(call(pipeline, input=10))
    pipeline.advance(hours=2)
    pipeline.apply_budget(budget("agent:acme/*/*", cap(10 * INPUT_NANOS)))
    pipeline.apply_budget(budget("team:acme/*", cap(10 * INPUT_NANOS), name="teams"))
    assert sorted((command.action, command.scope) for command in pipeline.commands()) == [
        ("halt", PLANNER),
        ("halt", "team:acme/research"),
    ]


def test_a_raised_budget_resumes_and_a_withdrawn_one_too() -> None:
    low = budget("agent:acme/*/*", cap(10 * INPUT_NANOS))
    pipeline = driver(low)
    pipeline.emit(call(pipeline, input=10))
    pipeline.apply_budget(budget("agent:acme/*/*", cap(1_000 * INPUT_NANOS), version=2))
    assert [command.action for command in pipeline.commands()] == ["halt", "resume"]
    pipeline.apply_budget(budget("agent:acme/*/*", cap(5 * INPUT_NANOS), version=3))
    pipeline.withdraw_budget("b1")
    assert [command.action for command in pipeline.commands()] == ["halt", "resume", "halt", "resume"]
    seqs = [command.seq for command in pipeline.commands()]
    assert seqs == sorted(set(seqs)), "a guard ignores what does not grow"


def test_a_price_override_counts_from_the_next_usage_on() -> None:
    pipeline = driver()
    pipeline.emit(call(pipeline, input=1))
    row = PriceRow(provider="anthropic", model="claude", rates=rates(1, 1))
    pipeline.price(PriceOverride(id="deal", row=row))
    pipeline.emit(call(pipeline, input=1))
    pipeline.withdraw_price("deal")
    pipeline.emit(call(pipeline, input=1))
    charges = [entry.charge for entry in pipeline.ledger() if entry.charge]
    assert [charge.cost_nanos for charge in charges] == [INPUT_NANOS, 1, INPUT_NANOS]
    assert [charge.priced_by for charge in charges] == ["book", "override", "book"]
    assert charges[0].price_book == charges[2].price_book != charges[1].price_book


@pytest.mark.parametrize(
    ("unknown_model", "commands", "alerts"),
    [("ceiling", [], []), ("deny", ["halt"], ["halt"]), ("warn", [], ["unknown_model"])],
)
def test_an_unknown_model_is_never_free(unknown_model: str, commands: list[str], alerts: list[str]) -> None:
    pipeline = driver(budget("agent:acme/*/*", cap(1_000 * DOLLAR), unknown_model=unknown_model))
    pipeline.emit(call(pipeline, model="gpt-99", output=10))
    (charge,) = (entry.charge for entry in pipeline.ledger() if entry.charge)
    assert (charge.cost_nanos, charge.priced_by) == (10 * DEAR_NANOS, "ceiling")
    assert [command.action for command in pipeline.commands()] == commands
    assert [alert.kind for alert in pipeline.alerts()] == alerts


@pytest.mark.parametrize("scope", ["agent:acme/*/*", "team:acme/*"])
def test_a_shadow_budget_decides_and_records_and_commands_nothing(scope: str) -> None:
    pipeline = driver(budget(scope, cap(10 * INPUT_NANOS), shadow=True))
    pipeline.emit(call(pipeline, input=10))
    assert pipeline.commands() == []
    assert [alert.kind for alert in pipeline.alerts()] == ["shadow"]
    (decision,) = (entry for entry in pipeline.ledger() if entry.kind == "decision")
    assert decision.command.action == "halt"
    (row,) = pipeline.wallet()
    assert row.state == "shadow"


def test_degrading_carries_the_models_to_use_instead() -> None:
    rule = DegradeRule(at=8_000, models={"opus": "claude"}, max_output_tokens=512)
    pipeline = driver(budget("agent:acme/*/*", cap(10 * INPUT_NANOS, degrade=rule)))
    pipeline.emit(call(pipeline, input=8))
    (command,) = pipeline.commands()
    assert (command.action, command.degrade.models, command.degrade.max_output_tokens) == (
        "degrade",
        {"opus": "claude"},
        512,
    )


def test_calls_in_flight_count_until_they_finish_or_their_deadline_passes() -> None:
    pipeline = driver(
        budget("agent:acme/*/*", cap(100, unit="tokens")), budget("team:acme/*", cap(300, unit="tokens"), name="t")
    )
    deadline = pipeline.now + timedelta(seconds=60)
    pipeline.emit(call(pipeline, id="c1", kind="started", output=60, deadline=deadline))
    assert pipeline.commands() == []
    (agent, team) = pipeline.wallet()
    assert (agent.spend, agent.committed, team.committed) == (0, 60, 60)
    pipeline.emit(call(pipeline, id="c1", output=30))
    (agent, team) = pipeline.wallet()
    assert (agent.spend, agent.committed, team.spend, team.committed) == (30, 30, 30, 30)
    pipeline.emit(call(pipeline, id="c2", kind="started", output=60, deadline=deadline))
    pipeline.advance(seconds=61)
    (agent, team) = pipeline.wallet()
    assert (agent.committed, team.committed) == (30, 30)
    pipeline.emit(call(pipeline, id="c3", kind="started", output=70, deadline=pipeline.now + timedelta(seconds=60)))
    assert [command.action for command in pipeline.commands()] == ["halt"]


def test_a_workspaces_time_zone_decides_its_day() -> None:
    pipeline = driver(start=datetime(2026, 7, 1, 21, 30, tzinfo=UTC))
    pipeline.apply_budget(WorkspaceSettings(workspace="acme", timezone="Europe/Amsterdam"))
    pipeline.emit(call(pipeline, input=1))
    pipeline.advance(minutes=45)  # 00:15 in Amsterdam, still the day before in UTC
    assert pipeline.spend(PLANNER).tokens == 0
    assert pipeline.spend(PLANNER, "month").tokens == 1


def test_a_rolling_cap_forgets_what_is_older_than_it() -> None:
    window = WindowSpec(kind="rolling", rolling_s=300)
    limit = cap(100, unit="tokens").model_copy(update={"window": window})
    pipeline = driver(budget("agent:acme/*/*", limit))
    pipeline.emit(call(pipeline, input=60))
    pipeline.advance(seconds=310)
    pipeline.emit(call(pipeline, input=60))
    assert pipeline.commands() == []
    assert pipeline.spend(PLANNER, window).tokens == 60
    pipeline.emit(call(pipeline, input=40))
    assert [command.action for command in pipeline.commands()] == ["halt"]


def test_commands_are_signed_so_that_a_guard_can_tell() -> None:
    private, public = generate("k1")
    pipeline = driver(budget("agent:acme/*/*", cap(INPUT_NANOS)), signing_key=private)
    pipeline.emit(call(pipeline, input=1))
    (record,) = pipeline.records(COMMANDS.name)
    signature = dict(record.headers)["spendfuse-sig"]
    assert Verifier.parse(public).verify(COMMANDS.name, record.key, record.value, signature) == "k1"
    with pytest.raises(BadSignature):
        Verifier.parse(public).verify(COMMANDS.name, record.key, record.value + b" ", signature)


def test_late_usage_within_the_grace_counts_in_its_own_window_and_later_is_flagged() -> None:
    pipeline = driver(
        budget("agent:acme/*/*", cap(10, unit="tokens", window="hour"), grace_s=600),
        start=datetime(2026, 1, 5, 10, 5, tzinfo=UTC),
    )
    before = datetime(2026, 1, 5, 9, 59, tzinfo=UTC)
    pipeline.emit(call(pipeline, ts=before, input=10))
    assert pipeline.spend(PLANNER, "hour").tokens == 0
    assert pipeline.spend(PLANNER, "day").tokens == 10
    assert [(alert.kind, len(pipeline.commands())) for alert in pipeline.alerts()] == [("halt", 0)]
    pipeline.advance(minutes=10)
    pipeline.emit(call(pipeline, ts=before, input=10))
    flags = [entry.late for entry in pipeline.ledger() if entry.kind == "charge"]
    assert flags == [False, True]
    assert pipeline.spend(PLANNER, "day").tokens == 20


def test_the_clock_goes_forward_only() -> None:
    pipeline = driver()
    pipeline.advance(days=1)
    assert pipeline.now == datetime(2026, 1, 6, 9, tzinfo=UTC)
    with pytest.raises(ValueError, match="cannot go back"):
        pipeline.at(datetime(2026, 1, 6, tzinfo=UTC))


def test_a_record_for_no_topic_or_of_too_many_bytes_is_refused_with_words() -> None:
    pipeline = driver()
    with pytest.raises(ValueError, match="no partition 9"):
        pipeline.emit(call(pipeline), partition=9)
    with pytest.raises(ValueError, match="Kafka takes"):
        pipeline.emit(b"x" * 1_100_000)


def test_two_drivers_given_the_same_give_the_same_bytes() -> None:
    def run() -> list[tuple[bytes | None, bytes | None]]:
        pipeline = PipelineDriver(budgets=[budget("team:acme/*", cap(20, unit="tokens"))], price_book=BOOK)
        for number in range(30):
            pipeline.emit(call(pipeline, f"acme/t/a{number % 3}", tokens=Tokens(input=number)))
        return [
            (record.key, record.value)
            for name in ("commands", "ledger", "rollups")
            for record in pipeline.records(f"spendfuse.{name}.v1")
        ]

    assert run() == run()


def test_all_that_is_said_is_in_the_ledger_with_where_it_came_from() -> None:
    pipeline = driver(budget("agent:acme/*/*", cap(INPUT_NANOS)))
    pipeline.emit(call(pipeline, input=1))
    (halt,) = pipeline.commands()
    said = {"command_id": halt.id, "seq": halt.seq, "scope": halt.scope, "budget": halt.budget, "cap": halt.cap}
    for state in ("received", "enforced"):
        ack = Ack(agent=PLANNER, guard="guard-1", state=state, at=pipeline.now, **said)
        pipeline.put(ACKS.name, encode(ack), key=halt.scope.encode())
    pipeline.price(PriceOverride(id="deal", row=PriceRow(provider="anthropic", model="claude", rates=rates(1, 1))))
    pipeline.withdraw_budget("b1")
    recorded = [(entry.kind, entry.topic.split(".")[1], entry.offset) for entry in pipeline.ledger()]
    assert sorted(recorded) == [
        ("ack", "acks", 0),
        ("ack", "acks", 1),
        ("alert", "alerts", 0),
        ("alert", "alerts", 1),
        ("budget", "budgets", 0),
        ("budget", "budgets", 1),
        ("charge", "usage", 0),
        ("command", "commands", 0),
        ("command", "commands", 1),
        ("price", "prices", 0),
    ]
    (halted, resumed) = (entry.command for entry in pipeline.ledger() if entry.kind == "command")
    assert (halted, resumed.action) == (halt, "resume")
    withdrawn = [entry.data for entry in pipeline.ledger() if entry.kind == "budget"][-1]
    assert withdrawn == {"key": "b1", "withdrawn": True}
