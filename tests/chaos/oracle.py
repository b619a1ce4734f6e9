"""What must come out, recomputed from the raw bytes of the topics with plain integers.

It imports nothing of the product: JSON, MessagePack read as plain lists, and this file's own arithmetic. Records are
`(partition, offset, key, value)`, in the order of their offsets in each partition.
"""

from __future__ import annotations

import calendar
import json
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Record = tuple[int, int, "bytes | None", "bytes | None"]
Sums = dict[str, dict[str, list[int]]]
"""Scope -> window -> [nanos, tokens, calls]."""
COUNTERS = ("input", "cache_read", "cache_write_5m", "cache_write_1h", "output")
PER = 1_000_000
MEMORY_S = 3_600
"""A calendar window that closed longer ago may have been dropped from the tables."""


def _sums() -> Sums:
    return defaultdict(lambda: defaultdict(lambda: [0, 0, 0]))


@dataclass
class Truth:
    """What the raw usage topic says: every call once, whatever was repeated or is not usage at all."""

    sums: Sums = field(default_factory=_sums)
    calls: int = 0
    duplicates: int = 0
    junk: int = 0
    ids: set[tuple[str, str]] = field(default_factory=set)
    corrections: set[tuple[str, str]] = field(default_factory=set)

    def correct(self, fix: dict[str, Any]) -> None:
        """Add the differences of a correction, unless its agent's id was added before."""
        name = (f"{fix['workspace']}/{fix['team']}/{fix['agent']}", fix["id"])
        if name not in self.corrections:
            self.corrections.add(name)
            _spread(self.sums, fix, [fix["cost_nanos"], _tokens(fix), 0])

    def add(self, usage: dict[str, Any], rates: Mapping[str, list[int]]) -> None:
        """Count one finished call, unless its agent's id was counted before."""
        path = f"{usage['workspace']}/{usage['team']}/{usage['agent']}"
        if (path, usage["id"]) in self.ids:
            self.duplicates += 1
            return
        self.ids.add((path, usage["id"]))
        self.calls += 1
        tokens = [usage["tokens"].get(name, 0) for name in COUNTERS]
        nanos, rest = divmod(sum(n * rate for n, rate in zip(tokens, rates[usage["model"]], strict=True)), PER)
        if rest:
            raise ValueError("choose rates that are whole nano-units for a token: then no rounding rule is needed here")
        _spread(self.sums, usage, [nanos, sum(tokens), 1])


def truth(records: Iterable[Record], book: bytes) -> Truth:
    """Return what the records of `usage.v1` must lead to, at the prices of a book."""
    rates = {row["model"]: [row["rates"][name] for name in COUNTERS] for row in json.loads(book)["rows"]}
    found = Truth()
    for _, _, _, value in records:
        try:
            message = json.loads(value or b"")
            usages = message.get("usages", [message])
        except (ValueError, AttributeError):
            found.junk += 1
            continue
        for usage in usages:
            if usage.get("type") == "correction":
                found.correct(usage)
            else:
                found.add(usage, rates)
    return found


def _tokens(usage: dict[str, Any]) -> int:
    return sum(usage.get("tokens", {}).get(name, 0) for name in COUNTERS)


def _spread(sums: Sums, usage: dict[str, Any], more: list[int]) -> None:
    """Add to every window of every scope of a usage, or of a correction of one."""
    for scope in scopes(usage):
        for window in windows(usage["ts"], is_run=scope.startswith("run:")):
            _add(sums[scope][window], more)


def scopes(usage: dict[str, Any]) -> list[str]:
    """Return whose money a usage is."""
    space, team = usage["workspace"], usage["team"]
    root = usage.get("root_run") or usage["run"]
    return [
        f"agent:{space}/{team}/{usage['agent']}",
        f"team:{space}/{team}",
        f"workspace:{space}",
        f"run:{space}/{root}",
    ]


