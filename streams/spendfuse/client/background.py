"""One daemon thread with an event loop, shared by every Meter and Guard of a process.

It starts with the first use. A forked child has no threads: it forgets its parent's loop and starts its own.
At the process's end everyone who asked is finished once, while threads and sockets still work.
"""

import asyncio
import atexit
import concurrent.futures
import concurrent.futures.thread  # loaded now: at the process's end it is too late, see _at_exit
import contextlib
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol, TypeVar

START_TIMEOUT_S: Final = 10.0
STOP_TIMEOUT_S: Final = 2.0

T = TypeVar("T")
_log = logging.getLogger("spendfuse")


class Tenant(Protocol):
    """Someone who lives in the background thread."""

    def finish(self, *, last: bool) -> None:
        """Send what is left, within a bound of its own: the process ends. After the `last` call nothing follows."""

    def forked(self) -> None:
        """Start anew: this is a forked child, and what is under way belongs to the parent."""


class Background:
    """The thread and its loop. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._tenants: weakref.WeakSet[Any] = weakref.WeakSet()
        # A child that collected its parent's loop would close sockets and, through the shared epoll instance,
        # deafen the parent. So it keeps them: one entry for each generation of forks.
        self._abandoned: list[object] = []
        self._registered = False

    def enter(self, tenant: Tenant) -> None:
        """Have a tenant finished at the process's end and told of a fork; it is held weakly."""
        with self._lock:
            self._tenants.add(tenant)
            if not self._registered:
                self._registered = True
                _at_exit(self._flush_all, self._end)

    def leave(self, tenant: Tenant) -> None:
        """Forget a tenant."""
        with self._lock:
            self._tenants.discard(tenant)

    def loop(self) -> asyncio.AbstractEventLoop:
        """Return the running loop, started if need be; RuntimeError if no thread can be started any more."""
        loop = self._loop
        if loop is not None:
            return loop
        with self._lock:
            if self._loop is None:
                self._start()
            loop = self._loop
        if loop is None:
            raise RuntimeError("spendfuse's background thread did not start")
        return loop

    def spawn(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine in the background and return its future."""
        try:
            return asyncio.run_coroutine_threadsafe(work, self.loop())
        except BaseException:
            work.close()
            raise

    def _start(self) -> None:
        loop = asyncio.new_event_loop()
        started = threading.Event()
        loop.call_soon(started.set)
        thread = threading.Thread(target=_run, args=(loop,), name="spendfuse", daemon=True)
        try:
            thread.start()
        except BaseException:
            loop.close()
            raise
        if started.wait(START_TIMEOUT_S):
            self._loop, self._thread = loop, thread
        # A multiprocessing child ends by os._exit, without atexit: it has finalizers of its own.
        if (util := sys.modules.get("multiprocessing.util")) is not None:
            util.Finalize(None, self._end, exitpriority=10)

    def _flush_all(self, *, last: bool = False) -> None:
        with self._lock:
            tenants = list(self._tenants)
        for tenant in tenants:
            try:
                tenant.finish(last=last)
            except Exception:  # noqa: BLE001 - one tenant's fault must not cost the others what they hold
                _log.exception("spendfuse could not finish at the process's end")

    def _end(self) -> None:
        self._flush_all(last=True)
        self.stop()

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> bool:
        """Cancel what runs, end the thread and say whether it ended in time; it starts again when used."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None:
            return True
        with contextlib.suppress(RuntimeError):  # it ended by itself
            loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout_s)
        return not thread.is_alive()

    def abandon(self, of_the_parent: object) -> None:
        """Keep something of the parent's for ever, so that its destructor never runs in a forked child."""
        self._abandoned.append(of_the_parent)

    def after_fork_in_child(self) -> None:
        """Forget the parent's thread (it does not exist here) and tell the tenants."""
        self._lock = threading.Lock()  # the parent may have held it at the fork
        loop, self._loop = self._loop, None
        self._thread = None
        if loop is not None:
            self.abandon((loop, asyncio.all_tasks(loop)))
        for tenant in list(self._tenants):
            tenant.forked()


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=STOP_TIMEOUT_S))
    finally:
        loop.close()


def _at_exit(flush: Callable[[], None], end: Callable[[], None]) -> None:
    """Call `end` at the process's end, and before it `flush`, while names can still be resolved.

    asyncio resolves host names in an executor, and executors are shut before `atexit` runs: a process that ends
    before its first connection would lose what it emitted. concurrent.futures registers its own end the same way.
    """
    atexit.register(end)
    early = getattr(threading, "_register_atexit", None)
    if early is not None:
        with contextlib.suppress(RuntimeError):  # the end has begun
            early(flush)


BACKGROUND: Final = Background()
"""The one background of this process."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=BACKGROUND.after_fork_in_child)
