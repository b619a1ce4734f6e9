"""When a fuse warns, degrades and trips, through the meter as the pipeline uses it."""

from datetime import datetime
from itertools import pairwise

import pytest

from factories import (
    AGENT,
    DAY,
    HOUR,
    MINUTE,
    NOW,
    SECOND,
    Line,
    at,
    book,
    budget,
    call,
    cap,
    row,
    told,
    usage,
)
from spendfuse.engine.policies import Policies
from spendfuse.wire.base import NANOS_MAX, SAFE_INTEGER_MAX, from_us, to_us
from spendfuse.wire.control import Command
from spendfuse.wire.prices import Rates
from spendfuse.wire.usage import Tokens

MIDNIGHT = at("2026-11-24T00:00:00Z")


def test_each_fraction_acts_once_for_a_window_and_again_in_the_next() -> None:
    line = Line(budget(cap(100, warn=[5_000, 8_000], degrade=9_000)))
    for now_us in (NOW, MIDNIGHT):
        seen = [told(line.spend(1, now_us)) for _ in range(120)]
        acted = {nth + 1: actions for nth, actions in enumerate(seen) if actions}
        assert acted == {50: ["warn"], 80: ["warn"], 90: ["degrade"], 100: ["halt"]}


def test_a_jump_over_several_thresholds_gives_the_strictest_alone() -> None:
    line = Line(budget(cap(100, warn=[1_000, 5_000], degrade=8_000)))
    assert told(line.spend(9)) == []
    assert told(line.spend(72)) == ["degrade"]
    assert told(line.spend(500)) == ["halt"]
    assert told(line.spend(500)) == []


def test_a_cap_trips_when_committed_reaches_it_to_the_nano() -> None:
    line = Line(budget(cap(100)))
    assert told(line.spend(99)) == []
    (halt,) = line.spend(1).commands
    assert (halt.action, halt.measure.spend, halt.measure.committed, halt.measure.fraction) == (
        "halt",
        100,
        100,
        10_000,
    )  # type: ignore[union-attr]


def test_a_cap_without_halt_warns_and_stops_nobody() -> None:
    line = Line(budget(cap(100, warn=[10_000], halt=False)))
    assert [told(line.spend(60)) for _ in range(4)] == [[], ["warn"], [], []]


def test_a_warning_beyond_the_degrading_threshold_does_not_undo_it() -> None:
    line = Line(budget(cap(100, warn=[5_000, 9_000], degrade=8_000)))
    seen = [command for _ in range(10) for command in line.spend(10).commands]
    assert [command.action for command in seen] == ["warn", "degrade", "degrade", "halt"]
    assert seen[1].degrade == seen[2].degrade
    assert seen[1].degrade is not None


def test_degrade_carries_the_map_and_the_longest_answer() -> None:
    (command,) = Line(budget(cap(100, degrade=5_000))).spend(50).commands
    assert command.degrade is not None
    assert (command.degrade.models, command.degrade.max_output_tokens) == ({"known": "cheap"}, 500)


@pytest.mark.parametrize(
    ("window", "zone", "expires"),
    [
        ("hour", "UTC", "2026-11-23T11:00:00Z"),
        ("day", "Europe/Amsterdam", "2026-11-23T23:00:00Z"),
        ("week", "UTC", "2026-11-30T00:00:00Z"),
        ("month", "Asia/Kathmandu", "2026-11-30T18:15:00Z"),
    ],
)
def test_a_halt_expires_with_its_window(window: str, zone: str, expires: str) -> None:
    (halt,) = Line(budget(cap(100, window), timezone=zone)).spend(100).commands
    assert halt.expires_at == datetime.fromisoformat(expires)
    assert halt.window is not None
    assert (halt.window.kind, halt.window.timezone, halt.window.end) == (window, zone, halt.expires_at)


def test_a_run_is_halted_for_good() -> None:
    """The rollup judges runs; here the rule itself, since a run has one window."""
    from factories import cause
    from spendfuse.engine.crossings import Held
    from spendfuse.engine.decide import decide
    from spendfuse.engine.spend import Spend

    scope = "run:acme/run-1"
    policy = Policies([budget(cap(100, "run"), scope=scope)]).of(scope)
    spend = Spend(windows={"run": [100, 1, 1]})
    effects = decide(scope, policy, spend, Held(), {}, cause(), now_us=NOW, price_book="x")
    assert effects is not None
    (halt,) = effects.commands
    assert (halt.action, halt.expires_at, halt.window.end) == ("halt", None, None)  # type: ignore[union-attr]


