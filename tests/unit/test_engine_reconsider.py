"""What a changed budget does to fuses that stand: one order of a cap at the most, and always a higher seq."""

import pytest

from factories import AGENT, DAY, HOUR, MINUTE, NOW, SECOND, Line, at, book, budget, cap, row, told
from spendfuse.engine.fuses import SEQ_KEPT_US
from spendfuse.engine.orders import Effects
from spendfuse.wire.base import NANOS_MAX, from_us

MIDNIGHT = at("2026-11-24T00:00:00Z")


def test_a_raised_budget_resumes_with_a_higher_seq_and_trips_again_at_its_new_cap() -> None:
    line = Line(budget(cap(100)))
    (halt,) = line.spend(100).commands
    (resume,) = line.change(budget(cap(150), version=2)).commands
    assert (resume.action, resume.key, resume.budget_version) == ("resume", halt.key, 2)
    assert resume.seq > halt.seq
    assert told(line.spend(49)) == []
    (again,) = line.spend(1).commands
    assert again.action == "halt"
    assert again.seq > resume.seq


def test_a_lowered_budget_halts_at_once_and_only_once() -> None:
    line = Line(budget(cap(100, warn=[5_000])))
    (warn,) = line.spend(60).commands
    (halt,) = line.change(budget(cap(60, warn=[5_000]))).commands
    assert (halt.action, halt.cause) == ("halt", None)
    assert halt.seq > warn.seq
    assert told(line.change(budget(cap(60, warn=[5_000])))) == []
    assert told(line.spend(1)) == []


def test_a_removed_budget_resumes_and_one_that_never_tripped_says_nothing() -> None:
    line = Line(budget(cap(100)), budget(cap(1_000), id="quiet"))
    (halt,) = line.spend(100).commands
    (resume,) = line.change().commands
    assert (resume.action, resume.key) == ("resume", halt.key)
    assert resume.seq > halt.seq
    assert told(line.change()) == []


def test_a_removed_cap_resumes_and_its_neighbour_stays_tripped() -> None:
    line = Line(budget(cap(100, id="a"), cap(90, id="b")))
    assert sorted(command.cap for command in line.spend(100).commands) == ["a", "b"]
    assert [(command.cap, command.action) for command in line.change(budget(cap(100, id="a"))).commands] == [
        ("b", "resume")
    ]


def test_a_budget_that_comes_back_is_never_older_than_its_resume() -> None:
    line = Line(budget(cap(100)))
    line.spend(100)
    (resume,) = line.change(now_us=NOW + HOUR).commands
    line.change(budget(cap(150)), now_us=NOW + HOUR)
    # A late usage crosses: its event time is before the resume, and a guard ignores old sequences.
    (halt,) = line.spend(50, NOW + HOUR + SECOND, ts_us=NOW + MINUTE).commands
    assert halt.action == "halt"
    assert halt.seq > resume.seq


def test_the_fuse_of_a_withdrawn_budget_is_forgotten_when_its_commands_are_gone() -> None:
    line = Line(budget(cap(100)))
    line.spend(100)
    line.change(now_us=NOW)
    assert len(line.meter.state(AGENT).fuses) == 1
    line.change(now_us=NOW + SEQ_KEPT_US + HOUR)
    assert line.meter.state(AGENT).fuses == {}


def test_a_budget_raised_to_between_two_thresholds_eases_and_says_so() -> None:
    line = Line(budget(cap(100, warn=[5_000], degrade=8_000)))
    line.spend(100)
    assert [command.action for command in line.change(budget(cap(120, warn=[5_000], degrade=8_000))).commands] == [
        "degrade"
    ]
    commands = line.change(budget(cap(160, warn=[5_000], degrade=8_000))).commands
    assert [command.action for command in commands] == ["resume", "warn"]
    assert commands[1].seq > commands[0].seq
    assert told(line.change(budget(cap(195, warn=[5_000, 3_000], degrade=8_000)))) == []
    assert told(line.spend(60)) == ["degrade"], "160 of 195 is beyond 80 %"


def test_a_warning_at_less_of_a_raised_cap_is_not_news_and_the_next_one_is() -> None:
    line = Line(budget(cap(100, warn=[5_000, 8_000])))
    assert told(line.spend(80)) == ["warn"]
    assert told(line.change(budget(cap(150, warn=[5_000, 8_000])))) == []
    assert told(line.spend(39)) == []
    assert told(line.spend(1)) == ["warn"], "120 of 150"


def test_a_budget_that_leaves_shadow_halts_what_it_only_recorded() -> None:
    line = Line(budget(cap(100), shadow=True))
    assert told(line.spend(100)) == ["alert shadow"]
    assert told(line.change(budget(cap(100)))) == ["halt"]


def test_a_budget_that_goes_into_shadow_lifts_what_it_commanded() -> None:
    line = Line(budget(cap(100)))
    line.spend(100)
    effects = line.change(budget(cap(100), shadow=True))
    assert [command.action for command in effects.commands] == ["resume"]
    assert [command.action for command in effects.shadow] == ["halt"]
    assert told(line.change(budget(cap(100), shadow=True))) == []


def test_a_withdrawn_shadow_budget_commands_nothing() -> None:
    line = Line(budget(cap(100), shadow=True))
    line.spend(100)
    effects = line.change()
    assert effects.commands == []
    assert [command.action for command in effects.shadow] == ["resume"]