def windows(ts: str, *, is_run: bool) -> list[str]:
    """Return the windows of an instant in UTC."""
    moment = time.strptime(ts[:19], "%Y-%m-%dT%H:%M:%S")
    second = calendar.timegm(moment)
    month = calendar.timegm((moment.tm_year, moment.tm_mon, 1, 0, 0, 0))
    names = [f"hour@UTC@{second // 3600 * 3600}", f"day@UTC@{second // 86400 * 86400}", f"month@UTC@{month}"]
    return [*names, "run"] if is_run else names


def tables(changelog: Iterable[Record], *, shared: bool) -> Sums:
    """Return the sums that a table's changelog holds: the last record of each key, all partitions together."""
    latest: dict[bytes, bytes] = {}
    for _, _, key, value in changelog:
        if value is None:
            latest.pop(key or b"", None)
        else:
            latest[key or b""] = value
    found = _sums()
    for key, value in latest.items():
        state = msgspec.msgpack.decode(value[1:])
        # A state is [marks, spend, ...] or [{partition: [as of, spend, ...]}, ...]; a spend begins with its windows.
        spends = [part[1] for part in state[0].values()] if shared else [state[1]]
        for spend in spends:
            for window, sums in spend[0].items():
                _add(found[key.decode().partition("/")[2]][window], sums)
    return found


def rollups(records: Iterable[Record]) -> Sums:
    """Return the sums of the newest share of each scope and partition."""
    newest: dict[tuple[str, int], dict[str, Any]] = {}
    for _, _, _, value in records:
        share = json.loads(value or b"")
        key = (share["scope"], share["partition"])
        if key not in newest or share["as_of"] >= newest[key]["as_of"]:
            newest[key] = share
    found = _sums()
    for share in newest.values():
        for window, sums in share["windows"].items():
            _add(found[share["scope"]][window], sums)
    return found


@dataclass
class Ledger:
    """The ledger, trimmed by origin as every reader of it must."""

    sums: Sums = field(default_factory=_sums)
    charges: Counter[tuple[str, str]] = field(default_factory=Counter)
    corrections: Counter[tuple[str, str]] = field(default_factory=Counter)
    commands: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    repeated: int = 0


def ledger(records: Iterable[Record]) -> Ledger:
    """Return what the ledger says."""
    found = Ledger()
    reached: dict[tuple[int, str, int], tuple[int, int]] = {}
    for partition, _, _, value in records:
        for entry in json.loads(value or b"")["entries"]:
            origin, place = (partition, entry["topic"], entry["partition"]), (entry["offset"], entry.get("index", 0))
            if place <= reached.get(origin, (-1, -1)):
                found.repeated += 1
                continue
            reached[origin] = place
            if entry["kind"] == "charge":
                usage = entry["usage"]
                path = f"{usage['workspace']}/{usage['team']}/{usage['agent']}"
                found.charges[(path, usage["id"])] += 1
                _spread(found.sums, usage, [entry["charge"]["cost_nanos"], _tokens(usage), 1])
            elif entry["kind"] == "correction":
                fix = entry["correction"]
                found.corrections[(f"{fix['workspace']}/{fix['team']}/{fix['agent']}", fix["id"])] += 1
                _spread(found.sums, fix, [fix["cost_nanos"], _tokens(fix), 0])
            elif entry["kind"] == "duplicate":
                found.duplicates += 1
            elif entry["kind"] == "command":
                found.commands[entry["command"]["id"]] += 1
    return found


def expected_halts(sums: Sums, budgets: Iterable[Record]) -> set[str]:
    """Return the keys `scope|budget|cap` that must have halted: caps of calendar windows in UTC."""
    due = set()
    for _, _, _, value in budgets:
        budget = json.loads(value or b"")
        for scope, by_window in sums.items():
            if not _matches(scope, budget["scope"]):
                continue
            for cap in budget["caps"]:
                column = 1 if cap["unit"] == "tokens" else 0
                kind = cap["window"]["kind"] + "@"
                if any(spent[column] >= cap["amount"] for name, spent in by_window.items() if name.startswith(kind)):
                    due.add(f"{scope}|{budget['id']}|{cap['id']}")
    return due


def _matches(scope: str, pattern: str) -> bool:
    left, right = scope.replace(":", "/").split("/"), pattern.replace(":", "/").split("/")
    return len(left) == len(right) and all(map(fnmatchcase, left, right))


