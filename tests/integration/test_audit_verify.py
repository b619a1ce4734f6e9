"""Every attack on a sealed trail is found, and named with its batch; what only time or an upgrade did is no attack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("chdb", reason="the embedded ClickHouse needs the chdb package")
pytest.importorskip("clickhouse_connect")

from audit_attacks import ATTACKS
from audit_trails import entries, messages, sealed

DEADLINE_S = 300
pytestmark = pytest.mark.timeout(DEADLINE_S + 60)
ROWS = len(entries(0)) + 1
"""Rows of a partition's trail: its entries, and the message that nobody can read."""
# attack -> the findings in (partition, batch, cause)
EXPECTED: dict[str, list[tuple[int, int, str]]] = {
    "nothing": [],
    "a cost": [(0, 1, "altered")],
    "a tag": [(0, 1, "altered")],
    "a rate": [(0, 1, "altered")],
    "a computed column": [(p, seq, "altered") for p in (0, 1) for seq in range(1, 6)],
    "a flag": [(0, 1, "altered")],
    "a row in the place of another": [(0, 1, "altered")],
    "a command's message": [(0, 3, "altered")],
    "a null": [(0, 3, "altered")],
    "an ack's time": [(0, 3, "altered")],
    "a correction": [(0, 5, "altered")],
    "a correction deleted": [(0, 5, "truncated")],
    "an alert": [(0, 3, "altered")],
    "an event": [(0, 3, "altered")],
    "a row deleted": [(0, 1, "deleted")],
    "a row deleted lightly": [(0, 3, "deleted")],
    "a table truncated": [(0, 3, "deleted"), (1, 3, "deleted")],
    "the last row of a batch": [(0, 1, "truncated")],
    "a row repeated": [(0, 1, "inserted")],
    "a row added": [(0, 1, "inserted")],
    "a row of no batch": [(0, 0, "inserted")],
    "a row of a batch to come": [(0, 99, "inserted")],
    "two rows exchanged": [(0, 1, "reordered")],
    "a row moved to another batch": [(0, 1, "deleted"), (0, 4, "inserted")],
    "a row moved to another partition": [(0, 1, "deleted"), (1, 1, "inserted")],
    "a header gone": [(0, 3, "missing header"), (0, 3, "missing header")],
    "a header and its rows gone": [(0, 3, "missing header")],
    "the tail cut": [],  # of a chain alone nobody can say where it ended: that is what checkpoints are for
    "a header's field": [(0, 2, "header altered")],
    "a header's time": [(0, 2, "header altered")],
    "a header hashed anew": [(0, 3, "forked chain")],
    "a fork": [(0, 2, "altered"), (0, 2, "forked chain"), (0, 3, "forked chain")],
    "a header repeated": [(0, 2, "header repeated")],
    "a seal taken off": [(0, 5, "unsealed after sealed")],
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a process of its own found: its engine has no grants, and a process has one engine."""
    program = Path(__file__).parents[1] / "audit_attacks.py"
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path_factory.mktemp("attacked"))],
        capture_output=True, text=True, timeout=DEADLINE_S, check=False,
        env={"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.defpath},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4_000:]
    return dict(json.loads(done.stdout))


def places(findings: list[list[Any]]) -> list[tuple[int, int, str]]:
    return sorted((partition, seq, cause) for partition, seq, cause, _ in findings)


def test_every_attack_has_an_expectation() -> None:
    assert set(EXPECTED) == set(ATTACKS)


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_named_with_its_batch_and_its_cause(found: dict[str, dict[str, Any]], attack: str) -> None:
    assert places(found[attack]["findings"]) == EXPECTED[attack]


def test_an_untouched_trail_is_verified_row_by_row(found: dict[str, dict[str, Any]]) -> None:
    batches = sum(len(list(sealed(partition, messages(partition)))) for partition in (0, 1))
    assert (found["nothing"]["rows"], found["nothing"]["batches"]) == (2 * ROWS, batches)


def test_the_sentence_says_which_row(found: dict[str, dict[str, Any]]) -> None:
    def detail(attack: str) -> str:
        return str(found[attack]["findings"][0][3])

    assert detail("a row deleted") == "11 of 12 rows are there: the first one missing is row 1"
    assert detail("the last row of a batch") == "11 of 12 rows are there: those from row 11 on are gone"
    assert detail("a row repeated").endswith("the first place taken wrongly is row 1")


def test_a_cut_or_rewritten_trail_is_found_by_its_checkpoint_and_by_nothing_else(
    found: dict[str, dict[str, Any]],
) -> None:
    kept, cut, rewritten = (found[f"checkpoint, {name}"] for name in ("kept", "cut", "rewritten"))
    assert (kept["findings"], kept["heads"]) == ([], 2)
    assert cut["without"] == rewritten["without"] == []
    assert places(cut["findings"]) == [(0, 5, "truncated")]
    assert places(rewritten["findings"]) == [(0, 5, "checkpoint mismatch")]


def test_what_retention_took_has_expired_and_what_is_gone_before_is_deleted(found: dict[str, dict[str, Any]]) -> None:
    expired = found["expired"]
    assert places(expired["early"]) == [(0, 2, "truncated"), (0, 3, "truncated")]
    assert (expired["late"], expired["late_expired"]) == ([], 2)
    # A month of usage was dropped with an entry that says so: that excuses no event that is gone as well.
    assert (places(expired["dropped"]), expired["dropped_expired"]) == ([(0, 3, "truncated")], 1)
    assert places(expired["added"]) == [(0, 1, "inserted")]


def test_the_first_version_s_rows_are_unsealed_and_not_tampered_and_the_chain_goes_on_from_them(
    found: dict[str, dict[str, Any]],
) -> None:
    upgraded = found["upgraded"]
    assert upgraded["before"] == []
    assert upgraded["unsealed_batches"] > 1
    assert upgraded["unsealed_rows"] + upgraded["rows"] == ROWS
    usages = [entry for entry in entries(0) if entry.usage]
    assert upgraded["sums"] == [
        len(usages), len(usages), sum(entry.charge.cost_nanos for entry in usages if entry.charge)
    ]  # fmt: skip


def test_of_unsealed_rows_their_number_and_their_last_batch_are_held(found: dict[str, dict[str, Any]]) -> None:
    upgraded = found["upgraded"]
    assert places(upgraded["added"]) == [(0, 0, "inserted")]
    assert places(upgraded["gone"]) == [(0, 0, "deleted")]
    assert (0, upgraded["unsealed_batches"] + 1, "forked chain") in places(upgraded["unlinked"])
