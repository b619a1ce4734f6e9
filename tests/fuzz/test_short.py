"""A short round of `make fuzz`: nothing breaks, every reader takes some of it, and what would break is found."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest

from fuzz import targets
from fuzz.fuzz import BATCH, DEFECTS_MAX, fuzz, run
from fuzz.mutate import mutated
from fuzz.targets import TARGETS, Target
from spendfuse.pipeline.intake import Round, rounds

if TYPE_CHECKING:
    from collections.abc import Iterator

INPUTS, SEED = 30_000, 5


def test_no_bytes_break_a_reader_and_every_record_of_the_intake_is_accounted_for() -> None:
    found = run(INPUTS, SEED)
    assert [defect for each in found for defect in each.defects] == []
    assert sum(each.inputs for each in found) >= INPUTS
    assert {each.target: each.taken for each in found if each.taken == 0} == {}, "all refused: then little was tried"


def test_the_same_seed_gives_the_same_inputs() -> None:
    for target in TARGETS:
        one, other = (
            [mutated(chance, target.seeds) for _ in range(20)]
            for chance in (random.Random(SEED), random.Random(SEED))  # noqa: S311 - it must repeat
        )
        assert one == other


def test_what_a_reader_raises_beside_its_refusals_is_kept_with_the_bytes() -> None:
    def check(_: random.Random, values: object) -> int:
        raise KeyError(values)

    found = fuzz(Target("broken", [b"{}"], check, 1), 10_000, SEED)
    assert len(found.defects) == DEFECTS_MAX
    assert all(len(values) == BATCH and "KeyError" in text for values, text in found.defects)


@pytest.mark.parametrize("loses", ["a usage", "a dead letter", "a token"])
def test_an_intake_that_loses_something_is_found(loses: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def losing(*given: Any) -> Iterator[Round]:
        for each in rounds(*given):
            packed = {partition: json.loads(body) for partition, body in each.packed.items()}
            usages = next(iter(packed.values()))["usages"] if packed else []
            if loses == "a usage" and len(usages) > 1:
                del usages[1]
            elif loses == "a token" and usages:
                usages[0]["u"]["tokens"]["output"] += 1
            elif loses == "a dead letter":
                each.dead[:1] = []
            yield Round({partition: json.dumps(body).encode() for partition, body in packed.items()}, each.dead,
                        sum(len(body["usages"]) for body in packed.values()))  # fmt: skip

    monkeypatch.setattr(targets, "rounds", losing)
    target = next(target for target in TARGETS if target.name == "intake")
    assert fuzz(target, 5_000, SEED).defects
