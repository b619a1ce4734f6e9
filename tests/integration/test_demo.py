"""The demo as a person runs it: whole, interrupted, and on real traces; and the dashboard over the demo's own data."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from fractions import Fraction
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
AZURE = DATA / "azure-llm-2023" / "AzureLLMInferenceTrace_code.csv"
MOONCAKE = DATA / "mooncake" / "conversation_trace.jsonl"
DEMO_TIMEOUT_S = 150

pytestmark = [pytest.mark.broker, pytest.mark.timeout(DEMO_TIMEOUT_S + 60)]


def run_demo(directory: Path, *arguments: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-m", "spendfuse", "demo", "--json", "--directory", str(directory), *arguments],
        capture_output=True, timeout=DEMO_TIMEOUT_S, check=False, cwd=directory,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    report: dict[str, object] = json.loads(done.stdout)
    return report


@pytest.fixture(scope="module")
def weekend(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    directory = tmp_path_factory.mktemp("weekend")
    return directory, run_demo(directory)  # type: ignore[return-value]


def test_the_weekend_is_stopped_and_its_ledger_is_exact(weekend: tuple[Path, dict[str, int]]) -> None:
    _, report = weekend
    assert report["without_nanos"] == 47_000 * 10**9
    assert report["agents"] == report["agents_stopped"] == report["agents_acknowledged"] == 23
    assert report["difference_nanos"] == 0
    assert 23 * 250 * 10**9 <= report["spent_nanos"] < 47_000 * 10**9 // 2
    assert report["caps_nanos"] >= 23 * 250 * 10**9
    assert 0 < report["halt_lag_p50_us"] <= report["halt_lag_p99_us"]


def test_every_panel_runs_over_the_demos_own_data(weekend: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    directory, report = weekend
    engine = next(directory.glob("run-*/clickhouse"))
    script = Path(__file__).with_name("panels_over_demo.py")
    done = subprocess.run(
        [sys.executable, str(script), str(engine)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    assert seen["panels"] >= 8
    assert seen["failed"] == []
    assert seen["empty"] == []
    assert seen["spend_nanos"] == report["spent_nanos"]


def test_ctrl_c_leaves_nothing_running(tmp_path: Path) -> None:
    mark = f"spendfuse-demo-{os.getpid()}-{time.monotonic_ns()}"
    demo = subprocess.Popen(
        [sys.executable, "-m", "spendfuse", "demo", "--json", "--directory", str(tmp_path)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        env={**os.environ, "SPENDFUSE_TEST_MARK": mark},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while len(marked(mark)) < 25 and demo.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(marked(mark)) >= 25, "the demo's agents did not start"
        os.killpg(demo.pid, signal.SIGINT)
        demo.wait(30)
        deadline = time.monotonic() + 20
        while marked(mark) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert marked(mark) == []
        assert demo.returncode == 130
    finally:
        for process in marked(mark):
            process.kill()


def marked(mark: str) -> list[psutil.Process]:
    """Return the processes that carry a mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SPENDFUSE_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.skipif(not AZURE.exists(), reason=f"the trace is not beside the project: {AZURE.name}")
def test_the_azure_trace_is_charged_to_the_last_unit(tmp_path: Path) -> None:
    report = run_demo(tmp_path, "--trace", str(AZURE), "--preset", "azure-llm-2023")
    tokens: dict[str, int] = defaultdict(int)
    cost: dict[str, Fraction] = defaultdict(Fraction)
    with AZURE.open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            agent = f"synthetic-{number % 23 + 1:02d}"
            tokens[agent] += int(row["ContextTokens"]) + int(row["GeneratedTokens"])
            # gpt-4o: 2.50 and 10 USD a million tokens; each call is a whole number of nano-dollars
            cost[agent] += int(row["ContextTokens"]) * 2_500 + int(row["GeneratedTokens"]) * 10_000
    expect(report, tokens, cost)


@pytest.mark.skipif(not MOONCAKE.exists(), reason=f"the trace is not beside the project: {MOONCAKE.name}")
def test_the_mooncake_trace_is_charged_to_the_last_unit_with_its_cache_reads(tmp_path: Path) -> None:
    report = run_demo(tmp_path, "--trace", str(MOONCAKE), "--preset", "mooncake")
    tokens: dict[str, int] = defaultdict(int)
    cost: dict[str, Fraction] = defaultdict(Fraction)
    seen: set[int] = set()
    for number, line in enumerate(MOONCAKE.read_text().splitlines()):
        row = json.loads(line)
        head = 0
        while head < len(row["hash_ids"]) and row["hash_ids"][head] in seen:
            head += 1
        seen.update(row["hash_ids"])
        cached = min(head, (row["input_length"] - 1) // 512) * 512
        agent = f"synthetic-{number % 23 + 1:02d}"
        tokens[agent] += row["input_length"] + row["output_length"]
        # claude-sonnet-4-6: 3, 0.30 and 15 USD a million tokens
        cost[agent] += (row["input_length"] - cached) * 3_000 + cached * 300 + row["output_length"] * 15_000
    expect(report, tokens, cost)
    table: list[dict[str, int]] = report["table"]  # type: ignore[assignment]
    assert any(row["cache_hit_bp"] > 0 for row in table)


def expect(report: dict[str, object], tokens: dict[str, int], cost: dict[str, Fraction]) -> None:
    table: list[dict[str, int]] = report["table"]  # type: ignore[assignment]
    assert {str(row["agent"]): row["tokens"] for row in table} == dict(tokens)
    assert {str(row["agent"]): row["cost_nanos"] for row in table} == dict(cost)
    assert report["difference_tokens"] == report["difference_nanos"] == 0
    assert 0 < report["tripped"] <= 23  # type: ignore[operator]
    assert 0 < report["after_trip_nanos"] < report["spent_nanos"]  # type: ignore[operator]
