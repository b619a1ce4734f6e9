"""Overshoot: N concurrent calls of one scope over 3 emitting processes: after the fact, with holds, and by LiteLLM.

    python tests/bench/overshoot.py [--broker embedded|kafka] [--concurrency 1,10,50,128] [--chart FILE.png]

A call takes `--call-s`, costs $0.006, $0.009 or $0.015 in turn ($0.010 on average) and is bounded by $0.015; the cap is
$1.00. `after`: check(), the call, then its usage. `holds`: `async with guard.call(bound)`, settled with what it used.
`litellm`: the same calls through a LiteLLM proxy (`litellm_proxy.py` says in which mode), where it can be installed.
Each of the N workers goes on until it is halted; one that finds no room tries again until the process has made no call
for `GIVE_UP_S`. What was spent is what the emitters counted (`litellm`: what the provider served); what was usable is
what of the cap was spent.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, get_args

import aiohttp
import litellm_proxy
from isolated import NotInstalledError, environment
from platform_under_test import platform, publish_budgets

from spendfuse.client import Guard, GuardState, Halted, Meter
from spendfuse.client.halted import NoRoom
from spendfuse.wire.budget import Budget, Cap, WindowSpec
from spendfuse.wire.usage import Tokens

EMITTERS = 3
CAP_NANOS = 1_000_000_000
PROVIDER, MODEL = "anthropic", "claude-sonnet-4-6"
INPUT = 1_000
OUTPUTS = (200, 400, 800)
BOUND = Tokens(input=INPUT, output=max(OUTPUTS))
INPUT_NANOS, OUTPUT_NANOS = 3_000, 15_000
"""Nano-dollars of a token, by the price book."""
READY_S = 30.0
CASE_S = 120.0
GIVE_UP_S = 3.0
RETRY_S = 0.25
"""As often as guards hear what remains."""
CALLS_MAX = 100_000
Mode = Literal["after", "holds", "litellm"]
NAMES: dict[Mode, str] = {"after": "counted after the fact", "holds": "with holds", "litellm": "LiteLLM"}
CHART = Path(__file__).with_name("overshoot_chart.py")
CHART_S_MAX = 120.0


@dataclass(frozen=True, slots=True)
class Case:
    """What one mode and concurrency led to."""

    mode: Mode
    concurrency: int
    calls: int
    nanos: int
    refused: int

    @property
    def overshoot_bp(self) -> int:
        """Return what was spent past the cap, in 1/10,000 of it."""
        return max(self.nanos - CAP_NANOS, 0) * 10_000 // CAP_NANOS

    @property
    def usable_bp(self) -> int:
        """Return what of the cap was spent, in 1/10,000."""
        return min(self.nanos, CAP_NANOS) * 10_000 // CAP_NANOS


@dataclass(slots=True)
class _Count:
    asked: int = 0
    calls: int = 0
    nanos: int = 0
    refused: int = 0
    last: float = 0.0


def cost_nanos(output: int) -> int:
    """Return what a call costs."""
    return INPUT * INPUT_NANOS + output * OUTPUT_NANOS


def emitter(pipe: Connection, mode: Mode, workers: int, agent: str, call_s: float, url: str) -> None:
    """Make calls until halted, and send (calls, nano-dollars, refusals)."""
    if mode == "litellm":
        pipe.send("live")
        pipe.recv()
        count = _Count(last=time.monotonic())
        asyncio.run(_ask_proxy(url, workers, count))
    else:
        count = _emit(pipe, mode, workers, agent, call_s)
    pipe.send((count.calls, count.nanos, count.refused))


def _emit(pipe: Connection, mode: Mode, workers: int, agent: str, call_s: float) -> _Count:
    who = {"workspace": "acme", "team": "bench", "agent": agent, "run": "r"}
    with Meter.from_env(**who) as meter, Guard.from_env(meter=meter, **who) as guard:
        deadline = time.monotonic() + READY_S
        while guard.state is not GuardState.LIVE and time.monotonic() < deadline:
            time.sleep(0.005)
        pipe.send(guard.state.value)
        pipe.recv()
        count = _Count(last=time.monotonic())
        asyncio.run(_work(guard, meter, mode, workers, call_s, count))
        meter.flush(READY_S)
    return count


async def _work(guard: Guard, meter: Meter, mode: Mode, workers: int, call_s: float, count: _Count) -> None:
    await asyncio.gather(*(_worker(guard, meter, mode, call_s, count) for _ in range(workers)))


async def _worker(guard: Guard, meter: Meter, mode: Mode, call_s: float, count: _Count) -> None:
    while _goes_on(count):
        output = _next_output(count)
        try:
            if mode == "after":
                guard.check()
                _made(count, output)
                await asyncio.sleep(call_s)
                meter.record(provider=PROVIDER, model=MODEL, input=INPUT, output=output)
            else:
                async with guard.call(BOUND, provider=PROVIDER, model=MODEL) as call:
                    _made(count, output)
                    await asyncio.sleep(call_s)
                    call.settle(Tokens(input=INPUT, output=output))
        except NoRoom:
            count.refused += 1
            await asyncio.sleep(RETRY_S)
        except Halted:
            count.refused += 1
            return


async def _ask_proxy(url: str, workers: int, count: _Count) -> None:
    async def worker() -> None:
        while _goes_on(count):
            output = _next_output(count)
            if await litellm_proxy.ask(session, url, INPUT, output, max(OUTPUTS)):
                _made(count, output)
            else:
                count.refused += 1
                await asyncio.sleep(RETRY_S)

    timeout = aiohttp.ClientTimeout(total=CASE_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        await asyncio.gather(*(worker() for _ in range(workers)))


def _goes_on(count: _Count) -> bool:
    return count.calls < CALLS_MAX and time.monotonic() - count.last < GIVE_UP_S


def _next_output(count: _Count) -> int:
    count.asked += 1
    return OUTPUTS[count.asked % len(OUTPUTS)]


def _made(count: _Count, output: int) -> None:
    count.calls += 1
    count.nanos += cost_nanos(output)
    count.last = time.monotonic()


def run_case(mode: Mode, concurrency: int, call_s: float, url: str = "") -> Case:
    """Run one case with processes of its own; the agent's cap is new, since its name is."""
    context = multiprocessing.get_context("spawn")
    shares = [concurrency // EMITTERS + (nth < concurrency % EMITTERS) for nth in range(EMITTERS)]
    pipes: list[Connection] = []
    processes: list[Any] = []
    try:
        for share in filter(None, shares):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=emitter, args=(theirs, mode, share, f"{mode}-{concurrency}", call_s, url), daemon=True
            )
            process.start()
            pipes.append(ours)
            processes.append(process)
        states = [_answer(pipe, READY_S + 10) for pipe in pipes]
        if set(states) != {"live"}:
            raise SystemExit(f"the guards are {states}")
        for pipe in pipes:
            pipe.send("go")
        counts = [_answer(pipe, CASE_S) for pipe in pipes]
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    return Case(mode, concurrency, *(sum(column) for column in zip(*counts, strict=True)))


