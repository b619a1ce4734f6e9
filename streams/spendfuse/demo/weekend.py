"""The weekend, stopped: 23 subagents run away, 72 hours pass in under a minute, and each is stopped at its cap."""

import asyncio
import contextlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console

from spendfuse.adapters import price_book_file
from spendfuse.adapters.budget_file import parse
from spendfuse.client.clock import ScaledClock
from spendfuse.client.silence import GuardState
from spendfuse.demo.agent import AgentReport, run_agent
from spendfuse.demo.live import LiveView
from spendfuse.demo.plan import MODEL, PROVIDER, RATES, WEEKEND_NANOS, WEEKEND_US, WORKSPACE, AgentPlan, weekend
from spendfuse.demo.report import WeekendReport, print_report, read_report
from spendfuse.demo.stage import DEMO_ENV, DemoError, Total, Trail, apply_budgets, end_if_interrupted, scaled_clock
from spendfuse.embedded.stack import EmbeddedStack
from spendfuse.engine.prices import PriceBook
from spendfuse.engine.sentences import money
from spendfuse.wire.base import from_us
from spendfuse.wire.usage import Tokens, Usage

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

FRIDAY_US: Final = 1_794_592_800_000_000
"""Friday 2026-11-13 18:00 UTC, about when the weekend starts: the clock runs while the machine starts up."""
LEAD_S: Final = 8.0
SPAN_S_DEFAULT: Final = 55
"""Wall seconds of the 72 hours."""
GUARD_FETCH_WAIT_MS: Final = "50"
"""23 guards wait at one embedded broker: 50 ms keeps them from taking half a core (measured)."""
AGENT_START_TIMEOUT_S: Final = 60.0
END_TIMEOUT_S: Final = 20.0
JOIN_TIMEOUT_S: Final = 5.0
STEP_S: Final = 0.1
LAST_STEPS: Final = 8


@dataclass(slots=True)
class _Agents:
    """The processes, their pipes and what they have said."""

    plans: Sequence[AgentPlan]
    processes: list["ForkServerProcess"] = field(default_factory=list)
    pipes: list[Connection] = field(default_factory=list)
    waiting: list[Connection] = field(default_factory=list)
    reports: list[AgentReport] = field(default_factory=list)

    def collect(self) -> bool:
        """Take in reports that have arrived; say whether all agents have ended."""
        # The pipes stay open: an agent takes the end of its pipe for the end of the demo.
        try:
            for pipe in [pipe for pipe in self.waiting if pipe.poll()]:
                self.reports.append(pipe.recv())
                self.waiting.remove(pipe)
        except (EOFError, OSError) as error:
            raise DemoError("an agent's process ended without a report; see its traceback above") from error
        return not self.waiting


def run_weekend(console: Console, *, directory: Path, span_s: int = SPAN_S_DEFAULT, show: bool = True) -> WeekendReport:
    """Run the weekend and return what its trail says; nothing is left running, however it ends.

    `span_s` is how many seconds the 72 hours take. Raises `DemoError`, or what the embedded stack raises.
    """
    plans = weekend()
    without = planned_cost(plans)
    factor = WEEKEND_US // (span_s * 1_000_000)
    setting, clock = scaled_clock(FRIDAY_US, factor, LEAD_S)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["spendfuse.demo.agent"])
    with console.status("starting broker, worker and ClickHouse on this machine"):
        stack = EmbeddedStack(directory, clock=setting, extra_env=DEMO_ENV)
        stack.start()
    try:
        env = {**stack.env, "SPENDFUSE_FETCH_MAX_WAIT_MS": GUARD_FETCH_WAIT_MS}
        with _environment(env), console.status(f"starting {len(plans)} agents, a process each"):
            agents = _start(context, plans)
        try:
            return asyncio.run(_live_weekend(console, stack, agents, clock, without, show=show))
        finally:
            _end(agents)
    finally:
        stack.stop()


def planned_cost(plans: Sequence[AgentPlan]) -> int:
    """Return what the whole plan costs, priced call by call by the shipped book, in nano-dollars.

    Raises `DemoError` when that is not what the weekend cost.
    """
    book = PriceBook.compile(price_book_file.shipped())
    total = 0
    for plan in plans:
        for call in plan.calls():
            total += book.charge(_usage(plan.name, call.tokens)).cost_nanos
    if total != WEEKEND_NANOS:
        raise DemoError(f"the plan costs {money(total, 'USD')} by the price book, not {money(WEEKEND_NANOS, 'USD')}")
    return total


