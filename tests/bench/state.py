"""What state costs: memory of a worker for each agent, and how long it takes to be ready again with that state.

    python tests/bench/state.py [--agents 100000] [--calls 2]

Fills a worker on a real Kafka with agents, each with a run of its own, through packed usage; kills it with -9, starts
it again, stops it in order, starts it once more. The sums of the changelog must be exact each time, or the run fails.
Memory is resident (RSS); `peak` is the kernel's high-water mark. After a kill, the group first waits for the session of
the dead (SPENDFUSE_SESSION_TIMEOUT_MS), which the orderly restart does not.
"""

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

import psutil
from aiokafka import AIOKafkaConsumer
from platform_under_test import Platform, platform, publish_budgets
from rich.console import Console
from rich.table import Table
from throughput import COST_NANOS, TOKENS, budgets, produce

from chaos import oracle
from chaos.stage import _read
from spendfuse.client.connection import consumer_options
from spendfuse.wire.base import encode, from_us
from spendfuse.wire.topics import USAGE
from spendfuse.wire.usage import Usage, UsagePack

PACK = 500
SETTLE_S = 600.0
LOOK_S = 3.0
READY_S = 600.0
MIB = 1_048_576
KIB = 1_024
TABLES = ("spendfuse-scopes-changelog", "spendfuse-shared-changelog")


def messages(agents: int, calls: int, first: int = 0) -> list[tuple[bytes, bytes]]:
    """Return packs in which every agent makes its calls, one after the other."""
    ts = from_us(time.time_ns() // 1_000)
    made = [
        Usage(
            id=f"state-{first + nth}-{agent}", ts=ts, workspace="acme", team=f"team-{agent % 50}",
            agent=f"agent-{agent}", run=f"run-{agent}", provider="anthropic", model="claude-sonnet-4-6", tokens=TOKENS,
        )
        for nth in range(calls)
        for agent in range(agents)
    ]  # fmt: skip
    return [(b"pack", encode(UsagePack(usages=made[start : start + PACK]))) for start in range(0, len(made), PACK)]


async def check_sums(run: Platform, agents: int, calls: int) -> tuple[int, int]:
    """Wait until both tables hold every call of every agent, exactly; return (records, distinct keys) of `scopes`."""
    give_up_at = time.monotonic() + SETTLE_S
    while True:
        consumer = AIOKafkaConsumer(**consumer_options(run.broker, "bench"))
        await consumer.start()
        try:
            scopes, shared = [await _read(consumer, topic) for topic in TABLES]
        finally:
            await consumer.stop()
        wrong = _wrong(scopes, shared, agents, calls)
        if wrong is None:
            return len(scopes), len({key for _, _, key, _ in scopes})
        if time.monotonic() > give_up_at:
            raise SystemExit(f"the tables are not what was sent: {wrong}")
        await asyncio.sleep(LOOK_S)


def _wrong(scopes: list[oracle.Record], shared: list[oracle.Record], agents: int, calls: int) -> str | None:
    found, public = oracle.tables(scopes, shared=False), oracle.tables(shared, shared=True)
    for number in range(agents):
        sums = _month(found, f"agent:acme/team-{number % 50}/agent-{number}")
        if sums != [calls * COST_NANOS, calls * TOKENS.total, calls]:
            return f"agent-{number} has {sums} after {calls} calls"
    whole = _month(public, "workspace:acme")
    wanted = [agents * calls * COST_NANOS, agents * calls * TOKENS.total, agents * calls]
    return None if whole == wanted else f"workspace:acme has {whole} instead of {wanted}"


def _month(sums: oracle.Sums, scope: str) -> list[int] | None:
    return next((totals for name, totals in sums.get(scope, {}).items() if name.startswith("month@")), None)


class Measured:
    """The rows of the table: when, resident and peak memory, seconds to ready."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, float, float | None]] = []

    def note(self, what: str, pid: int, ready_s: float | None = None) -> float:
        """Add a row; return the resident bytes."""
        resident = float(psutil.Process(pid).memory_info().rss)
        peak = next(
            float(line.split()[1]) * KIB
            for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
            if line.startswith("VmHWM")
        )
        self.rows.append((what, resident, peak, ready_s))
        return resident


def restart(worker: Any, run: Platform, *, kill: bool) -> float:
    """End the worker and start it again; return the seconds from its start to ready."""
    if kill:
        worker.kill()
    else:
        worker.stop(30.0)
    ready = run.directory / "worker.ready"
    ready.unlink(missing_ok=True)
    began = time.monotonic()
    worker.start()
    worker.wait_until(ready.exists, READY_S)
    return time.monotonic() - began


def measure(agents: int, calls: int) -> None:
    """Fill, kill, start, stop, start; print the table."""
    measured = Measured()
    with platform("kafka") as run:
        asyncio.run(publish_budgets(run.broker, budgets()))
        began = time.monotonic()
        with run.worker(SPENDFUSE_READY_TIMEOUT_S=str(READY_S)) as worker:
            empty = measured.note("empty", worker.pid, time.monotonic() - began)
            asyncio.run(produce(run, USAGE.name, messages(agents, calls)))
            asyncio.run(check_sums(run, agents, calls))
            filled = measured.note("filled", worker.pid)
            after_kill = restart(worker, run, kill=True)
            recovered = measured.note("after kill -9", worker.pid, after_kill)
            asyncio.run(produce(run, USAGE.name, messages(agents, 1, calls)))
            records, keys = asyncio.run(check_sums(run, agents, calls + 1))
            measured.note("each agent once more", worker.pid)
            in_order = restart(worker, run, kill=False)
            measured.note("after an orderly stop", worker.pid, in_order)
            asyncio.run(check_sums(run, agents, calls + 1))
    _print(measured, agents)
    print(
        f"{(filled - empty) / agents / KIB:.2f} KiB for each agent and its run once filled, "
        f"{(recovered - empty) / agents / KIB:.2f} KiB recovered; "
        f"the changelog of scopes has {records:,} records of {keys:,} keys"
    )


def _print(measured: Measured, agents: int) -> None:
    table = Table(title=f"a worker with {agents:,} agents")
    for column in ("", "RSS MiB", "peak MiB", "ready after s"):
        table.add_column(column, justify="right" if column else "left")
    for what, resident, peak, ready_s in measured.rows:
        shown = "" if ready_s is None else f"{ready_s:.1f}"
        table.add_row(what, f"{resident / MIB:,.0f}", f"{peak / MIB:,.0f}", shown)
    Console().print(table)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, default=100_000)
    parser.add_argument("--calls", type=int, default=2)
    given = parser.parse_args()
    measure(given.agents, given.calls)


if __name__ == "__main__":
    main()