@dataclass
class Topics:
    """The raw records of a deployment, by topic."""

    usage: list[Record]
    budgets: list[Record]
    commands: list[Record]
    ledger: list[Record]
    rollups: list[Record]
    scopes: list[Record]
    shared: list[Record]


@dataclass
class Verdict:
    """The comparison: `differences` is empty when everything is exact."""

    truth: Truth
    ledger: Ledger
    halts: int
    differences: list[str]


def judge(topics: Topics, book: bytes, clickhouse: Iterable[list[Any]] | None = None) -> Verdict:
    """Compare tables, rollups, commands, ledger and ClickHouse with what the raw usage topic leads to.

    `clickhouse` are rows of [agent path, nanos, tokens, charges]; None when there is no database to compare.
    """
    fact, said = truth(topics.usage, book), ledger(topics.ledger)
    public = {scope: sums for scope, sums in fact.sums.items() if not scope.startswith("agent:")}
    wrong = [
        *_compare("scopes table", fact.sums, tables(topics.scopes, shared=False)),
        *_compare("shared table", public, tables(topics.shared, shared=True)),
        *_compare("rollups", public, rollups(topics.rollups)),
        *_compare("ledger", fact.sums, said.sums),
        *(f"ledger: {key} is charged {count} times" for key, count in said.charges.items() if count != 1),
        *(f"ledger: {key} is never charged" for key in fact.ids - set(said.charges)),
        *(f"ledger: {key} is corrected {count} times" for key, count in said.corrections.items() if count != 1),
        *(f"ledger: {key} is never corrected" for key in fact.corrections - set(said.corrections)),
    ]
    if said.duplicates != fact.duplicates:
        wrong.append(f"ledger: {said.duplicates} duplicates, and {fact.duplicates} were sent")
    due = expected_halts(fact.sums, topics.budgets)
    wrong += _commands(topics.commands, due, said)
    if clickhouse is not None:
        stored = {row[0]: [int(number) for number in row[1:]] for row in clickhouse}
        agents = {
            scope.removeprefix("agent:"): next(sums for name, sums in by_window.items() if name.startswith("month@"))
            for scope, by_window in fact.sums.items()
            if scope.startswith("agent:")
        }
        wrong += [
            f"ClickHouse: {agent}: {stored.get(agent)} instead of {agents.get(agent)}"
            for agent in sorted(set(stored) | set(agents))
            if stored.get(agent) != agents.get(agent)
        ]
    return Verdict(fact, said, len(due), wrong)


def _commands(records: Iterable[Record], due: set[str], said: Ledger) -> list[str]:
    ids: dict[str, set[str]] = defaultdict(set)
    everything = set()
    for _, _, key, value in records:
        command = json.loads(value or b"")
        everything.add(command["id"])
        if command["action"] == "halt":
            ids[(key or b"").decode()].add(command["id"])
    return [
        *(f"commands: {key} is not halted" for key in sorted(due - set(ids))),
        *(f"commands: {key} is halted and need not be" for key in sorted(set(ids) - due)),
        *(f"commands: {key} has {len(same)} halts" for key, same in sorted(ids.items()) if len(same) != 1),
        *(f"ledger: command {name} is not recorded" for name in sorted(everything - set(said.commands))),
        *(f"ledger: command {name} is recorded, and never was" for name in sorted(set(said.commands) - everything)),
    ]


def _compare(name: str, fact: Sums, found: Sums) -> list[str]:
    wrong = []
    closed = int(time.time()) - MEMORY_S
    for scope in sorted(set(fact) | set(found)):
        for window in sorted(set(fact.get(scope, {})) | set(found.get(scope, {}))):
            must, is_ = fact.get(scope, {}).get(window), found.get(scope, {}).get(window)
            forgotten = is_ is None and window.startswith("hour@") and int(window.split("@")[2]) + 3_600 < closed
            if must != is_ and not forgotten:
                wrong.append(f"{name}: {scope} {window}: {is_} instead of {must}")
    return wrong


def _add(sums: list[int], more: Iterable[int]) -> None:
    for column, number in enumerate(more):
        sums[column] += number
