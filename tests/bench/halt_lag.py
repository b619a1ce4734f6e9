"""Halt lag: from the crossing usage handed to the meter until `check()` raises in another process.

    python tests/bench/halt_lag.py [--broker embedded|kafka] [--trips 100] [--rate 1000]

A loader emits `--rate` usages a second of other agents meanwhile. Both processes read one machine's clock.
By hop: `emit` from the record to its Kafka timestamp (the meter's linger), `decide` from there to the command's issue
(broker, intake, broker, meter), `obey` from there until `check()` raises (broker, guard, and half a millisecond of the
agent's own pause between two checks). Also what `check()` costs an agent that may go on.
"""

import argparse
import asyncio
import multiprocessing
import os
import time
import timeit
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple

from platform_under_test import platform, publish_budgets

from spendfuse.client.guard import Guard
from spendfuse.client.halted import Halted
from spendfuse.client.meter import Meter
from spendfuse.client.silence import GuardState
from spendfuse.wire.base import to_us
from spendfuse.wire.budget import Budget, Cap, WindowSpec

READY_S = 20.0
TRIP_S = 20.0
CHECKS = 200_000
CHECK_ROUNDS = 5


class Trip(NamedTuple):
    """One trip in milliseconds: the whole by the monotonic clock, its hops by the wall clock."""

    whole: float
    emit: float
    decide: float
    obey: float


class Seen(NamedTuple):
    """What the guard's process saw: when `check` raised by both clocks, and what the command says of itself."""

    halted_ns: int
    halted_us: int
    issued_us: int
    produced_ms: int


def guard_process(pipe: Connection) -> None:
    """Say what `check` costs; then, for each agent named through the pipe, when its guard is live and how it halted."""
    with Guard.from_env(workspace="acme", team="research", agent="nobody", run="r") as guard:
        _until_live(guard)
        rounds = timeit.repeat(guard.check, number=CHECKS, repeat=CHECK_ROUNDS)
    pipe.send(min(rounds) / CHECKS * 1e9)
    while (agent := pipe.recv()) is not None:
        with Guard.from_env(workspace="acme", team="research", agent=agent, run="r") as guard:
            _until_live(guard)
            pipe.send(guard.state.value)
            deadline = time.monotonic() + TRIP_S
            seen = None
            while seen is None and time.monotonic() < deadline:
                try:
                    guard.check()
                    time.sleep(0.0005)
                except Halted as halted:
                    seen = _seen(halted)
            pipe.send(seen)


def _until_live(guard: Guard) -> None:
    deadline = time.monotonic() + READY_S
    while guard.state is not GuardState.LIVE and time.monotonic() < deadline:
        time.sleep(0.005)


def _seen(halted: Halted) -> Seen:
    halted_ns, halted_us = time.monotonic_ns(), time.time_ns() // 1_000
    command = halted.command
    if command is None or command.cause is None:
        raise SystemExit(f"halted by no command: {halted}")
    return Seen(halted_ns, halted_us, to_us(command.issued_at), command.cause.produced_at_ms)


def load_process(rate: int, stop: "multiprocessing.synchronize.Event") -> None:
    """Emit usages of other agents at a steady rate."""
    with Meter.from_env(workspace="acme", team="load", agent="loader", run="r") as meter:
        began, sent = time.monotonic(), 0
        while not stop.is_set():
            due = int((time.monotonic() - began) * rate)
            while sent < due:
                meter.record(provider="openai", model="gpt-4o-mini", input=1_000, output=100)
                sent += 1
            time.sleep(0.005)


def measure(kind: str, trips: int, rate: int) -> tuple[float, list[Trip]]:
    """Return what a check costs, in nanoseconds, and the trips."""
    context = multiprocessing.get_context("spawn")
    with platform(kind) as run:
        os.environ.update(run.env())
        cap = Cap(id="day", unit="nano-USD", amount=1_000_000_000, window=WindowSpec(kind="day"))
        asyncio.run(
            publish_budgets(run.broker, [Budget(id="agents", version=1, scope="agent:acme/research/*", caps=[cap])])
        )
        stop = context.Event()
        ours, theirs = context.Pipe()
        guard = context.Process(target=guard_process, args=(theirs,), daemon=True)
        loader = context.Process(target=load_process, args=(rate, stop), daemon=True)
        with run.worker():
            guard.start()
            try:
                if not ours.poll(READY_S + TRIP_S):
                    raise SystemExit("the guard's process does not start")
                check_ns = ours.recv()
                loader.start()
                return check_ns, [_trip(f"agent-{number}", ours) for number in range(trips)]
            finally:
                stop.set()
                ours.send(None)
                for process in (guard, loader):
                    if process.pid is not None:
                        process.join(10)
                        process.kill()


def _trip(agent: str, pipe: Connection) -> Trip:
    with Meter.from_env(workspace="acme", team="research", agent=agent, run="r") as meter:
        pipe.send(agent)
        state = pipe.recv()
        if state != "live":
            raise SystemExit(f"the guard of {agent} is {state}")
        meter.record(provider="anthropic", model="claude-sonnet-4-6", input=100_000)
        meter.flush(5)
        began_us, began = time.time_ns() // 1_000, time.monotonic_ns()
        meter.record(provider="anthropic", model="claude-sonnet-4-6", output=100_000)
        if not pipe.poll(TRIP_S + 5) or (seen := pipe.recv()) is None:
            raise SystemExit(f"{agent} was never halted")
        return Trip(
            (seen.halted_ns - began) / 1e6,
            seen.produced_ms - began_us / 1e3,
            seen.issued_us / 1e3 - seen.produced_ms,
            (seen.halted_us - seen.issued_us) / 1e3,
        )


def line(name: str, values: Sequence[float]) -> str:
    """Return a line of percentiles, nearest rank."""
    ordered = sorted(values)

    def at(percent: int) -> float:
        return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]

    return f"{name:9} p50 {at(50):6.1f} ms, p90 {at(90):6.1f} ms, p99 {at(99):6.1f} ms, max {ordered[-1]:6.1f} ms"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", choices=["embedded", "kafka"], default="kafka")
    parser.add_argument("--trips", type=int, default=100)
    parser.add_argument("--rate", type=int, default=1_000)
    given = parser.parse_args()
    began = time.monotonic()
    check_ns, trips = measure(given.broker, given.trips, given.rate)
    took_s = time.monotonic() - began
    print(f"{given.broker}, {given.trips} trips beside {given.rate} usages/s, in {took_s:.0f} s")
    names = {"whole": "halt lag", "emit": " emit", "decide": " decide", "obey": " obey"}
    for field, name in names.items():
        print(line(name, [getattr(trip, field) for trip in trips]))
    print(f"check() of an agent that may go on: {check_ns:.0f} ns, the best of {CHECK_ROUNDS} rounds of {CHECKS:,}")


if __name__ == "__main__":
    main()
