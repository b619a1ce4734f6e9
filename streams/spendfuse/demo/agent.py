"""One subagent of the demo, a process of its own: it would spend on for ever, and asks its guard before every call."""

import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple

from spendfuse.client.clock import ScaledClock, parse_clock
from spendfuse.client.guard import Guard
from spendfuse.client.halted import Halted
from spendfuse.client.meter import Meter
from spendfuse.client.silence import GuardState
from spendfuse.demo.plan import MODEL, PROVIDER, ROOT_RUN, TEAM, WEEKEND_US, WORKFLOW, WORKSPACE, AgentPlan
from spendfuse.engine.windows import SECOND_US
from spendfuse.settings import ClockSettings
from spendfuse.wire.base import from_us

SYNC_TIMEOUT_S: Final = 30.0
SYNC_STEP_S: Final = 0.01
FLUSH_TIMEOUT_S: Final = 10.0


class AgentReport(NamedTuple):
    """What an agent says of its weekend; tokens by kind in the order of the counters."""

    agent: str
    calls: int
    tokens: tuple[int, int, int, int, int]
    halted: bool
    message: str
    dropped: int


def run_agent(plan: AgentPlan, pipe: Connection) -> None:
    """Say `ready` through the pipe, receive the weekend's start (event time, us), live it, and send the report."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the demo, which ends its agents
    names: dict[str, Any] = {"workspace": WORKSPACE, "team": TEAM, "agent": plan.name}
    names |= {"run": f"{ROOT_RUN}-{plan.name}", "root_run": ROOT_RUN, "parent_run": ROOT_RUN}
    clock = parse_clock(ClockSettings.from_env().clock)
    if not isinstance(clock, ScaledClock):
        raise TypeError("an agent of the demo needs a scaled clock in SPENDFUSE_CLOCK")
    # Its halts are of a weekend that is over: nothing to keep.
    with Guard.from_env(**names, guard_dir="off") as guard, Meter.from_env(**names) as meter:
        deadline = time.monotonic() + SYNC_TIMEOUT_S
        while guard.state is not GuardState.LIVE and time.monotonic() < deadline:
            time.sleep(SYNC_STEP_S)
        pipe.send(guard.state.value)
        start_us: int = pipe.recv()
        _end_with_the_demo(pipe)
        report = _weekend(plan, guard, meter, clock, start_us)
        meter.flush(FLUSH_TIMEOUT_S)
        pipe.send(report._replace(dropped=meter.stats.dropped))


def _weekend(plan: AgentPlan, guard: Guard, meter: Meter, clock: ScaledClock, start_us: int) -> AgentReport:
    calls = 0
    sums = [0, 0, 0, 0, 0]
    try:
        for call in plan.calls():
            due_us = start_us + call.offset_us
            while (wait_us := due_us - clock()) > 0:
                time.sleep(wait_us / clock.factor / SECOND_US)
            guard.check()
            tokens = call.tokens
            meter.record(
                provider=PROVIDER, model=MODEL, workflow=WORKFLOW, tokens=tokens, ts=from_us(due_us),
                tags={"cost_center": "r-and-d"},
            )  # fmt: skip
            calls += 1
            each = (tokens.input, tokens.cache_read, tokens.cache_write_5m, tokens.cache_write_1h, tokens.output)
            for index, value in enumerate(each):
                sums[index] += value
    except Halted as halted:
        return AgentReport(plan.name, calls, _five(sums), halted=True, message=str(halted), dropped=0)
    return AgentReport(plan.name, calls, _five(sums), halted=False, message="", dropped=0)


def _five(sums: list[int]) -> tuple[int, int, int, int, int]:
    a, b, c, d, e = sums
    return a, b, c, d, e


def _end_with_the_demo(pipe: Connection) -> None:
    """End this process when the demo's end of the pipe closes, however it died."""

    def watch() -> None:
        try:
            pipe.recv()
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


__all__ = ["WEEKEND_US", "AgentReport", "run_agent"]
