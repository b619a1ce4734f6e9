"""A machine that does to the pipeline whatever befalls a deployment, in any order, beside an oracle of plain integers.

A process of its own order: usage, calls in flight, repetitions, late and early events, crashes at any record, budgets
that change, clocks that jump over the ends of hours, days, months and daylight saving. The laws: sums and ledger are
those of the oracle, agents add up to teams and teams to the workspace, a halt stands exactly where a cap is reached,
more spend never lifts one, sequences grow, and what is read again changes nothing. SPENDFUSE_MACHINES says how many
sequences are tried (`make fuzz` tries many more).
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from chaos.oracle import tables
from pipeline.machine_oracle import (
    AGE_MAX_S,
    AHEAD_MAX_S,
    DAY_S,
    GRACE_S,
    HOUR_S,
    PRICES,
    SECOND_US,
    ZONES,
    Line,
    Oracle,
    utc,
    window,
)
from pipeline.samples import BOOK
from spendfuse.testing import PipelineDriver
from spendfuse.wire import Budget, Cap, WindowSpec, WorkspaceSettings
from spendfuse.wire.base import from_us
from spendfuse.wire.budget import DegradeRule
from spendfuse.wire.topics import COMMANDS, LEDGER

if TYPE_CHECKING:
    from collections.abc import Iterator

MACHINES = int(os.environ.get("SPENDFUSE_MACHINES", "80"))
STEPS = 50
PARTITIONS = 3
AGENTS = ("acme/research/a0", "acme/research/a1", "acme/sales/b0", "other/sales/c0")
RUNS = ("r0", "r1")
STARTS = ("2026-03-28T22:30", "2026-10-24T22:40", "2026-02-28T21:50", "2028-02-28T22:50", "2026-12-31T21:30")
"""Before clocks move in spring and autumn, the end of a short and of a leap February, and of a year."""
AMOUNTS = st.integers(10, 400)
TOKENS = st.integers(0, 60)
AGES_S = st.sampled_from([0] * 8 + [1, 40, 296, 300, 304, GRACE_S, GRACE_S + 1, 2 * HOUR_S + 60, DAY_S, 2 * DAY_S])
AGES_S |= st.sampled_from([-60, -AHEAD_MAX_S, -AHEAD_MAX_S - 1, AGE_MAX_S, AGE_MAX_S + 1])
"""Now and then; at the edges of a rolling window, of the grace, and of what an intake takes."""


def lines() -> dict[str, Line]:
    found = [
        Line("agents", "agent:acme/*/*", "tokens", "day"),
        Line("others", "agent:other/*/*", "tokens", "hour"),
        Line("teams", "team:acme/*", "nano-USD", "month"),
        Line("all", "workspace:acme", "tokens", "hour"),
        Line("runs", "run:acme/*", "tokens", "run"),
        Line("rolling", "team:*/sales", "tokens", 300),
    ]
    return {line.name: line for line in found}


NAMES = st.sampled_from(sorted(lines()))


class Deployment(RuleBasedStateMachine):
    """The driver and the oracle, side by side."""

    usages = Bundle("usages")
    started = Bundle("started")
    fixes = Bundle("fixes")

    @initialize(start=st.sampled_from(STARTS), amounts=st.lists(AMOUNTS, min_size=6, max_size=6))
    def begin(self, start: str, amounts: list[int]) -> None:
        self.oracle = Oracle(utc(start) * SECOND_US, lines())
        zones = [WorkspaceSettings(workspace=name, timezone=zone) for name, zone in ZONES.items()]
        self.pipeline = PipelineDriver(
            budgets=zones,
            price_book=BOOK,
            autoflush=False,
            partitions=PARTITIONS,
            start=self.oracle.now_us,
            state_idle_days=3_650,  # the oracle forgets nothing; tests/pipeline/test_idle.py is about that
        )
        self.version = self.number = self.junk = 0
        for name, amount in zip(self.oracle.lines, amounts, strict=True):
            self._apply(name, amount, shadow=False)

    # -- what emitters do ----------------------------------------------------------------------------------------------

    @rule(target=usages, agent=st.sampled_from(AGENTS), run=st.sampled_from(RUNS), tokens=TOKENS, age_s=AGES_S,
          model=st.sampled_from(["claude", "opus"]), partition=st.integers(0, PARTITIONS - 1))  # fmt: skip
    def emit(self, agent: str, run: str, tokens: int, age_s: int, model: str, partition: int) -> dict[str, Any]:
        usage = self._usage(agent, run, "finished", tokens, age_s, model)
        self._send([usage], partition, rearms=False)
        return usage

    @rule(agents=st.lists(st.sampled_from(AGENTS), min_size=2, max_size=6), run=st.sampled_from(RUNS), tokens=TOKENS,
          partition=st.integers(0, PARTITIONS - 1))  # fmt: skip
    def emit_pack(self, agents: list[str], run: str, tokens: int, partition: int) -> None:
        self._send(
            [self._usage(agent, run, "finished", tokens, 0, "claude") for agent in agents], partition, rearms=False
        )

    @rule(target=started, agent=st.sampled_from(AGENTS), run=st.sampled_from(RUNS), tokens=st.integers(0, 300),
          deadline_s=st.none() | st.sampled_from([30, 300, 1_000, 2 * DAY_S]),
          partition=st.integers(0, PARTITIONS - 1))  # fmt: skip
    def start(
        self, agent: str, run: str, tokens: int, deadline_s: int | None, partition: int
    ) -> tuple[dict[str, Any], int]:
        usage = self._usage(agent, run, "started", tokens, 0, "claude", deadline_s)
        self._send([usage], partition, rearms=False)
        return usage, partition

    @rule(call=started, tokens=st.integers(0, 400), kind=st.sampled_from(["progress", "finished", "finished"]))
    def go_on(self, call: tuple[dict[str, Any], int], tokens: int, kind: str) -> None:
        usage, partition = call
        body = self._usage(usage["path"], usage["run"], kind, tokens, 0, "claude") | {"id": usage["id"]}
        self._send([body], partition, rearms=kind == "finished")

    @rule(usage=usages, partition=st.integers(0, PARTITIONS - 1))
    def repeat(self, usage: dict[str, Any], partition: int) -> None:
        self._send([usage], partition, rearms=False)

    @rule(
        target=fixes, usage=usages, tokens=st.integers(-60, 60).filter(bool), partition=st.integers(0, PARTITIONS - 1)
    )
    def correct(self, usage: dict[str, Any], tokens: int, partition: int) -> dict[str, Any] | None:
        if (usage["path"], usage["id"]) not in self.oracle.charged:
            return None
        self.number += 1
        body = {key: value for key, value in _body(usage).items() if key not in ("kind", "id", "deadline")}
        fix = body | {
            "type": "correction", "id": f"fix-{self.number}", "usage_id": usage["id"], "by": "ada", "reason": "invoice",
            "currency": "USD", "at": from_us(self.oracle.now_us).isoformat(), "tokens": {"output": tokens},
            "cost_nanos": tokens * PRICES[usage["model"]][1],
        }  # fmt: skip
        self._correct(fix, usage["ts_us"], partition)
        return {"fix": fix, "ts_us": usage["ts_us"], "at_us": self.oracle.now_us}

    @rule(known=fixes, partition=st.integers(0, PARTITIONS - 1))
    def repeat_a_correction(self, known: dict[str, Any] | None, partition: int) -> None:
        if known is not None:
            self._correct(known["fix"], known["ts_us"], partition)

    def _correct(self, fix: dict[str, Any], ts_us: int, partition: int) -> None:
        path = f"{fix['workspace']}/{fix['team']}/{fix['agent']}"
        self.oracle.correct(fix, ts_us)
        self.pipeline.emit(json.dumps(fix).encode(), partition=partition, key=path.encode())
        now = self._standing()
        for key, due in self.oracle.due("agent:").items():
            if due is not None:
                assert (key in now) == due, f"a correction frees and stops an agent at once: {key}"

    @rule(value=st.sampled_from([b"", b"{", b'{"usages":[]}', b'{"v":1}']), partition=st.integers(0, PARTITIONS - 1))
    def send_junk(self, value: bytes, partition: int) -> None:
        self.junk += 1
        self.pipeline.emit(value, partition=partition)

    # -- what befalls a worker -----------------------------------------------------------------------------------------

    @rule()
    def crash(self) -> None:
        self.pipeline.crash()

    @rule(records=st.integers(0, 30))
    def crash_soon(self, records: int) -> None:
        self.pipeline.crash(after_records=records)

    @rule()
    def reassign(self) -> None:
        self.pipeline.reassign()

    @rule()
    def flush(self) -> None:
        self.pipeline.flush()

    # -- what people and clocks do -------------------------------------------------------------------------------------

    @rule(name=NAMES, amount=AMOUNTS, shadow=st.sampled_from([False, False, True]),
          records=st.none() | st.integers(0, 12), away_s=st.sampled_from([0, 1, 900]))  # fmt: skip
    def change_budget(self, name: str, amount: int, shadow: bool, records: int | None, away_s: int) -> None:
        """A crash before the flush, and a start some time later: the same is not said anew."""
        self._settle()
        if records is not None:
            self.pipeline.crash(after_records=records)
        self._apply(name, amount, shadow=shadow)
        self._at(self.oracle.now_us + away_s * SECOND_US, settle=False)
        self._settle()

    @rule(name=NAMES, amount=AMOUNTS, agent=st.sampled_from(AGENTS), tokens=TOKENS, records=st.integers(0, 25))
    def change_budget_while_no_worker_runs(self, name: str, amount: int, agent: str, tokens: int, records: int) -> None:
        """A usage may trip a cap, and the worker dies before its state is durable; then the cap is another."""
        self._settle()
        usage = self._usage(agent, "r0", "finished", tokens, 0, "claude")
        body = _body(usage)
        self.oracle.take(body, usage["ts_us"], None)
        self.pipeline.crash(after_records=records, meanwhile=lambda: self._apply(name, amount, shadow=False))
        self.pipeline.emit(json.dumps(body).encode(), partition=0)
        self.pipeline.flush()
        self.pipeline.flush()
        self._settle()
        self._compare()

    @rule(name=NAMES.filter(lambda name: name != "rolling"))
    def withdraw(self, name: str) -> None:
        self._settle()
        self.oracle.lines[name].in_force = False
        self.pipeline.withdraw_budget(name)
        self._settle()

    @rule(seconds=st.sampled_from([1, 5, 29, 31, 299, 301, 900, HOUR_S, 3 * HOUR_S, DAY_S]))
    def wait(self, seconds: int) -> None:
        self._settle()
        self._at(self.oracle.now_us + seconds * SECOND_US)

    @rule(kind=st.sampled_from(["hour", "day", "month"]), zone=st.sampled_from(sorted(ZONES.values())),
          around_s=st.sampled_from([-120, 0, 0, 1, GRACE_S, GRACE_S - 1]))  # fmt: skip
    def wait_for_the_end_of(self, kind: str, zone: str, around_s: int) -> None:
        self._settle()
        end_s = int(window(kind, zone, self.oracle.now_us // SECOND_US).end_s)
        self._at(max(self.oracle.now_us, (end_s + around_s) * SECOND_US))

    # -- what chance alone would seldom hit ----------------------------------------------------------------------------

    @rule(agent=st.sampled_from(AGENTS), tokens=st.integers(100, 400), deadline_s=st.sampled_from([5, 30, 300]),
          other_s=st.none() | st.sampled_from([3, 900]), forgets=st.booleans())  # fmt: skip
    def abandon_calls(self, agent: str, tokens: int, deadline_s: int, other_s: int | None, forgets: bool) -> None:
        """Calls that trip and never finish: what they tripped must not outlast them."""
        for each_s, each in ((deadline_s, tokens), (other_s, 1)):
            if each_s is not None:
                self._send([self._usage(agent, "r0", "started", each, 0, "claude", each_s)], 0, rearms=False)
        self._settle()
        self._compare()
        if forgets:
            self.pipeline.crash()
        self._at(self.oracle.now_us + deadline_s * SECOND_US, settle=False)
        self.pipeline.flush()
        self.pipeline.flush()
        self._compare()

    @rule(agent=st.sampled_from(AGENTS), tokens=st.integers(100, 400), used=st.integers(0, 400))
    def finish_a_call(self, agent: str, tokens: int, used: int) -> None:
        """A call that uses less than it held, or more."""
        self.go_on(self.start(agent, "r1", tokens, None, 2), used, "finished")

    @rule(agent=st.sampled_from(AGENTS), kind=st.sampled_from(["hour", "day", "month"]), too_late=st.booleans(),
          tokens=TOKENS)  # fmt: skip
    def emit_when_the_grace_ends(self, agent: str, kind: str, too_late: bool, tokens: int) -> None:
        self._settle()
        zone = ZONES[agent.partition("/")[0]]
        end_s = int(window(kind, zone, self.oracle.now_us // SECOND_US).end_s)
        self._at((end_s + GRACE_S) * SECOND_US - (not too_late))
        self._send([self._usage(agent, "r1", "finished", tokens, GRACE_S + 1, "claude")], 1, rearms=False)

    @rule(tokens=st.integers(0, 400), age_s=st.sampled_from([299, 300, 301, 304, 305, 306]))
    def emit_at_the_end_of_a_rolling_window(self, tokens: int, age_s: int) -> None:
        self._send([self._usage(AGENTS[2], "r1", "finished", tokens, age_s, "claude")], 1, rearms=False)
        self._settle()
        self._compare()

    # -- the laws ------------------------------------------------------------------------------------------------------

    @rule()
    def compare(self) -> None:
        self._settle()
        self._compare()

    @rule(usage=usages, partition=st.integers(0, PARTITIONS - 1))
    def what_comes_again_changes_nothing(self, usage: dict[str, Any], partition: int) -> None:
        self._settle()
        before = (self._sums(), self._command_ids())
        if (usage["path"], usage["id"]) in self.oracle.charged:  # else it was refused, and may be good by now
            self._send([usage], partition, rearms=False)
        self.pipeline.reassign()
        self._settle()
        assert (self._sums(), self._command_ids()) == before

    @invariant()
    def sequences_grow_and_nothing_is_said_twice(self) -> None:
        if not hasattr(self, "pipeline"):
            return
        last: dict[str, int] = {}
        told: dict[tuple[str, int], dict[str, Any]] = {}
        said: dict[str, tuple[Any, ...]] = {}
        for command in self._commands():
            key = f"{command['scope']}|{command['budget']}"
            same = told.setdefault((key, command["seq"]), command)
            if same is command:
                assert command["seq"] > last.get(key, -1), key
                last[key] = command["seq"]
                order = tuple(str(command.get(name)) for name in ("action", "budget_version", "window", "expires_at"))
                assert said.get(key) != order, f"{key} is told {command['action']} twice"
                said[key] = order
            assert same["id"] == command["id"], "a replay gives the same command again"

    def teardown(self) -> None:
        if hasattr(self, "pipeline"):
            self._settle()
            self._compare()

    # -- how -----------------------------------------------------------------------------------------------------------

    def _usage(
        self, path: str, run: str, kind: str, tokens: int, age_s: int, model: str, deadline_s: int | None = None
    ) -> dict[str, Any]:
        self.number += 1
        ts_us = self.oracle.now_us - age_s * SECOND_US
        deadline_us = None if deadline_s is None else self.oracle.now_us + deadline_s * SECOND_US
        return {
            "path": path, "id": f"call-{self.number}", "ts_us": ts_us, "deadline_us": deadline_us, "kind": kind,
            "run": run, "model": model, "tokens": {"input": tokens, "output": tokens // 7},
        }  # fmt: skip

    def _send(self, usages: list[dict[str, Any]], partition: int, *, rearms: bool) -> None:
        bodies = [_body(usage) for usage in usages]
        before = self._standing()
        first: dict[str, str] = {}
        for usage, body in zip(usages, bodies, strict=True):
            self.oracle.take(body, usage["ts_us"], usage["deadline_us"])
            for key, due in self.oracle.due("agent:").items():
                if due and key not in before:
                    first.setdefault(key, usage["id"])
        message = bodies[0] if len(bodies) == 1 else {"usages": bodies}
        self.pipeline.emit(json.dumps(message).encode(), partition=partition)
        now = self._standing()
        agents = {key: command for key, command in now.items() if key.startswith("agent:")}
        for key, due in self.oracle.due("agent:").items():
            if due is not None:
                assert (key in agents) == due, f"an agent's fuse trips with the usage that crosses its cap: {key}"
        for key, call in first.items():
            assert agents[key]["cause"]["usage_id"] == call, key
        if not rearms:
            assert set(before) <= set(now), "more spend never rearms"

    def _apply(self, name: str, amount: int, *, shadow: bool) -> None:
        line = self.oracle.lines[name]
        scale = 10_000 if line.unit != "tokens" else 1
        line.amount, line.shadow, line.in_force = amount * scale, shadow, True
        self.version += 1
        rolling = isinstance(line.window, int)
        spec = WindowSpec(kind="rolling", rolling_s=line.window) if rolling else WindowSpec(kind=line.window)
        more: dict[str, Any] = {"warn": [5_000]} if name == "teams" else {}
        if name == "all":
            more["degrade"] = DegradeRule(at=7_000, max_output_tokens=100)
        cap = Cap(id="c", unit=line.unit, amount=line.amount, window=spec, **more)
        zone = ZONES["other"] if name == "others" else ZONES["acme"]
        self.pipeline.apply_budget(
            Budget(
                id=name, version=self.version, scope=line.scope, caps=[cap], timezone=zone, shadow=shadow,
                count_holds=not rolling, grace_s=GRACE_S,
            )
        )  # fmt: skip

    def _settle(self) -> None:
        """Let a crash that is still to come happen, then make everything durable."""
        self.pipeline.crash()
        self.pipeline.flush()
        self.pipeline.flush()

    def _at(self, now_us: int, *, settle: bool = True) -> None:
        self.oracle.now_us = now_us
        self.pipeline.at(now_us)
        if settle:
            self._settle()

    def _commands(self) -> Iterator[dict[str, Any]]:
        for record in self.pipeline.records(COMMANDS.name):
            yield json.loads(record.value or b"")

    def _command_ids(self) -> set[str]:
        return {command["id"] for command in self._commands()}

    def _standing(self) -> dict[str, dict[str, Any]]:
        """Return the halts that a guard obeys now, by scope and budget."""
        latest: dict[str, dict[str, Any]] = {}
        for command in self._commands():
            key = f"{command['scope']}|{command['budget']}"
            if command["seq"] >= latest.get(key, command)["seq"]:
                latest[key] = command
        now = from_us(self.oracle.now_us).isoformat(timespec="microseconds").replace("+00:00", "Z")
        return {
            key: command
            for key, command in latest.items()
            if command["action"] == "halt" and command.get("expires_at", "9999") > now
        }

    def _sums(self) -> dict[str, dict[str, list[int]]]:
        records = [(0, number, record.key, record.value) for number, record in enumerate(self.pipeline.changelog)]
        tabled = {record.table: [] for record in self.pipeline.changelog}
        for record, row in zip(self.pipeline.changelog, records, strict=True):
            tabled[record.table].append(row)
        return {
            name: {scope: dict(found) for scope, found in tables(tabled.get(name, []), shared=name == "shared").items()}
            for name in ("scopes", "shared")
        }

    def _compare(self) -> None:
        self._compare_sums()
        self._compare_ledger()
        standing, due = self._standing(), self.oracle.due()
        assert {key for key, must in due.items() if must} <= set(standing), "a cap was reached and nobody is halted"
        assert set(standing) <= {key for key, must in due.items() if must is not False}, "halted without a reason"

    def _compare_sums(self) -> None:
        found = self._sums()
        now_s = self.oracle.now_us / SECOND_US
        for table, rows in found.items():
            scopes = {name for name in self.oracle.sums if table == "scopes" or not name.startswith("agent:")}
            for scope in scopes | set(rows):
                must, have = self.oracle.sums.get(scope, {}), rows.get(scope, {})
                for key in {*must, *have}:
                    if self.oracle.ends[key] + GRACE_S > now_s:
                        assert have.get(key) == must.get(key), (table, scope, key)
                    elif (scope, key) not in self.oracle.corrected:  # some partitions' shares may be forgotten by now
                        assert all(a <= b for a, b in zip(have.get(key, ()), must[key], strict=False)), (scope, key)
        for kind in ("hour", "day", "month"):
            per_level: dict[str, Counter[str]] = defaultdict(Counter)
            for scope, sums in found["scopes"].items():
                for key, (_, _, calls) in sums.items():
                    if key.startswith(kind) and self.oracle.ends[key] > now_s:
                        per_level[scope.partition(":")[0]][key] += calls
            assert per_level["agent"] == per_level["team"] == per_level["workspace"] == per_level["run"]

    def _compare_ledger(self) -> None:
        kinds: Counter[str] = Counter()
        refused = set()
        late: dict[tuple[str, str], bool] = {}
        reached: dict[tuple[int, str, int], tuple[int, int]] = {}
        for record in self.pipeline.records(LEDGER.name):
            for entry in json.loads(record.value or b"")["entries"]:
                origin = (record.partition, entry["topic"], entry["partition"])
                place = (entry["offset"], entry.get("index", 0))
                if place <= reached.get(origin, (-1, -1)):
                    continue
                reached[origin] = place
                kinds[entry["kind"]] += 1
                if entry["kind"] == "rejected":  # said again after a crash, of the same origin
                    refused.add(tuple(entry["data"][name] for name in ("partition", "offset", "index")))
                if entry["kind"] == "charge":
                    usage = entry["usage"]
                    path = f"{usage['workspace']}/{usage['team']}/{usage['agent']}"
                    late[path, usage["id"]] = entry["late"]
        assert late == self.oracle.charged
        assert kinds["charge"] == len(self.oracle.charged), "each call is charged once"
        assert kinds["duplicate"] == self.oracle.duplicates
        assert len(refused) == self.oracle.dead + self.junk
        assert kinds["command"] >= len(self._command_ids()), "every command is in the ledger"


def _body(usage: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON of a usage as an emitter in any language would write it."""
    workspace, team, agent = usage["path"].split("/")
    body = {key: usage[key] for key in ("id", "kind", "run", "model", "tokens")}
    body |= {"workspace": workspace, "team": team, "agent": agent, "provider": "anthropic"}
    body["ts"] = from_us(usage["ts_us"]).isoformat()
    if usage["deadline_us"] is not None:
        body["deadline"] = from_us(usage["deadline_us"]).isoformat()
    return body


Deployment.TestCase.settings = settings(
    max_examples=MACHINES,
    stateful_step_count=STEPS,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
TestDeployment = Deployment.TestCase