def _usage(agent: str, tokens: Tokens) -> Usage:
    return Usage(
        id="plan", ts=from_us(FRIDAY_US), workspace=WORKSPACE, team="plan", agent=agent, run="plan",
        provider=PROVIDER, model=MODEL, tokens=tokens,
    )  # fmt: skip


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Give children these settings: a forked server inherits the environment of its start."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _start(context: multiprocessing.context.ForkServerContext, plans: Sequence[AgentPlan]) -> _Agents:
    agents = _Agents(plans)
    try:
        for plan in plans:
            ours, theirs = context.Pipe()
            process = context.Process(target=run_agent, args=(plan, theirs), name=plan.name)
            process.start()
            theirs.close()
            agents.processes.append(process)
            agents.pipes.append(ours)
        _expect_live(agents)
    except BaseException:
        _end(agents)
        raise
    return agents


def _expect_live(agents: _Agents) -> None:
    for plan, pipe in zip(agents.plans, agents.pipes, strict=True):
        if not pipe.poll(AGENT_START_TIMEOUT_S):
            raise DemoError(f"{plan.name} did not start within {AGENT_START_TIMEOUT_S:.0f} s")
        state = pipe.recv()
        if state != GuardState.LIVE.value:
            raise DemoError(f"the guard of {plan.name} is {state}, not live: no heartbeat reached it")


def _end(agents: _Agents) -> None:
    for process in agents.processes:
        if process.is_alive():
            process.terminate()
    for process in agents.processes:
        process.join(JOIN_TIMEOUT_S)
        if process.is_alive():
            process.kill()


async def _live_weekend(
    console: Console, stack: EmbeddedStack, agents: _Agents, clock: ScaledClock, without: int, *, show: bool
) -> WeekendReport:
    budgets = parse((files("spendfuse.demo") / "budgets.yaml").read_text(encoding="utf-8"), name="budgets.yaml")
    await apply_budgets(stack.broker, [*budgets.workspaces, *budgets.budgets], from_us(clock()))
    start_us = clock()
    for pipe in agents.pipes:
        pipe.send(start_us)
    agents.waiting = list(agents.pipes)
    end_us = start_us + WEEKEND_US + int(END_TIMEOUT_S * clock.factor * 1_000_000)
    async with LiveView(console, stack, clock, start_us, WEEKEND_US, show=show) as view:
        while not agents.collect():
            end_if_interrupted()
            if (failed := stack.failed()) is not None:
                raise DemoError(f"{failed} ended; its log is in {stack.run_directory}")
            if clock() > end_us:
                raise DemoError("the weekend is over and an agent has not ended")
            view.refresh(len(agents.reports))
            await asyncio.sleep(STEP_S)
        for _ in range(LAST_STEPS):  # until the worker has written the last state, for the last picture
            view.refresh(len(agents.reports))
            await asyncio.sleep(STEP_S)
    return await asyncio.to_thread(_read_back, console, stack, agents, clock.factor, without)


def _read_back(console: Console, stack: EmbeddedStack, agents: _Agents, factor: int, without: int) -> WeekendReport:
    trail = Trail(stack, WORKSPACE)
    try:
        stopped = sum(report.halted for report in agents.reports)
        with console.status("waiting for the last row to reach ClickHouse"):
            trail.wait_for_calls(sum(report.calls for report in agents.reports), stopped)
        emitted = {report.agent: _emitted(report) for report in agents.reports}
        return read_report(trail, without_nanos=without, emitted=emitted, stopped=stopped, factor=factor)
    finally:
        trail.close()


def _emitted(report: AgentReport) -> Total:
    """Return what an agent says it sent, at the plan's own rates, which the book had no part in."""
    fresh, cache_read, cache_write, _, output = report.tokens
    cost = (
        fresh * RATES.input + cache_read * RATES.cache_read + cache_write * RATES.cache_write_5m + output * RATES.output
    )
    return Total(report.calls, report.tokens, cost)


__all__ = ["print_report", "run_weekend"]
