"""The laws of the core, against totals that plain dictionaries and integers compute from the list of usages.

The oracle shares no code with the engine: it knows the usages, when they were, and what a token costs.
"""

from collections import defaultdict
from copy import deepcopy
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from factories import DAY, HOUR, MINUTE, NOW, Line, book, budget, calls, cap, packed, row, usage
from spendfuse.engine.ids import SeenIds
from spendfuse.engine.meter import Outcome, PartitionMeter
from spendfuse.engine.policies import Policies
from spendfuse.engine.rollup import apply_rollup, reconsider_shared
from spendfuse.engine.spend import merged
from spendfuse.engine.state import ScopeState, SharedState
from spendfuse.wire.base import from_us
from spendfuse.wire.budget import Budget
from spendfuse.wire.packed import PackedUsage
from spendfuse.wire.rollup import Rollup
from spendfuse.wire.usage import Tokens, Usage

PARTITIONS = 2
LATE = NOW + 57 * MINUTE
"""Three minutes before the hour: the hour before is within its grace, and a clock ahead is in the next one."""
AGENTS = [("research", "planner"), ("research", "writer"), ("sales", "caller"), ("sales", "planner")]
PRICES = book()
BUDGETS = [
    budget(cap(300, warn=[4_000], degrade=7_000), cap(150, "hour", id="h"), scope="agent:acme/*/*", id="agents"),
    budget(cap(200, "rolling 30m", id="r", warn=[2_500]), scope="agent:acme/research/*", id="rolling"),
    budget(cap(900, warn=[5_000]), cap(250, "rolling 60m", id="r"), scope="team:acme/*", id="teams"),
    budget(cap(1_500, "month", degrade=5_000), scope="workspace:acme", id="all", shadow=True),
    budget(cap(400, "run"), scope="run:acme/*", id="runs"),
]
POLICIES = Policies(BUDGETS)


class Event(NamedTuple):
    """One usage to be: who, which call, what kind, how many tokens, how long ago, and where a repeat comes from."""

    agent: int
    call: int
    kind: str
    output: int
    age_s: int
    source: int


def events(kinds: tuple[str, ...] = ("finished", "finished", "started", "progress"), **limits: int) -> Any:
    oldest, newest = limits.get("oldest", 110 * 60), limits.get("newest", -4 * 60)
    return st.lists(
        st.builds(
            Event,
            st.integers(0, len(AGENTS) - 1),
            st.integers(0, limits.get("calls", 12)),
            st.sampled_from(kinds),
            st.integers(0, 120),
            st.integers(newest, oldest),
            st.integers(0, 1),
        ),
        max_size=30,
    )


def streams(made: list[Event], *, unique: bool = False) -> dict[int, list[PackedUsage]]:
    """Return each packed partition's usages in order, with growing origins; the calls of an agent are its own."""
    offsets: dict[int, int] = defaultdict(int)
    found: dict[int, list[PackedUsage]] = {partition: [] for partition in range(PARTITIONS)}
    finished: set[tuple[int, int]] = set()
    for nth, event in enumerate(made):
        team, agent = AGENTS[event.agent]
        # One call's started and finished come from one partition, as one emitter sends them; a repeat from any.
        repeat = event.kind == "finished" and (event.agent, event.call) in finished
        source = event.source if repeat else event.call % 2
        if event.kind == "finished":
            finished.add((event.agent, event.call))
        offsets[source] += 1 + event.output % 3
        message = usage(
            nth if unique else event.call,
            ts_us=LATE - event.age_s * 1_000_000,
            output=event.output,
            kind=event.kind,
            team=team,
            agent=agent,
            run=f"leaf-{nth}",
            root_run=f"tree/{(event.agent + event.call) % 3}",
        )
        found[event.agent % PARTITIONS].append(packed(message, offsets[source], partition=source))
    return found


def scopes_of(message: Usage) -> list[str]:
    team = f"acme/{message.team}"
    return [f"agent:{team}/{message.agent}", f"team:{team}", "workspace:acme", f"run:acme/{message.root_run}"]