def test_token_and_currency_caps_are_judged_side_by_side() -> None:
    prices = book(row(each=3_000_000))
    line = Line(budget(cap(300, id="money"), cap(150, id="tokens", unit="tokens")), prices=prices)
    assert [command.cap for command in line.spend(100).commands] == ["money"]
    (halt,) = line.spend(50).commands
    assert (halt.cap, halt.measure.unit, halt.measure.spend) == ("tokens", "tokens", 150)  # type: ignore[union-attr]


def test_late_usage_within_grace_trips_the_old_window_with_an_alert_and_no_command() -> None:
    line = Line(budget(cap(100), grace_s=3_600))
    line.spend(60, MIDNIGHT - 1)
    running = line.spend(100, MIDNIGHT)
    assert told(running) == ["halt"]
    late = line.spend(40, MIDNIGHT + MINUTE, ts_us=MIDNIGHT - 1)
    assert told(late) == ["alert halt"]
    assert "Known only after that window had ended" in late.alerts[0].message
    assert told(line.spend(1, MIDNIGHT + MINUTE, ts_us=MIDNIGHT - 1)) == []


def test_usage_later_than_the_grace_is_charged_flagged_and_trips_nothing() -> None:
    line = Line(budget(cap(100), grace_s=60))
    line.spend(99, MIDNIGHT - 1)
    message = call(usage(99, ts_us=MIDNIGHT - 1, output=500), 99)
    outcome = line.meter.apply([message], line.policies, line.book, MIDNIGHT + MINUTE)
    assert told(outcome.effects) == []
    (entry,) = outcome.entries
    assert entry.late
    assert entry.charge is not None
    assert entry.charge.cost_nanos == 500


def test_windows_long_closed_are_not_dug_up_for_a_new_budget() -> None:
    line = Line()
    line.spend(500, NOW)
    line.spend(1, NOW + 90 * MINUTE)
    assert told(line.change(budget(cap(100, "hour")), now_us=NOW + 90 * MINUTE)) == []


def test_usage_of_a_clock_ahead_trips_the_coming_window_and_never_eases_the_running_one() -> None:
    line = Line(budget(cap(100, warn=[5_000], degrade=7_000)))
    before = MIDNIGHT - 2 * MINUTE
    (halt,) = line.spend(100, before).commands
    assert told(line.spend(75, before, ts_us=MIDNIGHT + MINUTE)) == [], "degrade would push out the halt"
    (degrade,) = line.spend(1, MIDNIGHT + 2 * MINUTE).commands
    assert (degrade.action, degrade.seq > halt.seq) == ("degrade", True)


def test_a_trip_of_the_coming_window_is_not_cut_short_by_one_of_the_running_window() -> None:
    line = Line(budget(cap(100)))
    before = MIDNIGHT - 2 * MINUTE
    (coming,) = line.spend(100, before, ts_us=MIDNIGHT + MINUTE).commands
    assert coming.expires_at == from_us(MIDNIGHT + DAY)
    assert line.spend(100, before).commands == [], "its halt would end at midnight, and has the same key"


def test_a_shadow_budget_records_and_alerts_and_commands_nothing() -> None:
    line = Line(budget(cap(100, warn=[5_000]), shadow=True))
    seen = [line.spend(50), line.spend(50), line.spend(50)]
    assert [effects.commands for effects in seen] == [[], [], []]
    assert [[command.action for command in effects.shadow] for effects in seen] == [["warn"], ["halt"], []]
    assert {(alert.kind, alert.severity) for effects in seen for alert in effects.alerts} == {("shadow", "info")}


def exact_rolling_end(events: list[tuple[int, int]], length_s: int, line: int, now_us: int) -> int:
    """Return the first instant, slot by slot, at which what still counts is below a line."""
    slot_us = length_s * SECOND // 60
    moment = now_us // slot_us * slot_us
    while True:
        moment += slot_us
        if sum(nanos for ts_us, nanos in events if ts_us >= moment - 60 * slot_us) < line:
            return moment


