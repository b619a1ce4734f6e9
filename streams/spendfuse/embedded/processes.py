"""Child processes that never outlive us: started in a group of their own, watched, and ended by their pid."""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    _Job = tuple[Callable[[], subprocess.Popen[bytes]], Future[subprocess.Popen[bytes]]]

POLL_INTERVAL_S = 0.01
STOP_GRACE_S = 5.0
KILL_WAIT_S = 10.0
SPAWN_WAIT_S = 30.0
LOG_TAIL_LINES = 15
LOG_TAIL_BYTES = 8_192
LOG_LINE_BYTES_MAX = 65_536

_PR_SET_PDEATHSIG = 1


class ChildFailedError(RuntimeError):
    """A child did not start, ended early or did not become ready; the message has its last lines."""


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 nobody listens on now; another process may be quicker: then retry."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class ChildProcess:
    """One child process with its own group and a log file; a context manager that ends it.

    On Linux the kernel kills the child as soon as this process is gone, even by kill -9 (the child alone: what
    it starts must be started the same way). Elsewhere a parent that is killed -9 leaves its children running.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        log_path: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        """`env` None means this process's own; stdout and stderr are appended to the log."""
        self.name = name
        self.argv = tuple(argv)
        self.log_path = log_path
        self._env = dict(os.environ if env is None else env)
        self._cwd = cwd
        self._process: subprocess.Popen[bytes] | None = None
        self._swept = False
        self._log_start = 0
        # `alive` is asked from readers' threads too; only one of them may see the end and sweep the group.
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        return self.start() if self._process is None else self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def start(self) -> Self:
        """Start the child, or raise ChildFailedError when the program cannot be executed."""
        if self.alive:
            raise ChildFailedError(f"{self.name} is already running as pid {self.pid}: stop it first")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        try:
            self._process = _SPAWNER.run(self._popen)
            self._swept = False
        except OSError as error:
            raise ChildFailedError(f"{self.name} cannot be started: {self.argv[0]}: {error}") from error
        return self

    @property
    def pid(self) -> int:
        """The child's pid, which is also its process group; raises ChildFailedError before `start`."""
        return self._started().pid

    @property
    def alive(self) -> bool:
        """Whether the child runs now."""
        return self._process is not None and self._poll() is None

    @property
    def returncode(self) -> int | None:
        """The exit code, minus the number of a signal; None while the child runs, or if never started."""
        return None if self._process is None else self._poll()

    def wait_until(self, ready: Callable[[], bool], deadline_s: float, what: str = "ready") -> None:
        """Return when `ready()` is true; ChildFailedError if the child ends first or the deadline passes."""
        give_up_at = time.monotonic() + deadline_s
        while not ready():
            if not self.alive:
                raise ChildFailedError(self._failure(f"ended with exit code {self.returncode} before it was {what}"))
            if time.monotonic() > give_up_at:
                raise ChildFailedError(self._failure(f"was not {what} after {deadline_s:g} s"))
            time.sleep(POLL_INTERVAL_S)

    def wait_for_line(self, pattern: re.Pattern[str], deadline_s: float) -> re.Match[str]:
        """Return the first match of `pattern` in a line logged since the start; fails like `wait_until`."""
        found: list[re.Match[str]] = []
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)

            def seen() -> bool:
                while not found:
                    start = log.tell()
                    line = log.readline(LOG_LINE_BYTES_MAX)
                    if not line.endswith(b"\n") and len(line) < LOG_LINE_BYTES_MAX:
                        log.seek(start)  # half a line: read it again when it is whole
                        return False
                    match = pattern.search(line.decode(errors="replace"))
                    if match is not None:
                        found.append(match)
                return True

            # The last look after the child's end: a short-lived child may print and leave between two looks.
            self.wait_until(lambda: seen() or (not self.alive and seen()), deadline_s, f"saying {pattern.pattern!r}")
        return found[0]

    def wait(self, deadline_s: float) -> int:
        """Return the exit code once the child has ended by itself; ChildFailedError at the deadline."""
        try:
            self._started().wait(timeout=deadline_s)
        except subprocess.TimeoutExpired as error:
            raise ChildFailedError(self._failure(f"was still running after {deadline_s:g} s")) from error
        code = self._poll()
        if code is None:  # pragma: no cover - wait() has just returned
            raise ChildFailedError(self._failure("ended without an exit code"))
        return code

    def stop(self, grace_s: float = STOP_GRACE_S) -> int | None:
        """SIGTERM the group, SIGKILL what is left after `grace_s`; return the exit code, if ever started."""
        if self._process is None:
            return None
        if self.alive:
            self._signal_group(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=grace_s)
        return self.kill()

    def kill(self) -> int | None:
        """SIGKILL the group and reap the child; returns the exit code, None if it was never started."""
        if self._process is None:
            return None
        if self.alive:
            self._signal_group(signal.SIGKILL)
            try:
                self._process.wait(timeout=KILL_WAIT_S)
            except subprocess.TimeoutExpired as error:
                raise ChildFailedError(self._failure(f"(pid {self.pid}) survived SIGKILL")) from error
        return self._poll()

    def log_tail(self) -> str:
        """Return the last lines the child wrote, at most LOG_TAIL_LINES."""
        try:
            with self.log_path.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                log.seek(max(0, size - LOG_TAIL_BYTES))
                lines = deque(log.read(LOG_TAIL_BYTES).decode(errors="replace").splitlines(), LOG_TAIL_LINES)
        except OSError:
            return ""
        return "\n".join(lines)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ChildFailedError(f"{self.name} was never started")
        return self._process

    def _poll(self) -> int | None:
        """Return the exit code if the child has ended, and end what it left in its group, once."""
        process = self._started()
        with self._lock:
            if process.poll() is None:
                return None
            if not self._swept:  # later, the pid may be somebody else's
                self._swept = True
                self._signal_group(signal.SIGKILL)
        return process.returncode

    def _signal_group(self, number: signal.Signals) -> None:
        # PermissionError is macOS's answer for a group of zombies.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._started().pid, number)

    def _popen(self) -> subprocess.Popen[bytes]:
        with self.log_path.open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - argv comes from our own launchers, never from a message
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                cwd=self._cwd,
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()),  # noqa: PLW1509 - one system call, see _die_with
            )

    def _failure(self, happened: str) -> str:
        tail = self.log_tail() or "(it wrote nothing)"
        return f"{self.name} {happened}; the last lines of {self.log_path}:\n{tail}"