def us_of(message: Usage) -> int:
    gap = message.ts - datetime(1970, 1, 1, tzinfo=UTC)
    return (gap.days * 86_400 + gap.seconds) * 1_000_000 + gap.microseconds


def oracle(usages: list[PackedUsage], rolling_s: tuple[int, ...] = ()) -> dict[tuple[str, str], list[int]]:
    """Return [nanos, tokens, calls] of each (scope, window), from the usages alone: the first of each id counts."""
    totals: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    charged = set()
    for message in (each.u for each in usages):
        who = (message.team, message.agent, message.id)
        if message.kind != "finished" or who in charged:
            continue
        charged.add(who)
        seconds = us_of(message) // 1_000_000
        month = datetime(message.ts.year, message.ts.month, 1, tzinfo=UTC)
        windows = [
            f"hour@UTC@{seconds // 3_600 * 3_600}",
            f"day@UTC@{seconds // 86_400 * 86_400}",
            f"month@UTC@{(month - datetime(1970, 1, 1, tzinfo=UTC)).days * 86_400}",
        ]
        for scope in scopes_of(message):
            for window in [*windows, "run"] if scope.startswith("run:") else windows:
                sums = totals[scope, window]
                sums[0] += message.tokens.output
                sums[1] += message.tokens.output
                sums[2] += 1
    return dict(totals)


def folded(meters: list[PartitionMeter], kind: str = "") -> dict[tuple[str, str], list[int]]:
    """Return what the meters have for each (scope, window), their partitions added up."""
    totals: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for meter in meters:
        for scope, state in meter.states.items():
            if scope.startswith(kind):
                for window, sums in state.spend.windows.items():
                    known = totals[scope, window]
                    totals[scope, window] = [a + b for a, b in zip(known, sums, strict=True)]
    return dict(totals)


def cut(usages: list[PackedUsage], cuts: list[int]) -> list[list[PackedUsage]]:
    """Return the usages in messages that end at the cuts."""
    places = sorted({0, len(usages), *(place % (len(usages) + 1) for place in cuts)})
    return [usages[start:end] for start, end in pairwise(places)]


def run(messages: list[list[PackedUsage]], partition: int = 0) -> tuple[PartitionMeter, list[Outcome]]:
    meter = PartitionMeter(partition, lambda _: None, SeenIds())
    return meter, [meter.apply(calls(message), POLICIES, PRICES, LATE) for message in messages]


def said(outcomes: list[Outcome]) -> tuple[list[Any], list[Any], list[Any]]:
    return (
        [command for outcome in outcomes for command in outcome.effects.commands],
        [command for outcome in outcomes for command in outcome.effects.shadow],
        [alert for outcome in outcomes for alert in outcome.effects.alerts],
    )


CUTS = st.lists(st.integers(0, 30), max_size=5)


@settings(max_examples=120, deadline=None)
@given(events(), CUTS)
def test_calculating_in_two_runs_yields_the_same_as_in_one(made: list[Event], cuts: list[int]) -> None:
    for usages in streams(made).values():
        whole, in_one = run([usages] if usages else [])
        parts, in_several = run(cut(usages, cuts))
        assert parts.states == whole.states
        assert parts.seen == whole.seen
        assert said(in_several) == said(in_one)
        assert [entry for each in in_several for entry in each.entries] == [
            entry for each in in_one for entry in each.entries
        ]


@settings(max_examples=120, deadline=None)
@given(events())
def test_the_sums_are_those_of_the_usages_and_conserved_from_agent_to_workspace(made: list[Event]) -> None:
    by_partition = streams(made)
    meters = [run([usages], partition)[0] for partition, usages in by_partition.items()]
    every = [each for usages in by_partition.values() for each in usages]
    expected = oracle(every)
    assert folded(meters) == expected
    per_kind: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0, 0]))
    for (scope, window), sums in folded(meters).items():
        kind = scope.partition(":")[0]
        per_kind[kind][window] = [a + b for a, b in zip(per_kind[kind][window], sums, strict=True)]
    per_kind["run"].pop("run", None)
    assert per_kind["agent"] == per_kind["team"] == per_kind["workspace"] == per_kind["run"]