def run_litellm(concurrency: int, call_s: float) -> Case:
    """Run one case through a proxy of its own, whose budget is new; what was spent is what its provider served."""
    prices = (INPUT_NANOS / 1e9, OUTPUT_NANOS / 1e9)
    with (
        tempfile.TemporaryDirectory(prefix="spendfuse-bench-litellm-") as directory,
        litellm_proxy.proxy(Path(directory), CAP_NANOS / 1e9, prices, call_s) as proxy,
    ):
        case = run_case("litellm", concurrency, call_s, proxy.url)
        served = proxy.served()
    nanos = served.input_tokens * INPUT_NANOS + served.output_tokens * OUTPUT_NANOS
    return Case("litellm", concurrency, served.calls, nanos, case.refused)


def _answer(pipe: Connection, timeout_s: float) -> Any:
    if not pipe.poll(timeout_s):
        raise SystemExit(f"an emitter said nothing within {timeout_s:g} s")
    return pipe.recv()


def measure(kind: str, modes: Sequence[Mode], concurrencies: Sequence[int], call_s: float) -> list[Case]:
    """Run every case against one worker, the modes in turn at each concurrency."""
    with platform(kind) as run, tempfile.TemporaryDirectory(prefix="spendfuse-bench-guards-") as guards:
        os.environ.update(run.env() | {"SPENDFUSE_GUARD_DIR": guards})
        cap = Cap(id="day", unit="nano-USD", amount=CAP_NANOS, window=WindowSpec(kind="day"))
        asyncio.run(
            publish_budgets(run.broker, [Budget(id="agents", version=1, scope="agent:acme/bench/*", caps=[cap])])
        )
        with run.worker():
            return [
                run_litellm(number, call_s) if mode == "litellm" else run_case(mode, number, call_s)
                for number in concurrencies
                for mode in modes
            ]


def table(cases: Sequence[Case]) -> str:
    """Return the cases as lines of text."""
    lines = [f"{'mode':7} {'N':>4} {'calls':>6} {'spent':>8} {'overshoot':>10} {'usable':>8} {'refused':>8}"]
    lines += [
        f"{case.mode:7} {case.concurrency:>4} {case.calls:>6} {case.nanos / 1e9:>7.3f}$ "
        f"{case.overshoot_bp / 100:>8.1f} % {case.usable_bp / 100:>6.1f} % {case.refused:>8}"
        for case in cases
    ]
    return "\n".join(lines)


def draw(cases: Sequence[Case], title: str, names: dict[Mode, str], picture: Path) -> None:
    """Draw the cases with matplotlib, in an environment of its own."""
    shown = [asdict(case) | {"overshoot_bp": case.overshoot_bp, "usable_bp": case.usable_bp} for case in cases]
    given = json.dumps({"title": title, "names": names, "cases": shown})
    argv = [str(environment("chart")), str(CHART), str(picture)]
    subprocess.run(argv, input=given.encode(), check=True, timeout=CHART_S_MAX)


def main() -> None:
    """Measure, print, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", choices=["embedded", "kafka"], default="kafka")
    parser.add_argument("--concurrency", default="1,10,50,128")
    parser.add_argument("--mode", choices=get_args(Mode), action="append", help="one alone; all by default")
    parser.add_argument("--call-s", type=float, default=0.2)
    parser.add_argument("--chart", type=Path)
    given = parser.parse_args()
    numbers = [int(each) for each in given.concurrency.split(",")]
    modes, names = list(given.mode or get_args(Mode)), dict(NAMES)
    if "litellm" in modes:
        try:
            names["litellm"] = f"LiteLLM {litellm_proxy.version()} proxy, provider budget"
        except NotInstalledError as error:
            print(f"without LiteLLM, which cannot be installed here: {error}")
            modes.remove("litellm")
    cases = measure(given.broker, modes, numbers, given.call_s)
    print(f"{given.broker}, calls of {given.call_s:g} s over {EMITTERS} emitters, cap $1.00")
    print(table(cases))
    print("; ".join(f"{mode}: {names[mode]}" for mode in modes))
    if given.chart:
        try:
            title = f"N concurrent calls of one agent in {EMITTERS} processes, against a cap of $1.00"
            draw(cases, title, names, given.chart)
            print(given.chart)
        except NotInstalledError as error:
            print(f"no chart: {error}")


if __name__ == "__main__":
    main()