def _die_with(parent_pid: int) -> Callable[[], None] | None:
    """Return what a child runs before exec so that the kernel kills it with its parent; None outside Linux.

    Source: prctl(2), PR_SET_PDEATHSIG. SIGKILL, because a child that is busy or broken must go as well, and
    every process of ours survives kill -9 by design.
    """
    if sys.platform != "linux":
        return None
    try:
        # Bound before the fork: after it, another thread's lock may be held for ever.
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return None
    kill_number = int(signal.SIGKILL)

    def die_with_parent() -> None:
        prctl(_PR_SET_PDEATHSIG, kill_number, 0, 0, 0)
        if os.getppid() != parent_pid:  # it died between fork and prctl: no signal will come
            os._exit(1)

    return die_with_parent


class _Spawner:
    """The one thread that forks. PR_SET_PDEATHSIG means the *thread* that forked, and this one never ends.

    A child started from a worker thread (asyncio.to_thread, an executor) would be killed with that thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._jobs: queue.Queue[_Job] = queue.Queue(maxsize=1)

    def run(self, spawn: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
        """Run `spawn` in the forking thread and return, or raise, what it does."""
        done: Future[subprocess.Popen[bytes]] = Future()
        with self._lock:
            # Not alive also means: we are a fork of the process that had the thread.
            if self._thread is None or not self._thread.is_alive():
                self._jobs = queue.Queue(maxsize=1)
                self._thread = threading.Thread(
                    target=_spawn_for_ever, args=(self._jobs,), name="spendfuse-spawner", daemon=True
                )
                self._thread.start()
            self._jobs.put((spawn, done), timeout=SPAWN_WAIT_S)
            return done.result(timeout=SPAWN_WAIT_S)


def _spawn_for_ever(jobs: queue.Queue[_Job]) -> None:
    while True:
        spawn, done = jobs.get()
        try:
            done.set_result(spawn())
        except BaseException as error:  # noqa: BLE001 - handed to the caller, who raises it
            done.set_exception(error)
        del spawn, done


_SPAWNER = _Spawner()