@settings(max_examples=80, deadline=None)
@given(events(kinds=("finished",)), st.randoms(use_true_random=False))
def test_the_order_of_usages_does_not_change_the_sums(made: list[Event], random: Any) -> None:
    by_partition = streams(made, unique=True)
    expected = oracle([each for usages in by_partition.values() for each in usages])
    shuffled = made.copy()
    random.shuffle(shuffled)
    again = [run([usages], partition)[0] for partition, usages in streams(shuffled, unique=True).items()]
    assert folded(again) == expected


@settings(max_examples=120, deadline=None)
@given(events(), CUTS, st.integers(0, 30))
def test_any_suffix_may_be_replayed_and_changes_nothing(made: list[Event], cuts: list[int], back: int) -> None:
    for usages in streams(made).values():
        messages = cut(usages, cuts)
        meter, first = run(messages)
        before = deepcopy(meter.states)
        start = back % (len(messages) + 1)
        again = [meter.apply(calls(message), POLICIES, PRICES, LATE) for message in messages[start:]]
        assert meter.states == before
        assert said(again) == ([], [], [])
        assert [outcome.touched for outcome in again] == [set()] * len(again)
        # The ledger gets its entries again: consumers trim by origin. Nothing is judged otherwise than before.
        for one, other in zip(first[start:], again, strict=True):
            assert [(entry.kind, entry.partition, entry.offset) for entry in one.entries] == [
                (entry.kind, entry.partition, entry.offset) for entry in other.entries
            ]
            assert other.replays + other.duplicates == len(other.entries)


@settings(max_examples=400, deadline=None)
@given(events(), CUTS, st.integers(0, 30), st.data())
def test_a_crash_with_each_key_durable_at_another_moment_changes_nothing(
    made: list[Event], cuts: list[int], back: int, data: st.DataObject
) -> None:
    for usages in streams(made).values():
        messages = cut(usages, cuts)
        meter = PartitionMeter(0, lambda _: None, SeenIds())
        states: list[dict[str, ScopeState]] = [{}]
        ids: list[dict[int, bytes]] = [{}]
        first = []
        for message in messages:
            first.append(meter.apply(calls(message), POLICIES, PRICES, LATE))
            states.append(deepcopy(meter.states))
            ids.append(ids[-1] | meter.seen.take_dirty())
        acked = back % (len(messages) + 1)  # everything up to here was durable; beyond it, each key as it happened
        moment = st.integers(acked, len(messages))
        stored = {}
        for scope in meter.states:
            state = states[data.draw(moment, label=scope)].get(scope)
            if state is not None:
                stored[scope] = deepcopy(state)
        seen = SeenIds()
        for value in ids[data.draw(moment, label="ids")].values():
            seen.restore(value)
        again = PartitionMeter(0, stored.get, seen)
        replayed = [again.apply(calls(message), POLICIES, PRICES, LATE) for message in messages[acked:]]
        for scope, state in meter.states.items():
            assert again.state(scope) == state, scope
        assert again.seen.origins == meter.seen.origins
        assert all(command in said(first)[0] for command in said(replayed)[0]), "the same commands, or none"


def shares(by_partition: dict[int, list[PackedUsage]], cuts: list[int]) -> list[Rollup]:
    """Return every rollup the meters would publish, message by message."""
    published = []
    for partition, usages in by_partition.items():
        meter = PartitionMeter(partition, lambda _: None, SeenIds())
        for as_of, message in enumerate(cut(usages, cuts)):
            outcome = meter.apply(calls(message), POLICIES, PRICES, LATE)
            for scope in sorted(outcome.touched):
                rollup = meter.rollup(scope, as_of, LATE)
                if rollup is not None:
                    published.append(Rollup.model_validate_json(rollup.model_dump_json()))
    return published


