"""Running any program under a guard: its process group is ended when its scope halts."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Final, Protocol

EXIT_HALTED: Final = 75
"""Of `guard exec` when a halt ended the program, or kept it from starting (EX_TEMPFAIL: it may run later)."""
EXIT_NOT_EXECUTABLE: Final = 126
EXIT_NOT_FOUND: Final = 127
SIGNAL_BASE: Final = 128
POLL_S: Final = 0.05
"""How late the end of the program is seen; a halt is seen at once."""
KILL_WAIT_S: Final = 5.0
FORWARDED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


class Supervising(Protocol):
    """What is needed of a guard."""

    def check(self) -> None:
        """Raise Halted when nothing may be started."""

    def wait_halted(self, timeout_s: float | None = None) -> Exception | None:
        """Wait for a halt."""

    def enforced(self) -> None:
        """Acknowledge it as enforced."""


def supervise(
    guard: Supervising, command: Sequence[str], grace_s: float, env: Mapping[str, str], say: Callable[[str], None]
) -> int:
    """Run a command in a process group of its own and return the exit code: its own, 128 + a signal, or EXIT_HALTED.

    On a halt the group gets SIGTERM, after `grace_s` SIGKILL; then the halt is acknowledged as enforced. Signals to
    this process go on to the group. A process that leaves the group is beyond it.
    """
    try:
        program = subprocess.Popen(command, env=dict(env), process_group=0)  # noqa: S603 - the very point
    except FileNotFoundError as error:
        say(f"{error.filename or command[0]}: not found")
        return EXIT_NOT_FOUND
    except OSError as error:
        say(f"{command[0]}: {error.strerror or error}")
        return EXIT_NOT_EXECUTABLE
    with _foreground(program.pid), _forwarding(program.pid):
        try:
            while program.poll() is None:
                halted = guard.wait_halted(POLL_S)
                if halted is not None:
                    say(str(halted))
                    end_group(program, grace_s)
                    guard.enforced()
                    return EXIT_HALTED
        except BaseException:
            end_group(program, 0.0)
            raise
    return program.returncode if program.returncode >= 0 else SIGNAL_BASE - program.returncode


def end_group(program: "subprocess.Popen[Any]", grace_s: float) -> None:
    """End a process group: SIGTERM, and SIGKILL for what is left after the grace."""
    if grace_s > 0:
        _signal_group(program.pid, signal.SIGTERM)
        _signal_group(program.pid, signal.SIGCONT)  # a stopped process would not hear it
        if _gone(program, grace_s):
            return
    _signal_group(program.pid, signal.SIGKILL)
    _gone(program, KILL_WAIT_S)


def _gone(program: "subprocess.Popen[Any]", timeout_s: float) -> bool:
    """Wait until nobody of a group is left; return whether that came about."""
    give_up_at = time.monotonic() + timeout_s
    while True:
        program.poll()  # the leader is ours to bury; the others are buried by init
        if not _signal_group(program.pid, 0):
            return True
        if time.monotonic() >= give_up_at:
            return False
        time.sleep(POLL_S / 5)


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to a group; return whether anybody is in it."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody in it has another user: it is there
        return True
    return True


@contextlib.contextmanager
def _forwarding(group: int) -> Iterator[None]:
    """Send the signals that come to this process on to a group."""

    def forward(number: int, _frame: FrameType | None) -> None:
        _signal_group(group, number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _foreground(group: int) -> Iterator[None]:
    """Give the terminal to a group while it runs, so that it can read from it and Ctrl-C reaches it."""
    if not sys.stdin.isatty():
        yield
        return
    terminal = sys.stdin.fileno()
    ours = os.getpgrp()
    before = signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    try:
        with contextlib.suppress(OSError):
            os.tcsetpgrp(terminal, group)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.tcsetpgrp(terminal, ours)
        signal.signal(signal.SIGTTOU, before)
