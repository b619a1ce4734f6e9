"""Children are watched, explained when they fail, and gone when they should be."""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

import psutil
import pytest

from spendfuse.embedded.processes import ChildFailedError, ChildProcess

if TYPE_CHECKING:
    from pathlib import Path

DEADLINE_S = 20.0
FOR_EVER = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {FOR_EVER}"
ORDERLY = (
    "import signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
    "print('up', flush=True); time.sleep(600)\n"
)
WITH_GRANDCHILD = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    "print('grandchild', child.pid, flush=True)\n"
)


def python(tmp_path: Path, code: str) -> ChildProcess:
    return ChildProcess("a python", [sys.executable, "-c", code], log_path=tmp_path / "logs" / "child.log")


def gone(pid: int) -> bool:
    give_up_at = time.monotonic() + DEADLINE_S
    while time.monotonic() < give_up_at:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_a_child_that_leaves_in_order_gives_its_own_exit_code(tmp_path: Path) -> None:
    child = python(tmp_path, ORDERLY).start()
    child.wait_for_line(re.compile("up"), DEADLINE_S)
    assert child.alive
    assert child.stop(DEADLINE_S) == 7
    assert not child.alive
    assert gone(child.pid)


def test_a_child_that_ignores_the_term_signal_is_killed_after_the_grace(tmp_path: Path) -> None:
    child = python(tmp_path, STUBBORN).start()
    child.wait_for_line(re.compile("up"), DEADLINE_S)
    assert child.stop(grace_s=0.1) == -signal.SIGKILL


def test_leaving_the_context_by_an_exception_ends_the_child(tmp_path: Path) -> None:
    child = python(tmp_path, FOR_EVER)
    with pytest.raises(ZeroDivisionError), child:
        raise ZeroDivisionError
    assert gone(child.pid)


@pytest.mark.parametrize("ending", ["import time; time.sleep(600)", ""], ids=["stopped", "leaves by itself"])
def test_what_a_child_started_goes_with_it(tmp_path: Path, ending: str) -> None:
    with python(tmp_path, WITH_GRANDCHILD + ending) as child:
        pid = int(child.wait_for_line(re.compile(r"grandchild (\d+)"), DEADLINE_S)[1])
        if not ending:
            child.wait(DEADLINE_S)
            assert gone(pid)
    assert gone(pid)


def test_a_child_started_by_a_thread_outlives_the_thread(tmp_path: Path) -> None:
    # The kernel's parent-death signal means the thread that forked.
    child = python(tmp_path, FOR_EVER)
    starter = threading.Thread(target=child.start)
    starter.start()
    starter.join(DEADLINE_S)
    with child:
        child.wait_for_line(re.compile("up"), DEADLINE_S)
        with pytest.raises(ChildFailedError, match="still running"):
            child.wait(0.3)


def test_a_child_that_ends_too_early_is_explained_by_its_last_lines(tmp_path: Path) -> None:
    code = "import sys; print('\\n'.join(f'line {i};' for i in range(99))); sys.exit('no such budget')"
    with (
        pytest.raises(ChildFailedError, match=r"(?s)exit code 1 before.*line 98;.*no such budget") as error,
        python(tmp_path, code) as child,
    ):
        child.wait_for_line(re.compile("never"), DEADLINE_S)
    assert "line 50;" not in str(error.value)


def test_a_line_is_found_though_its_child_has_already_left(tmp_path: Path) -> None:
    with python(tmp_path, "print('port 4711')") as child:
        assert child.wait(DEADLINE_S) == 0
        assert child.wait_for_line(re.compile(r"port (\d+)$"), DEADLINE_S)[1] == "4711"


def test_a_child_that_never_becomes_ready_fails_at_the_deadline_and_says_so(tmp_path: Path) -> None:
    with python(tmp_path, FOR_EVER) as child, pytest.raises(ChildFailedError, match=r"was not ready after 0\.1 s"):
        child.wait_until(lambda: False, 0.1)


def test_a_second_start_reads_its_own_lines_and_keeps_the_first_ones(tmp_path: Path) -> None:
    child = python(tmp_path, "import os; print('pid', os.getpid())")
    pids = []
    for _ in range(2):
        with child:
            pids.append(int(child.wait_for_line(re.compile(r"pid (\d+)"), DEADLINE_S)[1]))
        child = ChildProcess("a python", child.argv, log_path=child.log_path)
    assert pids[0] != pids[1]
    assert child.log_path.read_text(encoding="utf-8").split() == ["pid", str(pids[0]), "pid", str(pids[1])]


def test_a_program_that_does_not_exist_is_named(tmp_path: Path) -> None:
    child = ChildProcess("a broker", [str(tmp_path / "nothing")], log_path=tmp_path / "log")
    with pytest.raises(ChildFailedError, match=r"a broker cannot be started: .*nothing"):
        child.start()
    assert not child.alive
    assert child.stop() is None