@settings(max_examples=80, deadline=None)
@given(events(), CUTS, st.randoms(use_true_random=False))
def test_the_total_of_a_shared_scope_is_the_sum_of_the_newest_shares_in_any_order(
    made: list[Event], cuts: list[int], random: Any
) -> None:
    by_partition = streams(made)
    published = shares(by_partition, cuts)
    expected = {
        key: sums
        for key, sums in oracle([each for usages in by_partition.values() for each in usages]).items()
        if not key[0].startswith("agent:")
    }
    disordered = published * 2
    random.shuffle(disordered)
    states: dict[str, SharedState] = defaultdict(SharedState)
    newest: dict[tuple[str, int], int] = {}
    for rollup in disordered:
        known = newest.get((rollup.scope, rollup.partition), -1)
        news, _ = apply_rollup(states[rollup.scope], rollup, POLICIES, now_us=LATE, price_book="x")
        assert news == (rollup.as_of >= known)
        newest[rollup.scope, rollup.partition] = max(known, rollup.as_of)
    found = {}
    for scope, state in states.items():
        for window, sums in merged(part.spend for part in state.parts.values()).windows.items():
            found[scope, window] = sums
    assert found == expected


@settings(max_examples=80, deadline=None)
@given(events(), CUTS)
def test_more_spend_never_resumes_and_never_asks_for_less(made: list[Event], cuts: list[int]) -> None:
    strictness = {"warn": 0, "degrade": 1, "halt": 2}
    by_partition = streams(made)
    commands = [
        command
        for usages in by_partition.values()
        for outcome in run(cut(usages, cuts))[1]
        for command in outcome.effects.commands + outcome.effects.shadow
    ]
    states: dict[str, SharedState] = defaultdict(SharedState)
    for rollup in shares(by_partition, cuts):
        _, effects = apply_rollup(states[rollup.scope], rollup, POLICIES, now_us=LATE, price_book="x")
        commands += effects.commands + effects.shadow if effects else []
    standing: dict[str, Any] = {}
    for command in commands:
        before = standing.get(command.key)
        if before is not None:
            assert command.seq > before.seq
            if strictness.get(command.action, -1) < strictness.get(before.action, -1):
                assert before.measure.spend < before.measure.cap, "only what calls in flight tripped asks for less"
                assert before.measure.committed > before.measure.spend
        standing[command.key] = command
    if all(event.kind == "finished" for event in made):  # only what calls in flight tripped is lifted when they end
        assert all(command.action != "resume" for command in commands)
        for scope, state in states.items():
            assert reconsider_shared(scope, state, POLICIES, now_us=LATE, price_book="x") is None


