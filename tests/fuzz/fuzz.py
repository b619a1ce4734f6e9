"""Feed every reader of bytes with changed messages, and say what broke.

    python tests/fuzz/fuzz.py [--inputs 1000000] [--seed 1] [--target intake] [--keep DIR]

Prints, for each target, how many inputs it was given, how many it took, and how many broke it. The same seed gives the
same inputs. Exit 1 when anything broke; `--keep` takes the bytes and the traceback of each.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if __name__ == "__main__":
    # In place of this file's own directory, where `fuzz` would be this file.
    sys.path[:1] = [str(Path(__file__).resolve().parents[2] / "streams"), str(Path(__file__).resolve().parents[1])]

from fuzz.mutate import mutated
from fuzz.targets import TARGETS

if TYPE_CHECKING:
    from fuzz.targets import Target

BATCH = 20
"""Inputs that a target gets together; of one that breaks it, each is tried again alone."""
DEFECTS_MAX = 20
"""Most defects of one target that are looked for."""


class Found(NamedTuple):
    """What became of one target's inputs."""

    target: str
    inputs: int
    taken: int
    defects: list[tuple[list[bytes], str]]
    cpu_s: float


def fuzz(target: Target, inputs: int, seed: int) -> Found:
    """Give a target so many inputs."""
    chance = random.Random(f"{seed}/{target.name}")  # noqa: S311 - it must repeat
    given = taken = 0
    defects: list[tuple[list[bytes], str]] = []
    began = time.process_time()
    while given < inputs and len(defects) < DEFECTS_MAX:
        values = [mutated(chance, target.seeds) for _ in range(min(BATCH, inputs - given))]
        given += len(values)
        try:
            taken += target.check(chance, values)
        except Exception:  # noqa: BLE001 - whatever a reader raises is what is looked for
            defects.append((values, traceback.format_exc()))
    return Found(target.name, given, taken, defects, time.process_time() - began)


def run(inputs: int, seed: int, only: str | None = None) -> list[Found]:
    """Share so many inputs out among the targets."""
    chosen = [target for target in TARGETS if only in (None, target.name)]
    shares = sum(target.share for target in chosen)
    return [fuzz(target, -(-inputs * target.share // shares), seed) for target in chosen]


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--target", choices=[target.name for target in TARGETS])
    parser.add_argument("--keep", type=Path, help="directory for what broke something")
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    began = time.monotonic()
    found = run(chosen.inputs, chosen.seed, chosen.target)
    print(f"{'target':<14}{'inputs':>10}{'taken':>10}{'defects':>9}{'CPU s':>8}")
    for each in found:
        print(f"{each.target:<14}{each.inputs:>10}{each.taken:>10}{len(each.defects):>9}{each.cpu_s:>8.1f}")
    broken = sum(len(each.defects) for each in found)
    print(f"{sum(each.inputs for each in found)} inputs, {broken} defects, {time.monotonic() - began:.0f} s")
    for each in found:
        for number, (values, text) in enumerate(each.defects):
            print(f"\n{each.target}, defect {number}:\n{text}")
            if chosen.keep:
                chosen.keep.mkdir(parents=True, exist_ok=True)
                stem = chosen.keep / f"{each.target.replace(' ', '-')}-{number}"
                stem.with_suffix(".txt").write_text(text)
                stem.with_suffix(".bin").write_bytes(b"\n".join(values))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
