"""What must come out, computed from the bytes that went in and from nothing of the product but its price list."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.samples import DEAR_NANOS, INPUT_NANOS, OUTPUT_NANOS

if TYPE_CHECKING:
    from collections.abc import Iterable

PRICES = {"claude": (INPUT_NANOS, OUTPUT_NANOS), "opus": (15_000, DEAR_NANOS)}


@dataclass
class Truth:
    """Sums by scope, (nanos, tokens, calls); and how often a call came again."""

    spend: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0, 0]))
    calls: int = 0
    duplicates: int = 0

    @classmethod
    def of(cls, values: Iterable[bytes | None]) -> Truth:
        """Add up the finished calls in the values of `usage.v1`, each id of an agent once."""
        truth = cls()
        seen = set()
        for value in values:
            try:
                message = json.loads(value or b"")
            except ValueError:
                continue
            for usage in message.get("usages", [message]):
                if usage.get("kind", "finished") != "finished":
                    continue
                path = f"{usage['workspace']}/{usage['team']}/{usage['agent']}"
                if (path, usage["id"]) in seen:
                    truth.duplicates += 1
                    continue
                seen.add((path, usage["id"]))
                truth.add(usage, path)
        return truth

    def add(self, usage: dict, path: str) -> None:
        self.calls += 1
        tokens = usage["tokens"]
        per_input, per_output = PRICES[usage["model"]]
        nanos = tokens["input"] * per_input + tokens["output"] * per_output
        workspace, team, _ = path.split("/")
        root = usage.get("root_run") or usage["run"]
        for scope in (f"agent:{path}", f"team:{workspace}/{team}", f"workspace:{workspace}", f"run:{workspace}/{root}"):
            sums = self.spend[scope]
            sums[0] += nanos
            sums[1] += tokens["input"] + tokens["output"]
            sums[2] += 1
