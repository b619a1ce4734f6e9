"""What a running `spendfuse up` says of itself: `up.json` (0600), under a lock that ends with its process."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

STATE_FILE: Final = "up.json"
AGENT_ENV_FILE: Final = "agent.env"
LOCK_FILE: Final = "up.lock"
FILE_BYTES_MAX: Final = 65_536
LOCK_TRIES_MAX: Final = 20
LOCK_PAUSE_S: Final = 0.05
"""A reader holds the lock for an instant; only who holds it longer is another `up`."""


class AlreadyUpError(Exception):
    """Another `spendfuse up` has the directory."""


class UpState(BaseModel):
    """A running stack: what clients need (`env`), and where its keys, logs and trail are."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    v: int = 1
    pid: int
    partitions: int
    env: dict[str, str]
    signing_key_file: str
    public_key_file: str
    run_directory: str
    clickhouse_url: str | None = None
    clickhouse_directory: str | None = None

    def write(self, directory: Path) -> None:
        """Write the state, and the same settings as a file a shell can read; each as a whole, 0600."""
        _replace(directory / STATE_FILE, self.model_dump_json(indent=1) + "\n")
        _replace(directory / AGENT_ENV_FILE, "".join(f"{name}={value}\n" for name, value in self.env.items()))


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold the directory as its only `up`; raises AlreadyUpError. The kernel lets go when the process ends."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (directory / LOCK_FILE).open("a", encoding="utf-8") as lock:
        for attempt in range(LOCK_TRIES_MAX):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt == LOCK_TRIES_MAX - 1:
                    raise AlreadyUpError(
                        f"another `spendfuse up` has {directory}: stop it, or give this one a --state-dir of its own"
                    ) from None
                time.sleep(LOCK_PAUSE_S)
        try:
            yield
        finally:
            for name in (STATE_FILE, AGENT_ENV_FILE):
                (directory / name).unlink(missing_ok=True)


def running(directory: Path) -> UpState | None:
    """Return the state of the `spendfuse up` that runs in a directory now, None if none does."""
    try:
        with (directory / LOCK_FILE).open("r", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _read(directory / STATE_FILE)
            return None  # nobody holds it: whatever is written there is of a process that has gone
    except OSError:
        return None


def _read(path: Path) -> UpState | None:
    try:
        with path.open(encoding="utf-8") as file:
            return UpState.model_validate(json.loads(file.read(FILE_BYTES_MAX)))
    except (OSError, ValueError, ValidationError):
        return None  # it is starting: not yet written


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    partial.replace(path)
