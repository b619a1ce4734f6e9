"""The dashboards: which question, which panels, in which order."""

import json
from typing import Any, Final

from spendfuse.grafana.classic import build
from spendfuse.grafana.spec import TABLE, TIME_SERIES, Annotation, Panel, Row, Variable

WALLET_UID: Final = "spendfuse-wallet"
ROLLUP_INTERVAL: Final = "1m"
"""The least interval of what is drawn from spend_1m: there is nothing finer in it."""

_USD: Final = "currencyUSD"
_PERCENT: Final = "percentunit"
_CAP_STEPS: Final = ((None, "green"), (0.8, "yellow"), (0.9, "orange"), (1.0, "red"))
_NONE_IS_GOOD: Final = ((None, "green"), (0.000001, "red"))
_ACTION_COLORS: Final = {
    "halt": "red", "degrade": "orange", "warn": "yellow", "resume": "green",
    "halted": "red", "degraded": "orange", "warned": "yellow", "armed": "green",
}  # fmt: skip
_ACTION: Final = {
    "mappings": [
        {"type": "value", "options": {word: {"color": color, "index": place}}}
        for place, (word, color) in enumerate(_ACTION_COLORS.items())
    ],
    "custom.cellOptions": {"type": "color-text"},
}
_USED_BAR: Final = {
    "unit": _PERCENT,
    "min": 0,
    "max": 1.2,
    "thresholds": {"mode": "absolute", "steps": [{"value": value, "color": color} for value, color in _CAP_STEPS]},
    "custom.cellOptions": {"type": "gauge", "mode": "gradient"},
}
_TIME: Final = {"unit": "dateTimeAsIso"}


def _narrow_to(variable: str, keep: tuple[str, ...]) -> dict[str, Any]:
    """Return a link of a cell to this dashboard, for its value alone."""
    kept = "&".join(f"${{{name}:queryparam}}" for name in keep)
    url = f"/d/{WALLET_UID}?{kept}&var-{variable}=${{__value.raw}}&${{__url_time_range}}"
    return {"links": [{"title": f"Only this {variable}", "url": url, "targetBlank": False}]}


_WALLET: Final[tuple[Row | Panel, ...]] = (
    Row(1, "Is the wallet safe right now?"),
    Panel(2, "Spend today", "spend_today", "stat", TIME_SERIES, 5, 5, _USD, calc="sum"),
    Panel(3, "Burn rate (USD/h)", "burn_rate", "stat", TIME_SERIES, 5, 5, _USD, least_interval=ROLLUP_INTERVAL),
    Panel(4, "Agents halted", "agents_halted", "stat", TABLE, 4, 5, "none", thresholds=((None, "green"), (1, "red"))),
    Panel(5, "Spend after halt", "spend_after_halt", "stat", TABLE, 5, 5, _USD, thresholds=_NONE_IS_GOOD),
    Panel(
        6, "Cache hit rate", "cache_hit_rate", "stat", TABLE, 5, 5, _PERCENT,
        thresholds=((None, "orange"), (0.5, "green")), field_config={"min": 0, "max": 1},
    ),
    Panel(
        7, "Caps that have spoken: how much is used", "caps_used", "bargauge", TABLE, 24, 7, _PERCENT,
        thresholds=_CAP_STEPS, field_config={"min": 0, "max": 1.2},
    ),
    Row(8, "Where does the money go?"),
    Panel(9, "Spend by team", "spend_by_team", "timeseries", TIME_SERIES, 12, 9, _USD, least_interval=ROLLUP_INTERVAL),
    Panel(
        10, "Spend by agent (top 10)", "spend_by_agent", "timeseries", TIME_SERIES, 12, 9, _USD,
        least_interval=ROLLUP_INTERVAL,
    ),
    Panel(11, "Spend by model", "spend_by_model", "bargauge", TABLE, 8, 9, _USD, field_config={"min": 0}),
    Panel(
        12, "Tokens by counter", "tokens_by_kind", "timeseries", TIME_SERIES, 16, 9, "short",
        least_interval=ROLLUP_INTERVAL,
    ),
    Panel(
        13, "Agents by spend, and what they were told", "agents_by_spend", "table", TABLE, 24, 10, "short",
        columns={
            "state": _ACTION,
            "last_command": _ACTION,
            "commanded_at": _TIME,
            "last_call": _TIME,
            "cost": {"unit": _USD, "decimals": 6},
            "cache_hit": {"unit": _PERCENT, "decimals": 0},
            "team": _narrow_to("team", ("datasource", "workspace")),
            "agent": _narrow_to("agent", ("datasource", "workspace", "team")),
        },
    ),
    Row(14, "Did the fuse hold?"),
    Panel(15, "Halt lag", "halt_lag", "stat", TABLE, 6, 10, "ms", options={"textMode": "value_and_name"}),
    Panel(
        16, "Latest commands", "commands_latest", "table", TABLE, 18, 10, "short",
        columns={
            "issued_at": _TIME,
            "action": _ACTION,
            "used": _USED_BAR,
            "quickest_lag": {"unit": "ms", "displayName": "quickest halt lag"},
            "slowest_lag": {"unit": "ms", "displayName": "slowest halt lag"},
            "cap_of": {"displayName": "cap"},
            "issued_by": {"displayName": "by"},
        },
    ),
    Row(17, "How old is what is shown?"),
    Panel(18, "Audit lag", "audit_lag", "timeseries", TIME_SERIES, 24, 7, "s"),
)  # fmt: skip

_VARIABLES: Final = (
    Variable("workspace", "Workspace", "variable_workspace", several=False),
    Variable("team", "Team", "variable_team", several=True),
    Variable("agent", "Agent", "variable_agent", several=True),
)
_ANNOTATIONS: Final = (Annotation("Commands", "annotation_commands", "red"),)


def panels() -> list[Panel]:
    """Return the panels of every dashboard; rows are not panels."""
    return [element for element in _WALLET if isinstance(element, Panel)]


def variables() -> tuple[Variable, ...]:
    """Return the variables that a query fills."""
    return _VARIABLES


def annotations() -> tuple[Annotation, ...]:
    """Return the annotations."""
    return _ANNOTATIONS


def dashboard(name: str) -> dict[str, Any]:
    """Return a dashboard of DASHBOARDS as Grafana's classic JSON."""
    if name not in DASHBOARDS:
        raise KeyError(f"there is no dashboard {name!r}: there are {', '.join(DASHBOARDS)}")
    return build(
        WALLET_UID,
        "Live wallet",
        "What the agents spend, what they are told, and whether the telling worked. Times are UTC, money is USD.",
        _WALLET,
        _VARIABLES,
        _ANNOTATIONS,
    )


def text(name: str) -> str:
    """Return a dashboard as the bytes that are committed."""
    return json.dumps(dashboard(name), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


DASHBOARDS: Final = ("wallet",)
"""The names of the dashboards: `deploy/grafana/dashboards/<name>.json`."""
