"""The plugin's macros, expanded as the plugin does it: its table of macros is the test vector."""

from __future__ import annotations

from typing import Any

import pytest

from spendfuse.grafana import ALL, MacroError, expand, interval_s

# 2025-03-29T22:00:00.123456Z to 2025-03-30T22:00:00.654321Z
FROM_US, TO_US = 1_743_285_600_123_456, 1_743_372_000_654_321
TWO = {"team": ["research", "support"], "agent": "planner-1", "workspace": "acme", "other": ALL}


def expanded(sql: str, interval: int | None = None, **variables: Any) -> str:
    return expand(sql, from_us=FROM_US, to_us=TO_US, variables={**TWO, **variables}, interval=interval)


@pytest.mark.parametrize(
    ("macro", "wanted"),
    [
        ("$__timeFilter(c)", "c >= toDateTime(1743285600) AND c <= toDateTime(1743372000)"),
        (
            "$__timeFilter_ms(c)",
            "c >= fromUnixTimestamp64Milli(1743285600123) AND c <= fromUnixTimestamp64Milli(1743372000654)",
        ),
        ("$__timeInterval(c)", "toStartOfInterval(toDateTime(c), INTERVAL 15 second)"),
        ("$__interval_s", "15"),
        ("$__fromTime", "toDateTime(1743285600)"),
        ("$__toTime", "toDateTime(1743372000)"),
        ("$__fromTime_ms", "fromUnixTimestamp64Milli(1743285600123)"),
        ("$__toTime_ms", "fromUnixTimestamp64Milli(1743372000654)"),
        ("$__timeFrom(c)", "c >= toDateTime(1743285600)"),
        ("$__timeTo(c)", "c <= toDateTime(1743372000)"),
        ("$__dateFilter(c)", "c >= toDate('2025-03-29') AND c <= toDate('2025-03-30')"),
        (
            "$__dateTimeFilter(d, t)",
            (
                "d >= toDate('2025-03-29') AND d <= toDate('2025-03-30')"
                " AND t >= toDateTime(1743285600) AND t <= toDateTime(1743372000)"
            ),
        ),
        (
            "$__dt(d, t)",
            (
                "d >= toDate('2025-03-29') AND d <= toDate('2025-03-30')"
                " AND t >= toDateTime(1743285600) AND t <= toDateTime(1743372000)"
            ),
        ),
        ("$__timeGroup(c, 5m)", "toStartOfInterval(toDateTime(c), INTERVAL 300 second)"),
        ("$__conditionalAll(team IN (1), $team)", "team IN (1)"),
        ("$__conditionalAll(team IN (1), $other)", "1=1"),
    ],
)
def test_a_macro_becomes_what_the_plugin_sends(macro: str, wanted: str) -> None:
    assert expanded(macro, interval=15) == wanted


@pytest.mark.parametrize(
    ("sql", "wanted"),
    [
        ("$__timeFilter(toDateTime(f(a, b)))", ("toDateTime(f(a, b)) >= toDateTime(1743285600) AND "
         "toDateTime(f(a, b)) <= toDateTime(1743372000)")),
        ("$__timeTo($__timeInterval(c))",
         "toStartOfInterval(toDateTime(c), INTERVAL 15 second) <= toDateTime(1743372000)"),
        ("$__conditionalAll($__conditionalAll(a IN (1), $other) AND (b = ')' OR f(c, d)), $team)",
         "1=1 AND (b = ')' OR f(c, d))"),
        ("$__conditionalAll(team IN (${team:singlequote}), $team)", "team IN ('research','support')"),
        ("a -- $__nonsense\n, '-- no comment' /* $__nonsense */", "a \n, '-- no comment'"),
        ("'$__toTime stays' = $__interval_s", "'$__toTime stays' = 15"),
    ],
)  # fmt: skip
def test_macros_nest_and_leave_texts_and_comments_alone(sql: str, wanted: str) -> None:
    assert expanded(sql, interval=15) == wanted


@pytest.mark.parametrize("value", [ALL, [ALL], "", [], ["research", ALL]])
def test_all_leaves_the_condition_out(value: Any) -> None:
    assert expanded("$__conditionalAll(x IN (${team:singlequote}), $team)", team=value) == "1=1"


def test_a_quoted_value_stays_inside_its_quotes() -> None:
    assert expanded("${agent:singlequote}", agent=["o'brien", "x"]) == "'o\\'brien','x'"


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("$team", "write .{team:singlequote}"),
        ("${team}", "write .{team:singlequote}"),
        ("${team:csv}", "write .{team:singlequote}"),
        ("[[team]]", "can inject"),
        ("${nobody:singlequote}", "there is no variable nobody"),
        ("${other:singlequote}", "other is All outside"),
        ("$__conditionalAll(a, ${team:singlequote})", "a plain .name"),
        ("$__conditionalAll(a)", "not 1 arguments"),
        ("$__conditionalAll(a IN (1, $team)", "not closed"),
        ("$__columns(a)", "unknown macro .__columns"),
        ("$__timeFilter", "parentheses"),
        ("$__timeFilter()", "takes 1 argument"),
        ("$__timeFilter(a, b)", "takes 1 argument"),
        ("$__timeGroup(a, often)", "a period such as 5m"),
    ],
)
def test_what_would_fail_or_inject_is_refused(sql: str, says: str) -> None:
    with pytest.raises(MacroError, match=says):
        expanded(sql)


def test_a_range_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(MacroError, match="ends before"):
        expand("1", from_us=TO_US, to_us=FROM_US, variables={})


@pytest.mark.parametrize(
    ("hours", "seconds"),
    [(0.1, 60), (1, 60), (6, 120), (24, 300), (168, 3_600), (720, 10_800), (24 * 90, 43_200), (24 * 365, 86_400)],
)
def test_an_interval_is_grafana_s_and_a_week_is_drawn_from_whole_hours(hours: float, seconds: int) -> None:
    assert interval_s(0, int(hours * 3_600_000_000)) == seconds
