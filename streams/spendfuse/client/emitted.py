"""What the meters of this process emit, told to its guards: they count their own agent's calls."""

import threading
import weakref
from typing import Any, Final, Protocol

from spendfuse.wire.usage import Usage


class Listener(Protocol):
    """Someone who counts."""

    def on_usage(self, usage: Usage) -> None:
        """Take in a usage that is being emitted; called in the emitting thread."""


class Emitted:
    """Listeners by `workspace/team/agent`, held weakly."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: dict[str, weakref.WeakSet[Any]] = {}

    def listen(self, agent_path: str, listener: Listener) -> None:
        """Tell a listener of an agent's usages from now on."""
        with self._lock:
            self._listeners.setdefault(agent_path, weakref.WeakSet()).add(listener)

    def forget(self, agent_path: str, listener: Listener) -> None:
        """Tell it no more."""
        with self._lock:
            listeners = self._listeners.get(agent_path)
            if listeners is not None:
                listeners.discard(listener)
                if not listeners:
                    del self._listeners[agent_path]

    def tell(self, usage: Usage) -> None:
        """Tell who listens to the usage's agent."""
        listeners = self._listeners.get(usage.agent_path)
        if listeners is not None:
            with self._lock:
                found = list(listeners)
            for listener in found:
                listener.on_usage(usage)


EMITTED: Final = Emitted()
"""The one of this process."""