@settings(max_examples=150, deadline=None)
@given(events(kinds=("finished",), newest=0, calls=30), st.integers(1, 200), CUTS)
def test_a_fuse_trips_exactly_when_its_cap_is_crossed_once_for_a_window(
    made: list[Event], amount: int, cuts: list[int]
) -> None:
    """An hour that has ended is only alerted; the running one is commanded."""
    line = Line(budget(cap(amount, "hour"), scope="agent:acme/*/*"))
    for usages in streams(made).values():
        spent: dict[tuple[str, int], int] = defaultdict(int)
        charged: set[tuple[str, str]] = set()
        expected = []
        for each in usages:
            agent = scopes_of(each.u)[0]
            if (agent, each.u.id) in charged:
                continue
            charged.add((agent, each.u.id))
            hour = us_of(each.u) // HOUR
            before = spent[agent, hour]
            spent[agent, hour] = before + each.u.tokens.output
            if before < amount <= spent[agent, hour]:
                expected.append((agent, each.u.id, hour == LATE // HOUR))
        meter = PartitionMeter(0, lambda _: None, SeenIds())
        outcomes = [meter.apply(calls(message), line.policies, PRICES, LATE) for message in cut(usages, cuts)]
        commands, shadow, alerts = said(outcomes)
        assert [(alert.scope, alert.usage_id) for alert in alerts] == [(agent, call) for agent, call, _ in expected]
        assert [(command.scope, command.cause.usage_id) for command in commands] == [
            (agent, call) for agent, call, running in expected if running
        ]
        assert {command.action for command in commands} <= {"halt"}
        assert shadow == []


TEXT = st.text("abcXYZ019._+-", min_size=1, max_size=5).map(lambda text: "a" + text)
INSTANTS = st.one_of(st.integers(LATE - 40 * DAY, LATE + 5 * MINUTE), st.integers(0, 253_000_000_000_000_000)).map(
    from_us
)
COUNTS = st.integers(0, 1_000_000_000)


@st.composite
def any_usage(draw: st.DrawFn) -> Usage:
    """Any usage the wire takes: also of times that the intake would refuse."""
    kind = draw(st.sampled_from(["finished", "started", "progress"]))
    output = draw(COUNTS)
    return Usage(
        id=draw(TEXT),
        ts=draw(INSTANTS),
        kind=kind,
        workspace="acme",
        team=draw(st.sampled_from(["research", "sales"])),
        agent=draw(st.sampled_from(["planner", "x"])),
        run=draw(TEXT),
        root_run=draw(st.none() | TEXT),
        provider=draw(st.sampled_from(["openai", "nobody"])),
        model=draw(st.sampled_from(["known", "strange"])),
        tier=draw(st.sampled_from(["standard", "batch"])),
        tokens=Tokens(input=draw(COUNTS), cache_read=draw(COUNTS), cache_write_5m=draw(COUNTS),
                      cache_write_1h=draw(COUNTS), output=output, reasoning=draw(st.integers(0, output))),
        deadline=None if kind == "finished" else draw(st.none() | INSTANTS),
    )  # fmt: skip


ANY_BUDGETS: list[Budget] = [
    budget(
        cap(1, "hour", id="h"), cap(10**12, "day", warn=[1], degrade=9), cap(1, "rolling 5m", id="r"),
        cap(10**9, "week", id="w", unit="tokens"), cap(10**15, "month", id="m"),
        scope=scope, id=f"b{nth}", timezone=zone, grace_s=grace_s, unknown_model=unknown, shadow=nth == 2,
    )
    for nth, (scope, zone, grace_s, unknown) in enumerate([
        ("agent:acme/*/*", "Asia/Kathmandu", 0, "deny"),
        ("team:*/*", "Australia/Lord_Howe", 604_800, "warn"),
        ("workspace:*", "America/Sao_Paulo", 60, "deny"),
        ("run:acme/*", "UTC", 3_600, "ceiling"),
    ])
]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(any_usage(), min_size=1, max_size=6), st.integers(0, 3 * DAY))
def test_no_usage_that_the_wire_takes_stops_a_partition(usages: list[Usage], later_us: int) -> None:
    policies, prices = Policies(ANY_BUDGETS), book(row(each=10**15))
    meter = PartitionMeter(0, lambda _: None, SeenIds())
    states: dict[str, SharedState] = defaultdict(SharedState)
    for nth, message in enumerate(usages):
        now_us = LATE + later_us * nth
        outcome = meter.apply(calls([packed(message, nth)]), policies, prices, now_us)
        for scope in outcome.touched:
            rollup = meter.rollup(scope, nth, now_us)
            if rollup is not None:
                sent = Rollup.model_validate_json(rollup.model_dump_json())
                apply_rollup(states[scope], sent, policies, now_us=now_us, price_book="x")
        for entry in outcome.entries:
            assert type(entry).model_validate_json(entry.model_dump_json()) == entry
    for scope in list(meter.states):
        if scope.startswith("agent:"):
            meter.reconsider(scope, Policies(), prices, LATE + 4 * DAY)
            assert not any(fuse.fired and max(fuse.fired.values())[1] > LATE + 4 * DAY
                           for fuse in meter.states[scope].fuses.values())  # fmt: skip
