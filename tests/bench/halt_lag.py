"""Halt lag: from the crossing usage handed to the meter until `check()` raises in another process.

    python tests/bench/halt_lag.py [--broker embedded|kafka] [--trips 100] [--rate 1000]

A loader emits `--rate` usages a second of other agents meanwhile. Both processes read one machine's clock.
"""

import argparse
import asyncio
import multiprocessing
import os
import time
from multiprocessing.connection import Connection

from platform_under_test import platform, publish_budgets

from spendfuse.client.guard import Guard, GuardState, Halted
from spendfuse.client.meter import Meter
from spendfuse.wire.budget import Budget, Cap, WindowSpec

READY_S = 20.0
TRIP_S = 20.0


def guard_process(pipe: Connection) -> None:
    """For each agent named through the pipe: say when the guard is live, then when it was halted (monotonic ns)."""
    while (agent := pipe.recv()) is not None:
        with Guard.from_env(workspace="acme", team="research", agent=agent, run="r") as guard:
            deadline = time.monotonic() + READY_S
            while guard.state is not GuardState.LIVE and time.monotonic() < deadline:
                time.sleep(0.005)
            pipe.send(guard.state.value)
            deadline = time.monotonic() + TRIP_S
            halted_at = 0
            while not halted_at and time.monotonic() < deadline:
                try:
                    guard.check()
                    time.sleep(0.0005)
                except Halted:
                    halted_at = time.monotonic_ns()
            pipe.send(halted_at)


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


def measure(kind: str, trips: int, rate: int) -> list[float]:
    """Return the lags in milliseconds."""
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
            loader.start()
            try:
                return [_trip(f"agent-{number}", ours) for number in range(trips)]
            finally:
                stop.set()
                ours.send(None)
                for process in (guard, loader):
                    process.join(10)
                    process.kill()


def _trip(agent: str, pipe: Connection) -> float:
    with Meter.from_env(workspace="acme", team="research", agent=agent, run="r") as meter:
        pipe.send(agent)
        state = pipe.recv()
        if state != "live":
            raise SystemExit(f"the guard of {agent} is {state}")
        meter.record(provider="anthropic", model="claude-sonnet-4-6", input=100_000)
        meter.flush(5)
        began = time.monotonic_ns()
        meter.record(provider="anthropic", model="claude-sonnet-4-6", output=100_000)
        if not pipe.poll(TRIP_S + 5) or not (halted_at := pipe.recv()):
            raise SystemExit(f"{agent} was never halted")
        return (halted_at - began) / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", choices=["embedded", "kafka"], default="kafka")
    parser.add_argument("--trips", type=int, default=100)
    parser.add_argument("--rate", type=int, default=1_000)
    given = parser.parse_args()
    lags = sorted(measure(given.broker, given.trips, given.rate))

    def at(percent: int) -> float:
        return lags[max(0, -(-len(lags) * percent // 100) - 1)]

    print(
        f"{given.broker}, {given.trips} trips beside {given.rate} usages/s: "
        f"halt lag p50 {at(50):.1f} ms, p90 {at(90):.1f} ms, p99 {at(99):.1f} ms, max {lags[-1]:.1f} ms"
    )


if __name__ == "__main__":
    main()
