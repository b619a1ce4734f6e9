"""Environments of a benchmark's own: what it compares with, or draws with, is no dependency of the project.

Each lies under `.cache/bench/`, installed once from a file of pins and hashes in `locks/` (`make lock` writes them).
"""

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCKS = Path(__file__).with_name("locks")
CACHE = ROOT / ".cache" / "bench"
INSTALL_S_MAX = 900.0


class NotInstalledError(RuntimeError):
    """An environment could not be made; the message says where pip's words are."""


def environment(name: str) -> Path:
    """Return the Python of the environment of `locks/<name>.txt`, installed now if need be (in minutes)."""
    lock = LOCKS / f"{name}.txt"
    home = CACHE / f"{name}-{hashlib.sha256(lock.read_bytes()).hexdigest()[:16]}"
    python, stamp = home / "bin" / "python", home / ".installed"
    if stamp.exists():
        return python
    CACHE.mkdir(parents=True, exist_ok=True)
    log = CACHE / f"{name}.log"  # pip's words name registries, so they stay in a file
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    steps = (
        [sys.executable, "-m", "venv", "--clear", str(home)],
        [*pip, "--require-hashes", "--no-deps", "-r", str(lock)],
    )
    with log.open("wb") as words:
        for step in steps:
            try:
                done = subprocess.run(step, stdout=words, stderr=words, timeout=INSTALL_S_MAX, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise NotInstalledError(f"{name}: {type(error).__name__}, see {log.relative_to(ROOT)}") from None
            if done.returncode != 0:
                raise NotInstalledError(f"{name}: exit code {done.returncode}, see {log.relative_to(ROOT)}")
    stamp.touch()
    return python
