"""Break a running deployment at random, and compare what is left with the raw usage topic: nothing may differ.

    python tests/chaos/chaos.py [--seed 1] [--kills 100] [--nodes 3] [--rate 150] [--keep DIR]
    python tests/chaos/chaos.py --only "restart worker" --apart --kills 20 --nodes 1 --no-audit

Kills (-9) of workers, broker nodes and the audit, pauses longer than a session, orderly restarts, and cuts of the
connections between a worker and the broker, under load. The seed is printed; the same seed gives the same faults in
the same order. Exit 1 when anything differs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    # In place of this file's own directory, where `chaos` would be this file.
    sys.path[:1] = [str(Path(__file__).resolve().parents[2] / "streams"), str(Path(__file__).resolve().parents[1])]

from aiokafka import AIOKafkaProducer

from chaos.load import SPACE, Load
from chaos.oracle import Verdict, judge
from chaos.stage import PARTITIONS, SESSION_MS, Stage, begin
from kraft import kraft_missing
from pipeline.samples import INPUT_NANOS, budget, cap
from spendfuse.client.connection import producer_options
from spendfuse.pipeline.topics import ensure_topics
from spendfuse.wire import encode
from spendfuse.wire.topics import BUDGETS
from workers import WorkerProcess

QUIET_S = 120.0
RECOVERY_S = 60.0
BROKER_REST_S = 10.0
POLL_S = 0.1
DIFFERENCES_SHOWN = 40
WAIT_S_MAX = {"kill worker": SESSION_MS / 1_000 + 6.0, "restart worker": SESSION_MS / 1_000}
"""Longest that a usage may wait for its charge in a fault that has no other beside it.

