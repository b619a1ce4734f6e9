"""`spendfuse guard check` and `exec`: a file that answers in milliseconds, and a process group that ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from spendfuse.cli import guard_check
from spendfuse.cli.supervise import EXIT_HALTED, EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, supervise
from spendfuse.client import Halted

if TYPE_CHECKING:
    from collections.abc import Callable

STREAMS = Path(__file__).parents[2] / "streams"
DEADLINE_S = 20.0
AGENT = "agent:acme/research/planner"


def mirror(path: Path, *halts: str, closes_ms: int | None = None, **more: Any) -> Path:
    items = [{"scope": scope, "message": f"{scope} reached its cap"} for scope in halts]
    content = {"v": 1, "written_ms": 0, "closes_ms": closes_ms, "halts": items, "degrades": []} | more
    path.write_text(json.dumps(content))
    return path


def ask(path: Path, scope: str, *words: str) -> int:
    return guard_check.main([scope, "--mirror", str(path), *words])


@pytest.mark.parametrize(
    ("halted", "scope", "code"),
    [
        (AGENT, AGENT, 1),
        ("team:acme/research", AGENT, 1),
        ("workspace:acme", AGENT, 1),
        ("workspace:acme", "team:acme/research", 1),
        ("workspace:acme", "run:acme/run-1", 1),
        ("run:acme/tree/1", AGENT, 1),
        ("agent:acme/research/other", AGENT, 0),
        (AGENT, "team:acme/research", 0),
        ("run:acme/tree/2", AGENT, 0),
        ("workspace:acm", AGENT, 0),
    ],
)
def test_a_scope_is_halted_by_itself_and_all_above_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], halted: str, scope: str, code: int
) -> None:
    assert ask(mirror(tmp_path / "m", halted), scope, "--run", "tree/1") == code
    assert (f"{halted} reached its cap" in capsys.readouterr().err) == bool(code)


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"[]", b"{}", b'{"v":2}', b'{"v":1,"halts":[{}]}', b'{"v":1,"halts":[]}', b"[" * 99_999]
)
def test_a_mirror_that_cannot_be_read_answers_that_nothing_is_known(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m").write_bytes(data)
    assert ask(tmp_path / "m", AGENT) == 69
    assert ask(tmp_path / "none", AGENT) == 69
    assert ask(tmp_path, AGENT) == 69


def test_a_mirror_whose_time_is_over_says_so_and_a_halt_in_it_still_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now_ms = time.time_ns() // 1_000_000
    assert ask(mirror(tmp_path / "m", closes_ms=now_ms + 60_000), AGENT) == 0
    assert ask(mirror(tmp_path / "m", closes_ms=now_ms - 1), AGENT) == 69
    assert "may no longer be relied on" in capsys.readouterr().err
    assert ask(mirror(tmp_path / "m", AGENT, closes_ms=now_ms - 1), AGENT, "-q") == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "words", [[], ["a"], ["agent:a/b"], ["team:a"], ["agent:a//c"], [AGENT, AGENT], [AGENT, "--run"], [AGENT, "--x"]]
)
def test_wrong_usage_is_said_and_ends_with_2(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert guard_check.main(words) == 2
    assert "usage: spendfuse guard check" in capsys.readouterr().err


def test_the_answer_loads_neither_typer_nor_pydantic_nor_a_kafka_client(tmp_path: Path) -> None:
    file = mirror(tmp_path / "m", AGENT)
    code = (
        "import sys\n"
        f"sys.argv = ['spendfuse', 'guard', 'check', {AGENT!r}, '--mirror', {str(file)!r}]\n"
        "from spendfuse.cli import main\n"
        "try: main()\n"
        "except SystemExit as ended: print(ended.code)\n"
        "print(sorted({'typer', 'rich', 'pydantic', 'aiokafka', 'asyncio', 'typing'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env={"PYTHONPATH": str(STREAMS)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:2] == ["1", "[]"]


# -- exec ----------------------------------------------------------------------------------------------------------


class Fake:
    """A guard that halts when it is told to."""

    def __init__(self) -> None:
        self.halted = threading.Event()
        self.acked_at = 0.0

    def check(self) -> None:
        return

    def wait_halted(self, timeout_s: float | None = None) -> Exception | None:
        return Halted("the day cap is reached") if self.halted.wait(timeout_s) else None

    def enforced(self) -> None:
        self.acked_at = time.monotonic()


def run(program: str, guard: Fake | None = None, grace_s: float = 5.0) -> tuple[int, list[str]]:
    said: list[str] = []
    code = supervise(guard or Fake(), [sys.executable, "-c", program], grace_s, os.environ, said.append)
    return code, said


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(true: Callable[[], Any]) -> None:
    give_up_at = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < give_up_at, "waited in vain"
        time.sleep(0.005)


def halt_when(guard: Fake, file: Path) -> threading.Thread:
    def wait() -> None:
        wait_until(file.exists)
        guard.halted.set()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize(("program", "code"), [("pass", 0), ("raise SystemExit(7)", 7)])
def test_a_programs_own_exit_code_is_passed_on(program: str, code: int) -> None:
    assert run(program) == (code, [])


def test_a_program_that_a_signal_ended_is_128_and_the_signal() -> None:
    assert run("import os; os.kill(os.getpid(), 9)")[0] == 128 + signal.SIGKILL


@pytest.mark.parametrize(
    ("command", "code"), [(["/nowhere/at/all"], EXIT_NOT_FOUND), (["/etc/passwd"], EXIT_NOT_EXECUTABLE)]
)
def test_what_cannot_be_started_is_said(command: list[str], code: int) -> None:
    said: list[str] = []
    assert supervise(Fake(), command, 1.0, {}, said.append) == code
    assert command[0] in said[0]


def test_a_halt_ends_a_program_that_obeys_before_its_grace_is_over(tmp_path: Path) -> None:
    guard = Fake()
    halt_when(guard, tmp_path / "up")
    program = (
        "import signal, pathlib, time\n"
        "def end(*_): pathlib.Path('{d}/cleaned').touch(); raise SystemExit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "pathlib.Path('{d}/up').touch()\n"
        "time.sleep(60)\n"
    ).replace("{d}", str(tmp_path))
    started = time.monotonic()
    assert run(program, guard, grace_s=30.0) == (EXIT_HALTED, ["the day cap is reached"])
    assert time.monotonic() - started < 20
    assert (tmp_path / "cleaned").exists()
    assert guard.acked_at > 0


def test_a_halt_ends_children_and_stopped_and_stubborn_programs_after_the_grace(tmp_path: Path) -> None:
    guard = Fake()
    halt_when(guard, tmp_path / "up")
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    program = (
        "import os, signal, subprocess, sys, time, pathlib\n"
        f"child = subprocess.Popen([sys.executable, '-c', {stubborn!r}])\n"
        "time.sleep(0.3)\n"  # until the child ignores SIGTERM; if it does not yet, it only ends sooner
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        f"pathlib.Path({str(tmp_path / 'up')!r}).touch()\n"
        "os.kill(os.getpid(), signal.SIGSTOP)\n"
        "time.sleep(60)\n"
    )
    assert run(program, guard, grace_s=0.5)[0] == EXIT_HALTED
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not alive(pid))


def test_signals_go_on_to_the_program(tmp_path: Path) -> None:
    program = (
        "import signal, sys, time, pathlib\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(42))\n"
        f"pathlib.Path({str(tmp_path / 'up')!r}).touch()\n"
        "time.sleep(60)\n"
    )

    def send() -> None:
        wait_until((tmp_path / "up").exists)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=send).start()
    before = signal.getsignal(signal.SIGUSR1)
    assert run(program)[0] == 42
    assert signal.getsignal(signal.SIGUSR1) == before