def test_a_rolling_trip_lasts_until_the_sum_is_below_the_line_and_is_prolonged_when_spend_goes_on() -> None:
    line, events, now_us = Line(budget(cap(100, "rolling 5m"))), [], NOW
    standing: Command | None = None
    for nth in range(120):
        now_us += 7 * SECOND
        nanos = 1 + nth % 5
        events.append((now_us, nanos))
        effects = line.spend(nanos, now_us)
        slot_us = 5 * SECOND
        counted = sum(each for ts_us, each in events if ts_us >= now_us // slot_us * slot_us - 60 * slot_us)
        if counted < 100:
            assert told(effects) == []
            continue
        standing = effects.commands[0] if effects.commands else standing
        assert standing is not None
        assert standing.expires_at == from_us(exact_rolling_end(events, 300, 100, now_us))
    assert standing is not None


def test_prolonging_a_rolling_trip_alerts_once_and_a_warning_is_not_prolonged_aloud() -> None:
    line = Line(budget(cap(100, "rolling 5m", warn=[5_000])))
    seen = [line.spend(2, NOW + nth * 5 * SECOND) for nth in range(90)]
    assert [alert.kind for effects in seen for alert in effects.alerts] == ["warn", "halt"]
    commands = [command for effects in seen for command in effects.commands]
    assert [command.action for command in commands[:2]] == ["warn", "halt"]
    assert {command.action for command in commands[2:]} == {"halt"}
    for one, next_one in pairwise(commands[1:]):
        assert next_one.seq > one.seq
        assert next_one.expires_at > one.expires_at  # type: ignore[operator]


def test_a_rolling_fuse_trips_again_after_it_fell_below() -> None:
    line = Line(budget(cap(100, "rolling 5m")))
    assert told(line.spend(100, NOW)) == ["halt"]
    assert told(line.spend(99, NOW + 10 * MINUTE)) == []
    assert told(line.spend(1, NOW + 11 * MINUTE)) == ["halt"]


def test_more_rolling_spend_never_turns_a_halt_into_less() -> None:
    """Spend tripped it, and a call that settles for less than it held does not lower it."""
    line = Line(budget(cap(100, "rolling 5m", degrade=2_000)))
    line.offset = 50
    assert told(line.spend(100)) == ["halt"]
    assert told(line.spend(50, kind="started", id="big")) == []
    assert told(line.spend(30, NOW + SECOND, id="big")) == []
    assert told(line.spend(1, NOW + 2 * SECOND)) == []


def test_a_command_names_the_usage_the_numbers_and_the_end_in_one_sentence() -> None:
    line = Line(budget(cap(1_500_000_000, "day"), timezone="Europe/Amsterdam"))
    line.spend(999_999_999)
    (halt,) = line.spend(600_000_001).commands
    assert halt.message == (
        f"{AGENT} reached its day cap of USD 1.50 (spent USD 1.60). Resumes 2026-11-24 00:00 Europe/Amsterdam."
    )
    assert halt.cause is not None
    assert (halt.cause.usage_id, halt.cause.offset, to_us(halt.cause.ts)) == ("call-2", 2, NOW)
    assert (halt.price_book, halt.budget_version, halt.key) == ("test+1", 1, f"{AGENT}|b|c")


def test_the_same_usage_leads_to_the_same_bytes_but_for_when_it_was_said() -> None:
    def commands(later_us: int) -> list[Command]:
        line = Line(budget(cap(100, warn=[5_000]), cap(40, "rolling 60m", id="r")))
        said = []
        for nth in range(12):
            message = call(usage(nth, ts_us=NOW + nth * SECOND, output=10), nth)
            said += line.meter.apply(
                [message], line.policies, line.book, NOW + nth * SECOND + later_us
            ).effects.commands
        return said

    first, again = commands(0), commands(3 * SECOND)
    assert [(command.cap, command.action) for command in first][:3] == [("r", "halt"), ("c", "warn"), ("c", "halt")]
    assert [command.model_copy(update={"issued_at": from_us(NOW)}) for command in first] == [
        command.model_copy(update={"issued_at": from_us(NOW)}) for command in again
    ]
    assert len({command.id for command in first}) == len(first)
    assert [command.seq for command in first if command.cap == "c"] == sorted(
        {command.seq for command in first if command.cap == "c"}
    )


def test_an_unknown_model_halts_the_agent_until_the_end_of_the_budgets_day() -> None:
    line = Line(budget(cap(NANOS_MAX), unknown_model="deny", timezone="Europe/Amsterdam"))
    assert told(line.spend(1)) == []
    (halt,) = line.spend(1, model="strange").commands
    assert (halt.action, halt.cap, halt.expires_at) == (
        "halt",
        "unknown-model",
        datetime.fromisoformat("2026-11-23T23:00:00Z"),
    )
    assert "openai/strange" in halt.message
    assert told(line.spend(1, model="stranger")) == []
    assert told(line.spend(1, MIDNIGHT, model="strange")) == ["halt"]


def test_a_teams_budget_denies_unknown_models_of_its_agents_and_shadow_only_says_so() -> None:
    line = Line(budget(cap(NANOS_MAX), scope="team:acme/*", unknown_model="deny"))
    (halt,) = line.spend(1, model="strange").commands
    assert halt.scope == AGENT
    line = Line(budget(cap(NANOS_MAX), scope="workspace:acme", unknown_model="deny", shadow=True))
    effects = line.spend(1, model="strange")
    assert (effects.commands, [command.action for command in effects.shadow]) == ([], ["halt"])


def test_an_unknown_model_is_warned_of_once_a_day_when_the_budget_asks() -> None:
    line = Line(budget(cap(NANOS_MAX), unknown_model="warn"))
    seen = [told(line.spend(1, NOW + nth * HOUR, model="strange")) for nth in range(20)]
    assert [nth for nth, actions in enumerate(seen) if actions == ["alert unknown_model"]] == [0, 14]
    assert told(line.spend(1, NOW + 19 * HOUR, model="stranger")) == ["alert unknown_model"]


def test_many_unknown_models_do_not_grow_the_state() -> None:
    line = Line(budget(cap(NANOS_MAX), unknown_model="warn"))
    for nth in range(600):
        line.spend(1, model=f"m{nth}")
    assert len(line.meter.state(AGENT).noted) <= 256


def test_what_fired_is_remembered_for_as_long_as_it_may_fire_again_and_no_longer() -> None:
    line = Line(budget(cap(10, "hour"), grace_s=3_600))
    for hour in range(100):
        assert told(line.spend(10, NOW + hour * HOUR)) == ["halt"]
    (fuse,) = line.meter.state(AGENT).fuses.values()
    assert len(fuse.fired) <= 3
    line = Line(budget(cap(10, "hour"), grace_s=7 * 86_400))
    for hour in range(168):
        line.spend(10, NOW + hour * HOUR)
    quiet = [told(line.spend(1, NOW + 168 * HOUR, ts_us=NOW + hour * HOUR)) for hour in range(1, 168)]
    assert quiet == [[]] * 167, "no hour of the grace is alerted twice"


def test_the_greatest_amounts_that_may_come_in_lead_to_a_command_and_not_to_an_error() -> None:
    top = 10**15
    dear = book(row(rates=Rates(input=top, cache_read=top, cache_write_5m=top, cache_write_1h=top, output=top)))
    most = 10**9
    line = Line(budget(cap(1), cap(1, "rolling 5m", id="r"), cap(1, id="t", unit="tokens")), prices=dear)
    tokens = Tokens(input=most, cache_read=most, cache_write_5m=most, cache_write_1h=most, output=most)
    commands = line.spend(kind="started", tokens=tokens).commands
    for _ in range(4):
        commands += line.spend(tokens=tokens).commands
        commands += line.spend(tokens=tokens, kind="started").commands
    assert {command.cap for command in commands} == {"c", "r", "t"}
    assert all(Command.model_validate_json(command.model_dump_json()) == command for command in commands)
    rollup = line.meter.rollup("team:acme/research", 9, NOW)
    assert rollup is not None
    assert type(rollup).model_validate_json(rollup.model_dump_json()).held_nanos == NANOS_MAX
    assert all(command.seq <= SAFE_INTEGER_MAX for command in commands)
