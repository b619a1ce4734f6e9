"""The macros of Grafana's ClickHouse plugin, expanded here: what a panel sends when somebody looks at it.

For tests, and for running the panels without a Grafana. Source: grafana/clickhouse-datasource 4.20.0, pkg/macros and
src/data/CHDatasource.ts; Grafana's variable format `singlequote`. Stricter than the plugin where it would send
something that fails or injects: a variable in any other format, All outside `$__conditionalAll`, an unknown macro.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

ALL: Final = "$__all"
"""The value of a variable whose `All` is chosen."""
POINTS_MAX: Final = 200
"""Points of a graph, set for each of them: a week is then drawn from hours, and a day from five minutes."""
EXPANSIONS_MAX: Final = 1_000
US_PER_S: Final = 1_000_000
US_PER_MS: Final = 1_000

# Grafana's own rounding: below the first number of a pair (ms) an interval becomes the second (s).
_ROUNDED: Final = (
    (90_000, 60), (150_000, 120), (450_000, 300), (750_000, 600), (1_050_000, 900), (1_500_000, 1_200),
    (2_700_000, 1_800), (5_400_000, 3_600), (9_000_000, 7_200), (16_200_000, 10_800), (32_400_000, 21_600),
    (86_400_000, 43_200), (604_800_000, 86_400), (1_814_400_000, 604_800), (3_628_800_000, 2_592_000),
)  # fmt: skip
_YEAR_S: Final = 31_536_000

_CONDITIONAL: Final = "$__conditionalAll("
_QUOTED: Final = r"'(?:\\.|''|[^'\\])*'|`(?:\\.|[^`\\])*`|\"(?:\\.|[^\"\\])*\""
_COMMENT: Final = re.compile(rf"({_QUOTED})|--[^\n]*|/\*.*?\*/", re.DOTALL)
_SKIP: Final = re.compile(_QUOTED)
_VARIABLE: Final = re.compile(r"\$\{(\w+)(?::(\w+))?\}|\$(?!__)([A-Za-z_]\w*)|\[\[")
_NAMED: Final = re.compile(r"\$\{?(\w+)")
_MACRO: Final = re.compile(r"\$__(\w+)")
_GROUP: Final = re.compile(r"(\d+)\s*([smhd])")
_UNIT_S: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}

Variables = Mapping[str, str | Sequence[str]]


class MacroError(ValueError):
    """SQL that the plugin would not expand to what is meant; the message names the place."""


def interval_s(from_us: int, to_us: int, *, least_s: int = 60) -> int:
    """Return the seconds of one point of a graph over a range, as Grafana rounds them for POINTS_MAX points.

    Source: roundInterval in grafana/grafana, packages/grafana-data/src/datetime/rangeutil.ts.
    """
    wanted_ms = max((to_us - from_us) // (US_PER_MS * POINTS_MAX), least_s * 1_000)
    return next((seconds for below_ms, seconds in _ROUNDED if wanted_ms < below_ms), _YEAR_S)


def expand(sql: str, *, from_us: int, to_us: int, variables: Variables, interval: int | None = None) -> str:
    """Return the statement ClickHouse is sent for a range (microseconds since the epoch) and a choice of variables.

    A variable's value is a text or several; `ALL` (alone or in a list) is its All. `interval` is in seconds.
    Raises MacroError.
    """
    if to_us <= from_us:
        raise MacroError("the range ends before it begins")
    text = _COMMENT.sub(lambda match: match[1] or "", sql).strip()
    text = _conditionals(text, variables)
    text = _VARIABLE.sub(lambda match: _variable(match, variables), text)
    macros = _Macros(from_us, to_us, interval or interval_s(from_us, to_us))
    for _ in range(EXPANSIONS_MAX):
        # The rightmost first: the argument of a macro is expanded before the macro.
        found = [match for match in _MACRO.finditer(text) if not _inside_quotes(text, match.start())]
        if not found:
            return text
        text = macros.replace(text, found[-1])
    raise MacroError(f"more than {EXPANSIONS_MAX} macros in one statement")


def _conditionals(text: str, variables: Variables) -> str:
    while (start := text.rfind(_CONDITIONAL)) >= 0:
        arguments, end = _arguments(text, start + len(_CONDITIONAL) - 1)
        if len(arguments) != 2:  # noqa: PLR2004 - a condition and a variable
            raise MacroError(f"$__conditionalAll takes a condition and a variable, not {len(arguments)} arguments")
        condition, variable = arguments
        named = _NAMED.fullmatch(variable.strip())
        if named is None or variable.strip() != f"${named[1]}":
            raise MacroError(f"the second argument of $__conditionalAll is a plain $name, not {variable.strip()}")
        text = text[:start] + ("1=1" if _is_all(_value(named[1], variables)) else condition) + text[end:]
    return text


def _variable(match: re.Match[str], variables: Variables) -> str:
    name, style = match[1], match[2]
    if style != "singlequote":
        raise MacroError(f"{match[0]}: write ${{{name or match[3]}:singlequote}}, every other format can inject")
    value = _value(name, variables)
    if _is_all(value):
        raise MacroError(f"{name} is All outside $__conditionalAll")
    values = [value] if isinstance(value, str) else value
    # Exactly what Grafana does: it escapes quotes, and nothing else.
    return ",".join("'" + each.replace("'", "\\'") + "'" for each in values)


def _value(name: str, variables: Variables) -> str | Sequence[str]:
    if name not in variables:
        raise MacroError(f"there is no variable {name}: there are {', '.join(sorted(variables)) or 'none'}")
    return variables[name]


def _is_all(value: str | Sequence[str]) -> bool:
    return value in {"", ALL} if isinstance(value, str) else not value or ALL in value


class _Macros:
    """The macros of one range and interval."""

    def __init__(self, from_us: int, to_us: int, interval: int) -> None:
        if interval < 1:
            raise MacroError("an interval is at least one second")
        start, end = f"toDateTime({from_us // US_PER_S})", f"toDateTime({to_us // US_PER_S})"
        start_ms = f"fromUnixTimestamp64Milli({from_us // US_PER_MS})"
        end_ms = f"fromUnixTimestamp64Milli({to_us // US_PER_MS})"
        first, last = _date(from_us), _date(to_us)
        self._interval = str(interval)
        self._constants = {
            "interval_s": self._interval,
            "fromTime": start,
            "toTime": end,
            "fromTime_ms": start_ms,
            "toTime_ms": end_ms,
        }
        self._functions: dict[str, Callable[[list[str]], str]] = {
            "timeFilter": lambda a: f"{a[0]} >= {start} AND {a[0]} <= {end}",
            "timeFilter_ms": lambda a: f"{a[0]} >= {start_ms} AND {a[0]} <= {end_ms}",
            "timeFrom": lambda a: f"{a[0]} >= {start}",
            "timeTo": lambda a: f"{a[0]} <= {end}",
            "timeInterval": lambda a: f"toStartOfInterval(toDateTime({a[0]}), INTERVAL {interval} second)",
            "timeGroup": lambda a: f"toStartOfInterval(toDateTime({a[0]}), INTERVAL {_group_s(a[1])} second)",
            "dateFilter": lambda a: f"{a[0]} >= {first} AND {a[0]} <= {last}",
            "dateTimeFilter": lambda a: (
                f"{a[0]} >= {first} AND {a[0]} <= {last} AND {a[1]} >= {start} AND {a[1]} <= {end}"
            ),
        }
        self._functions["dt"] = self._functions["dateTimeFilter"]

    def replace(self, text: str, match: re.Match[str]) -> str:
        """Return the text with one macro replaced."""
        name, start, end = match[1], match.start(), match.end()
        if name in self._constants:
            return text[:start] + self._constants[name] + text[end:]
        if name not in self._functions:
            raise MacroError(f"unknown macro $__{name}")
        if text[end : end + 1] != "(":
            raise MacroError(f"$__{name} needs its arguments in parentheses")
        arguments, end = _arguments(text, end)
        wanted = 2 if name in {"timeGroup", "dateTimeFilter", "dt"} else 1
        if len(arguments) != wanted or not all(argument.strip() for argument in arguments):
            raise MacroError(f"$__{name} takes {wanted} argument(s), not {len(arguments)}")
        return text[:start] + self._functions[name]([argument.strip() for argument in arguments]) + text[end:]


def _date(us: int) -> str:
    return f"toDate('{datetime.fromtimestamp(us // US_PER_S, UTC).date().isoformat()}')"


def _group_s(period: str) -> int:
    found = _GROUP.fullmatch(period.strip(" '"))
    if found is None:
        raise MacroError(f"$__timeGroup takes a period such as 5m, not {period}")
    return int(found[1]) * _UNIT_S[found[2]]


def _inside_quotes(text: str, place: int) -> bool:
    return any(match.start() < place < match.end() for match in _SKIP.finditer(text))


def _arguments(text: str, opening: int) -> tuple[list[str], int]:
    """Return the arguments between a parenthesis and its partner, and the place behind it."""
    depth, begin, place, arguments = 0, opening + 1, opening, []
    while place < len(text):
        if quoted := _SKIP.match(text, place):
            place = quoted.end()
            continue
        letter = text[place]
        depth += (letter == "(") - (letter == ")")
        if (letter == "," and depth == 1) or depth == 0:
            arguments.append(text[begin:place])
            begin = place + 1
        place += 1
        if depth == 0:
            return arguments, place
    raise MacroError(f"a parenthesis is not closed: {text[opening : opening + 40]}")