Of a killed worker nobody hears: its partitions move when its session has run out, and a second or two later their state
is read. One that is told to stop leaves its groups, so nobody waits for a session. The rest is for a busy machine.
"""
WORKERS = ("worker-1", "worker-2")
KINDS = {"kill worker": 30, "kill broker": 15, "kill audit": 8, "pause worker": 17, "restart worker": 10, "cut": 20}
"""The faults, and how often each of a hundred."""


@dataclass(frozen=True)
class Fault:
    """One fault: on what, for how long, how, and whether the next waits until all is charged again."""

    kind: str
    target: str
    hold_s: float
    how: str
    wait: bool
    rest_s: float


def plan(chance: random.Random, count: int, nodes: int, *, audit: bool, only: str | None = None) -> list[Fault]:
    """Return the faults of a run; the first ones are one of each kind; `only`: all of one kind."""
    kinds = {kind: weight for kind, weight in KINDS.items() if audit or kind != "kill audit"}
    if only is not None:
        kinds = {only: 1}
    names = list(kinds)
    chance.shuffle(names)
    names += chance.choices(list(kinds), list(kinds.values()), k=count)
    faults = []
    for kind in names[:count]:
        target = {"kill broker": str(chance.randint(1, nodes)), "kill audit": "audit", "cut": "worker-2"}.get(
            kind, chance.choice(WORKERS)
        )
        hold_s = chance.uniform(0.0, 10.0 if kind in {"pause worker", "cut"} else 3.0)
        how = chance.choice(["reset", "silent"])
        faults.append(Fault(kind, target, hold_s, how, chance.random() < 0.5, chance.uniform(0.2, 2.0)))
    return faults


@dataclass(frozen=True)
class Span:
    """From a fault to the moment when all that was sent before its end was charged."""

    kind: str
    began_at: float
    ended_at: float


def waits_alone(spans: list[Span], waits: list[tuple[float, float]]) -> dict[str, list[float]]:
    """Return, by kind, of each fault that had no other beside it the longest wait in seconds, sorted."""
    found: dict[str, list[float]] = {}
    for span in spans:
        if any(
            other.began_at < span.ended_at and span.began_at < other.ended_at for other in spans if other is not span
        ):
            continue
        within = [end - start for start, end in waits if start < span.ended_at and span.began_at < end]
        found.setdefault(span.kind, []).append(max(within, default=0.0))
    return {kind: sorted(each) for kind, each in found.items()}


@dataclass
class Outcome:
    """What a run did, and what it found."""

    faults: Counter[str] = field(default_factory=Counter)
    recoveries_s: list[float] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    unrecovered: int = 0
    verdict: Verdict | None = None
    quiet_s: float = 0.0


class Run:
    """One run: load, faults, quiescence, comparison."""

    def __init__(self, stage: Stage, load: Load, faults: list[Fault], *, say: bool, apart: bool) -> None:
        """Take what is broken, and how; `apart`: no fault before all of the last one is charged."""
        self.stage, self.load, self.faults, self.say, self.apart = stage, load, faults, say, apart
        self.outcome = Outcome()
        self._broker_healed_at = 0.0
        self._recovering: set[asyncio.Task[None]] = set()

    async def play(self) -> Outcome:
        """Return what came of it."""
        emitting = asyncio.create_task(self.load.run())
        await self._charged_some()
        for number, fault in enumerate(self.faults, 1):
            if emitting.done():
                break
            began_at = time.monotonic()
            if self.say:
                print(f"{number:4} {fault.kind} {fault.target} {fault.hold_s:.1f} s {fault.how}", flush=True)
            await self._inject(fault)
            self.outcome.faults[fault.kind] += 1
            recovery = asyncio.create_task(self._recovered(fault.kind, began_at, self.load.sent))
            self._recovering.add(recovery)
            if fault.wait or self.apart:
                await recovery
            if self.apart:
                await self._all_ready()
            await asyncio.sleep(fault.rest_s)
        await asyncio.gather(*self._recovering)
        self.load.stop()
        await emitting
        await self._compare()
        return self.outcome

    async def _charged_some(self) -> None:
        async with asyncio.timeout(QUIET_S):
            while len(self.load.charged) < self.load.rate:
                await asyncio.sleep(POLL_S)

    async def _all_ready(self) -> None:
        """Wait until every worker is: who restarts one after the other waits for that, too."""
        workers = [part for part in self.stage.parts.values() if isinstance(part, WorkerProcess)]
        async with asyncio.timeout(QUIET_S):
            while not all(worker.ready_file.exists() for worker in workers):
                await asyncio.sleep(POLL_S)

    async def _inject(self, fault: Fault) -> None:
        await getattr(self, "_" + fault.kind.replace(" ", "_"))(fault)

    async def _kill_worker(self, fault: Fault) -> None:
        self.stage.held.add(fault.target)
        part = self.stage.parts[fault.target]
        await asyncio.to_thread(part.kill)
        await asyncio.sleep(fault.hold_s)
        begin(part)
        self.stage.held.discard(fault.target)

    _kill_audit = _kill_worker

    async def _restart_worker(self, fault: Fault) -> None:
        self.stage.held.add(fault.target)
        part = self.stage.parts[fault.target]
        await asyncio.to_thread(part.stop, 20.0)
        begin(part)
        self.stage.held.discard(fault.target)

    async def _pause_worker(self, fault: Fault) -> None:
        part = self.stage.parts[fault.target]
        if part.alive:
            pid = part.pid
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(fault.hold_s)
            os.kill(pid, signal.SIGCONT)  # not reaped meanwhile: the pid is still its own

    async def _kill_broker(self, fault: Fault) -> None:
        await asyncio.sleep(max(0.0, self._broker_healed_at + BROKER_REST_S - time.monotonic()))
        node = int(fault.target)
        await asyncio.to_thread(self.stage.kafka.kill, node)
        await asyncio.sleep(fault.hold_s)
        await asyncio.to_thread(self.stage.kafka.restart, node)
        self._broker_healed_at = time.monotonic()

    async def _cut(self, fault: Fault) -> None:
        for proxy in self.stage.proxies:
            proxy.cut("reset" if fault.how == "reset" else "silent")
        await asyncio.sleep(fault.hold_s)
        for proxy in self.stage.proxies:
            proxy.mend()

    async def _recovered(self, kind: str, began_at: float, mark: int) -> None:
        healed_at = time.monotonic()
        while self.load.behind(mark):
            if time.monotonic() > healed_at + RECOVERY_S:
                self.outcome.unrecovered += 1
                self.outcome.spans.append(Span(kind, began_at, time.monotonic()))
                return
            await asyncio.sleep(POLL_S)
        self.outcome.recoveries_s.append(time.monotonic() - began_at)
        self.outcome.spans.append(Span(kind, began_at, time.monotonic()))

    async def _compare(self) -> None:
        """Compare until nothing differs, or nothing has changed for long enough."""
        began_at = changed_at = time.monotonic()
        before: list[str] | None = None
        while True:
            try:
                stored = await asyncio.to_thread(self.stage.stored)
                verdict = judge(await self.stage.read(), self.stage.book, stored)
            except OSError as error:  # the audit is starting
                verdict, found = self.outcome.verdict, [str(error)]
            else:
                self.outcome.verdict, found = verdict, verdict.differences
            self.outcome.quiet_s = time.monotonic() - began_at
            if not found:
                return
            if found != before:
                before, changed_at = found, time.monotonic()
            if time.monotonic() - changed_at > QUIET_S / 3 or time.monotonic() - began_at > QUIET_S:
                if verdict is None:
                    raise RuntimeError(f"nothing to compare: {found[0]}")
                if not verdict.differences:
                    verdict.differences.extend(found)
                return
            await asyncio.sleep(1.0)


async def run(
    seed: int,
    kills: int,
    nodes: int,
    rate: int,
    directory: Path,
    *,
    audit: bool,
    say: bool,
    apart: bool = False,
    only: str | None = None,
) -> Run:
    """Play a run and return it with its outcome."""
    chance = random.Random(seed)  # noqa: S311 - it must repeat
    faults = plan(chance, kills, nodes, audit=audit, only=only)
    stage = Stage(directory, nodes, audit=audit)
    try:
        await asyncio.to_thread(stage.kafka.start)
        await ensure_topics(stage.broker, partitions=PARTITIONS, replication=stage.replication)
        async with AIOKafkaProducer(**producer_options(stage.broker, "chaos")) as producer:
            for each in budgets(kills, rate):
                await producer.send_and_wait(BUDGETS.name, encode(each), key=each.id.encode())
        await stage.start()
        played = Run(stage, Load(stage.broker, rate, PARTITIONS, chance, stage.private), faults, say=say, apart=apart)
        await played.play()
    finally:
        await stage.stop()
    return played


def budgets(kills: int, rate: int) -> list:
    """Return caps, some of which such a run will cross: by the agents about half-way, never by the dearest one."""
    tokens = max(50, kills * rate // 20)
    return [
        budget(f"agent:{SPACE}/*/*", cap(tokens, unit="tokens", window="month", warn=[5_000]), name="agents"),
        budget(f"team:{SPACE}/*", cap(tokens * 8 * INPUT_NANOS, window="month"), name="teams"),
        budget(f"workspace:{SPACE}", cap(tokens * 20, unit="tokens", window="day"), name="everybody"),
        budget(f"run:{SPACE}/*", cap(10**15, window="run"), name="runs"),
    ]


def report(played: Run, seed: int) -> int:
    """Print the table of a run and return its exit code."""
    outcome, load, stage = played.outcome, played.load, played.stage
    verdict = outcome.verdict
    times = sorted(outcome.recoveries_s)
    rows: list[tuple[str, object]] = [("seed", seed), *sorted(outcome.faults.items())]
    rows += [
        ("faults", sum(outcome.faults.values())),
        ("processes that ended by themselves and were started again", stage.ended_by_itself),
        ("usages sent", load.sent),
        ("duplicates sent on purpose", load.duplicates),
        ("corrections sent", load.corrections),
        ("junk sent", load.junk),
        ("sends that failed and were repeated", load.send_failures),
        ("longest stall of charges", f"{max((end - start for start, end in load.stalls), default=0):.1f} s"),
        *(
            (
                f"longest wait of a usage by a {kind} alone ({len(each)} of them)",
                f"{each[-1]:.1f} s; p50 of them {_quantile(each, 50):.1f} s",
            )
            for kind, each in sorted(waits_alone(outcome.spans, load.waits).items())
        ),
        ("recovery p50", f"{_quantile(times, 50):.1f} s"),
        ("recovery p99", f"{_quantile(times, 99):.1f} s"),
        (f"not recovered within {RECOVERY_S:g} s", outcome.unrecovered),
        ("quiescence", f"{outcome.quiet_s:.1f} s"),
    ]
    if verdict is not None:
        rows += [
            ("calls charged", verdict.truth.calls),
            ("duplicates found", verdict.ledger.duplicates),
            ("replays seen in the ledger", verdict.ledger.repeated),
            ("halts due", verdict.halts),
            ("differences", len(verdict.differences)),
        ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    wrong = ["there was no comparison"] if verdict is None else list(verdict.differences)
    wrong += [
        f"a usage waited {each[-1]:.1f} s because of a {kind}; the most is {WAIT_S_MAX[kind]:g} s"
        for kind, each in waits_alone(outcome.spans, load.waits).items()
        if each[-1] > WAIT_S_MAX.get(kind, float("inf"))
    ]
    for difference in wrong[:DIFFERENCES_SHOWN]:
        print(f"  {difference}")
    return 1 if wrong or outcome.unrecovered else 0


def _quantile(times: list[float], percent: int) -> float:
    return times[min(len(times) - 1, len(times) * percent // 100)] if times else 0.0


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--kills", type=int, default=100, help="faults to inject")
    parser.add_argument("--nodes", type=int, default=3, help="nodes of the Kafka")
    parser.add_argument("--rate", type=int, default=150, help="usages a second")
    parser.add_argument("--no-audit", action="store_true", help="without ClickHouse")
    parser.add_argument("--apart", action="store_true", help="one fault at a time, so that stalls have one cause")
    parser.add_argument("--only", choices=sorted(KINDS), help="faults of one kind alone")
    parser.add_argument("--keep", type=Path, help="directory for logs and data, kept")
    chosen = parser.parse_args()
    reason = kraft_missing()
    if reason:
        print(f"no real Kafka here: {reason}")
        return 1
    print(f"seed {chosen.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="spendfuse-chaos-") as name:
        directory = chosen.keep or Path(name)
        directory.mkdir(parents=True, exist_ok=True)
        played = asyncio.run(
            run(
                chosen.seed, chosen.kills, chosen.nodes, chosen.rate, directory,
                audit=not chosen.no_audit, say=True, apart=chosen.apart, only=chosen.only,
            )
        )  # fmt: skip
        return report(played, chosen.seed)


if __name__ == "__main__":
    sys.exit(main())