def test_a_cap_that_no_longer_halts_lets_go_although_the_fraction_is_the_same() -> None:
    line = Line(budget(cap(100)))
    line.spend(100)
    commands = line.change(budget(cap(100, warn=[10_000], halt=False))).commands
    assert [command.action for command in commands] == ["resume", "warn"]


def test_a_new_degrade_map_is_told_although_the_fraction_is_the_same() -> None:
    line = Line(budget(cap(100, degrade=5_000)))
    line.spend(50)
    rule = cap(degrade=5_000).degrade
    assert rule is not None
    changed = cap(100, degrade=rule.model_copy(update={"models": {"known": "cheapest"}}))
    (command,) = line.change(budget(changed)).commands
    assert command.degrade is not None
    assert command.degrade.models == {"known": "cheapest"}
    assert told(line.change(budget(changed))) == []


@pytest.mark.parametrize(
    ("changed", "actions"),
    [
        # The sums of the new window are judged; a window that is not kept yet starts empty, so nothing stands.
        (budget(cap(100, "month")), ["halt"]),
        (budget(cap(1_000, "month")), ["resume"]),
        (budget(cap(100, "week")), ["resume"]),
        (budget(cap(100), timezone="Asia/Tokyo"), ["resume"]),
        (budget(cap(100, unit="tokens")), []),
        (budget(cap(101, unit="tokens")), ["resume"]),
        (budget(cap(100), note="only a note", version=9), []),
    ],
)
def test_a_cap_whose_window_zone_or_unit_changed_is_judged_anew(changed: object, actions: list[str]) -> None:
    line = Line(budget(cap(100)))
    line.spend(100)
    assert [command.action for command in line.change(changed).commands] == actions  # type: ignore[arg-type]
    assert told(line.change(changed)) == []  # type: ignore[arg-type]


def test_a_raised_budget_is_not_hindered_by_windows_that_have_ended() -> None:
    line = Line(budget(cap(100)))
    line.spend(100, MIDNIGHT - MINUTE)
    line.spend(100, MIDNIGHT)
    assert told(line.change(budget(cap(100)), now_us=MIDNIGHT + SECOND)) == []
    assert told(line.change(budget(cap(150)), now_us=MIDNIGHT + SECOND)) == ["resume"]
    line.change(budget(cap(100)), now_us=MIDNIGHT + SECOND)
    assert told(line.change(budget(cap(100)), now_us=MIDNIGHT + DAY)) == [], "it has expired by itself"


def test_a_raised_budget_lifts_the_trip_of_a_clock_ahead_too() -> None:
    line = Line(budget(cap(100)))
    line.spend(100, MIDNIGHT - MINUTE)
    line.spend(100, MIDNIGHT - MINUTE, ts_us=MIDNIGHT + MINUTE)
    assert [command.action for command in line.change(budget(cap(500)), now_us=MIDNIGHT - SECOND).commands] == [
        "resume"
    ]


def test_a_rolling_trip_ends_earlier_under_a_raised_cap_and_is_lifted_under_a_high_one() -> None:
    line = Line(budget(cap(100, "rolling 5m")))
    for nth in range(12):
        line.spend(10, NOW + nth * 10 * SECOND)
    now_us = NOW + 110 * SECOND
    (until,) = {fired.until_us for fired in line.meter.state(AGENT).fuses["b|c"].fired.values()}
    (shorter,) = line.change(budget(cap(115, "rolling 5m")), now_us=now_us).commands
    assert shorter.action == "halt"
    assert shorter.expires_at < from_us(until)  # type: ignore[operator]
    assert told(line.change(budget(cap(130, "rolling 5m")), now_us=now_us)) == ["resume"]


def test_another_budgets_change_leaves_the_halt_of_an_unknown_model_alone() -> None:
    deny = budget(cap(NANOS_MAX), unknown_model="deny")
    for scope in (AGENT, "team:acme/research"):
        denying = budget(cap(NANOS_MAX), unknown_model="deny", scope=scope)
        line = Line(denying)
        assert told(line.spend(1, model="strange")) == ["halt"]
        assert told(line.change(denying, budget(id="other"))) == []
    assert deny.unknown_model == "deny"


def test_new_prices_or_a_milder_budget_lift_the_halt_of_an_unknown_model() -> None:
    deny = budget(cap(NANOS_MAX), unknown_model="deny")
    line = Line(deny)
    (halt,) = line.spend(1, model="strange").commands
    (resume,) = line.change(deny, prices=book(row(), row("strange"), version="test+2")).commands
    assert (resume.action, resume.key, resume.reason) == ("resume", halt.key, "prices were changed")
    assert resume.seq > halt.seq
    assert told(line.spend(1, model="strange")) == []
    line = Line(deny)
    line.spend(1, model="strange")
    assert told(line.change(budget(cap(NANOS_MAX), unknown_model="ceiling"))) == ["resume"]
    assert told(line.spend(1, model="strange")) == []


def test_a_denial_in_shadow_halts_when_the_budget_leaves_it() -> None:
    line = Line(budget(cap(NANOS_MAX), unknown_model="deny", shadow=True))
    line.spend(1, model="strange")
    effects = line.change(budget(cap(NANOS_MAX), unknown_model="deny"))
    assert effects.commands == []
    assert told(line.spend(1, model="strange")) == ["halt"]


def test_a_budget_for_an_agent_that_spent_before_it_counts_from_the_windows_start() -> None:
    line = Line()
    line.spend(100)
    assert told(line.change(budget(cap(100)))) == ["halt"]
    assert Effects() == line.change(budget(cap(100)))
