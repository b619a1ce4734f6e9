"""Where a worker's CPU time goes: samples of its stacks by py-spy, from an environment of its own."""

import collections
import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from isolated import environment

SAMPLES_A_SECOND = 200
LONGEST_S = 600
ENDS_S = 60.0
READY = "Sampling process"
LIBRARIES = {
    "aiokafka/producer": "aiokafka: batches and requests of the producer",
    "aiokafka/record": "aiokafka: record batches read and written",
    "aiokafka/consumer": "aiokafka: the consumer's fetches",
    "aiokafka": "aiokafka: connections and the rest",
    "mode": "faust and mode",
    "faust": "faust and mode",
    "pydantic": "pydantic",
    "asyncio": "asyncio: the event loop",
}
"""A library's part of the path, and what its time is called; the first that fits counts."""


@contextlib.contextmanager
def sampled(pid: int, into: Path) -> Iterator[None]:
    """Sample the stacks of a process while the block runs; `into` then holds them, folded, a line for each stack.

    Errors: `isolated.NotInstalledError` when py-spy cannot be installed; RuntimeError when it may not look.
    """
    spy = environment("profile").parent / "py-spy"
    argv = [str(spy), "record", "--nonblocking", "-p", str(pid), "-r", str(SAMPLES_A_SECOND), "-f", "raw"]
    argv += ["-o", str(into), "-d", str(LONGEST_S)]  # nonblocking: it cannot halt a process that is stopped already
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        said = ""
        for line in process.stdout or ():
            said = line
            if READY in line:
                break
        else:
            raise RuntimeError(f"py-spy ended: {said.strip()}")
        try:
            yield
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=ENDS_S)


def shares(folded: Path) -> list[tuple[str, float]]:
    """Return (what, its share of the time), the largest first: our modules by name, libraries by what they do.

    A sample counts for the innermost frame that belongs to one of them. A module's C calls (msgspec, hashes, JSON)
    are its own.
    """
    counts: collections.Counter[str] = collections.Counter()
    for line in folded.read_text().splitlines():
        stack, _, samples = line.rpartition(" ")
        frames = stack.split(";")
        if "select" in frames[-1] and "selectors.py" in frames[-1]:
            continue  # it waits
        counts[next((name for name in map(_called, reversed(frames)) if name), "the rest")] += int(samples)
    total = counts.total()
    return [(name, count / total) for name, count in counts.most_common()]


def _called(frame: str) -> str | None:
    path = frame.partition(" (")[2].rpartition(":")[0]
    for root in ("spendfuse/", "streams/spendfuse/"):
        if path.startswith(root) or f"/{root}" in path:
            return path.rpartition("spendfuse/")[2]
    return next((name for part, name in LIBRARIES.items() if f"/{part}/" in f"/{path}"), None)
