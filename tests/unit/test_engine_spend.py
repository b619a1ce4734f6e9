"""What a scope has spent: rolling slots against a plain list, late usage, pruning, and the sum of partitions."""

from hypothesis import given, settings
from hypothesis import strategies as st

from factories import DAY, HOUR, MINUTE, NOW, SECOND, at
from spendfuse.engine.spend import HOLDS_MAX, Hold, Plan, Spend, merged
from spendfuse.engine.windows import calendar_window
from spendfuse.wire.base import NANOS_MAX

UTC_KINDS = (("hour", "UTC"), ("day", "UTC"), ("month", "UTC"))


def plan(*, calendar=UTC_KINDS, rolling=(), is_run=False, grace_us=HOUR) -> Plan:  # noqa: ANN001 - the defaults say it
    return Plan(calendar, rolling, is_run, grace_us)


def key(kind: str, ts_us: int) -> str:
    return calendar_window(kind, "UTC", ts_us).key


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([300, 360, 3_600, 86_400]),
    st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 400), st.integers(1, 50)), max_size=30),
    st.integers(0, 40_000),
)
def test_a_rolling_sum_is_never_too_low_and_at_most_one_slot_too_long(
    length_s: int, steps: list[tuple[int, int, int]], later: int
) -> None:
    """Each step: milliparts of the window until the next usage, how late the usage is in them, and what it cost."""
    part_us = length_s * SECOND // 1_000
    spend, seen, now_us = Spend(), [], NOW
    for wait, late, nanos in steps:
        now_us += wait * part_us // 100
        ts_us = now_us - late * part_us
        spend.add(plan(rolling=(length_s,)), ts_us, now_us, nanos, 1)
        seen.append((ts_us, nanos))
    now_us += later * part_us // 100
    whole_us, slot_us = length_s * SECOND, length_s * SECOND // 60
    exact = sum(nanos for ts_us, nanos in seen if ts_us > now_us - whole_us)
    one_slot_more = sum(nanos for ts_us, nanos in seen if ts_us > now_us - whole_us - slot_us)
    assert exact <= spend.in_rolling(length_s, now_us)[0] <= one_slot_more
    # Remembered slots are bounded: the running one, the 60 before it, and nothing older at the time of an addition.
    assert len(spend.rolling.get(length_s, {})) <= 61


def test_a_usage_ahead_of_the_clock_counts_in_a_rolling_window_at_once() -> None:
    spend = Spend()
    spend.add(plan(rolling=(300,)), NOW + 5 * MINUTE, NOW, 7, 1)
    assert spend.in_rolling(300, NOW)[0] == 7
    assert spend.in_rolling(300, NOW + 10 * MINUTE)[0] == 7
    assert spend.in_rolling(300, NOW + 11 * MINUTE)[0] == 0


def test_late_usage_changes_its_window_until_its_grace_is_over_and_not_later() -> None:
    spend, yesterday = Spend(), at("2026-11-22T23:30:00Z")
    midnight = at("2026-11-23T00:00:00Z")
    assert spend.add(plan(), yesterday, midnight + HOUR - 1, 5, 1) is False
    assert spend.in_window(key("day", yesterday))[0] == 5
    assert spend.add(plan(), yesterday, midnight + HOUR, 6, 1) is True
    assert spend.in_window(key("day", yesterday))[0] == 5
    assert spend.in_window(key("month", yesterday))[0] == 11, "the month is still open"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3 * HOUR), st.integers(0, 30 * HOUR), st.integers(1, 9)), max_size=40),
    st.sampled_from([0, HOUR, 7 * DAY]),
)
def test_pruning_never_takes_what_may_still_be_added_to(steps: list[tuple[int, int, int]], grace_us: int) -> None:
    spend, kept, now_us = Spend(), plan(grace_us=grace_us), NOW
    exact: dict[str, int] = {}
    open_until: dict[str, int] = {}
    for wait_us, late_us, nanos in steps:
        now_us += wait_us
        ts_us = now_us - late_us
        missed = spend.add(kept, ts_us, now_us, nanos, 1)
        for kind, zone in UTC_KINDS:
            window = calendar_window(kind, zone, ts_us)
            open_until[window.key] = window.end_us + grace_us
            if open_until[window.key] > now_us:
                exact[window.key] = exact.get(window.key, 0) + nanos
            else:
                assert missed
    for name, nanos in exact.items():
        if open_until[name] > now_us:
            assert spend.in_window(name)[0] == nanos
    # What is kept is bounded: the hours and days of the grace (an hour at least), the month, and what runs.
    assert len(spend.windows) <= (grace_us // HOUR + 3) + (grace_us // DAY + 2) + 3


def test_slots_of_a_rolling_budget_that_was_withdrawn_are_forgotten() -> None:
    spend = Spend()
    spend.add(plan(rolling=(300, 600)), NOW, NOW, 1, 1)
    assert set(spend.rolling) == {300, 600}
    spend.add(plan(rolling=(600,)), NOW + HOUR, NOW + HOUR, 1, 1)
    assert set(spend.rolling) == {600}


def test_absurd_money_stops_at_what_the_audit_can_store_whatever_the_order() -> None:
    huge = NANOS_MAX // 2 + 2
    spend = Spend()
    for nanos in (huge, 5, huge):
        spend.add(plan(rolling=(300,), is_run=True), NOW, NOW, nanos, 1)
    for totals in (spend.in_window("run"), spend.in_window(key("day", NOW)), spend.in_rolling(300, NOW)):
        assert totals == [NANOS_MAX, 3, 3]
    assert merged([spend, spend]).in_window("run") == [NANOS_MAX, 6, 6]
    spend.hold("a", Hold(NANOS_MAX, 1, NOW + 1), NOW)
    spend.hold("b", Hold(NANOS_MAX, 1, NOW + 1), NOW)
    assert spend.held(NOW) == (NANOS_MAX, 2)


def test_the_sum_of_partitions_adds_windows_and_slots_and_keeps_the_outer_times() -> None:
    one, two = Spend(), Spend()
    one.add(plan(rolling=(300,), is_run=True), NOW, NOW, 3, 1)
    two.add(plan(rolling=(300,), is_run=True), NOW - MINUTE, NOW, 4, 2)
    whole = merged([one, Spend(), two])
    assert whole.in_window("run") == [7, 3, 2]
    assert whole.in_window(key("day", NOW)) == [7, 3, 2]
    assert whole.in_rolling(300, NOW) == [7, 3, 2]
    assert (whole.first_us, whole.newest_us) == (NOW - MINUTE, NOW)
    assert one.in_window("run") == [3, 1, 1], "the parts stay as they were"


def test_holds_are_bounded_and_an_expired_one_makes_room() -> None:
    spend = Spend()
    for nth in range(HOLDS_MAX):
        assert spend.hold(f"call-{nth}", Hold(1, 1, NOW + 1 + (nth > 0)), NOW)
    assert not spend.hold("one-more", Hold(1, 1, NOW + 9), NOW)
    assert spend.hold("call-7", Hold(5, 1, NOW + 9), NOW), "a call that is known needs no room"
    assert spend.hold("one-more", Hold(1, 1, NOW + 9), NOW + 1), "call-0 has run out"
    assert len(spend.holds) == HOLDS_MAX
    assert spend.held(NOW + 8) == (6, 2)
    assert spend.held_until() == NOW + 9
    assert Spend().held_until() == 0
