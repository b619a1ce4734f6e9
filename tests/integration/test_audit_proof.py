"""What an auditor does with the command line, and with a program that is not ours: verify, prove, export, and check."""

from __future__ import annotations

import base64
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("chdb", reason="the embedded ClickHouse needs the chdb package")
pytest.importorskip("clickhouse_connect")

from audit_trails import WRITTEN_MS, entries, messages, sealed
from spendfuse.audit import migrate, trail
from spendfuse.audit.checkpoints import (
    NOTES_FILE,
    Head,
    NoteSigner,
    append_note,
    make_checkpoint,
    own_key,
)
from spendfuse.audit.database import Engine, open_embedded

VERIFIER = Path(__file__).parents[2] / "deploy" / "verifier" / "verify.py"
ROWS = 2 * (len(entries(0)) + 1)
DEADLINE_S = 120
Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedded trail of two partitions and two checkpoints; its process has ended."""
    directory = tmp_path_factory.mktemp("trail")
    database = open_embedded(Engine(directory, "spendfuse"))
    try:
        migrate.apply(database)
        signer = NoteSigner.parse(own_key(directory))
        chains = [list(sealed(partition, messages(partition))) for partition in (0, 1)]
        for chain in chains:
            for batch in chain:
                trail.store(database, batch)
        for upto in (3, 5):
            heads = [Head(n, upto, chain[upto - 1].header.link) for n, chain in enumerate(chains)]
            at = datetime(2026, 1, upto, tzinfo=UTC)
            append_note(directory / NOTES_FILE, signer.sign(make_checkpoint("spendfuse/spendfuse", at, heads)))
    finally:
        database.close()
    return directory


@pytest.fixture(scope="module")
def key(kept: Path) -> str:
    return (kept / "audit.pub").read_text().strip()


@pytest.fixture
def cli(kept: Path, tmp_path: Path) -> Cli:
    env = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.defpath, "SPENDFUSE_CHDB_DIR": str(kept)}

    def run(*words: object, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "spendfuse", *map(str, words)],
            capture_output=True, text=True, timeout=DEADLINE_S, check=False, cwd=tmp_path, env={**env, **more},
        )  # fmt: skip

    return run


def stranger(path: Path, key: str = "") -> tuple[int, str]:
    """The second verifier: isolated, so that not even by accident it finds our package."""
    done = subprocess.run(
        [sys.executable, "-I", str(VERIFIER), str(path), *(["--key", key] if key else [])],
        capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_the_command_says_intact_and_names_what_it_was_held_against(cli: Cli) -> None:
    done = cli("audit", "verify", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["intact"], report["rows"], report["heads"], report["findings"]) == (True, ROWS, 4, [])
    assert "which the audit's own machine keeps" in cli("audit", "verify").stdout


def test_a_time_without_batches_has_nothing_to_verify_and_a_day_counts_as_a_whole(cli: Cli) -> None:
    day = datetime.fromtimestamp(WRITTEN_MS / 1_000, UTC).date().isoformat()
    assert json.loads(cli("audit", "verify", "--from", "2027-01-01", "--json").stdout)["rows"] == 0
    assert json.loads(cli("audit", "verify", "--from", day, "--to", day, "--json").stdout)["rows"] == ROWS


def test_a_checkpoint_that_was_changed_or_signed_by_another_is_not_believed(
    cli: Cli, kept: Path, tmp_path: Path
) -> None:
    text = (kept / NOTES_FILE).read_text()
    changed = tmp_path / "changed.notes"
    changed.write_text(text.replace("time 2026-01-03", "time 2026-01-04", 1))
    done = cli("audit", "verify", "--checkpoint", changed)
    assert done.returncode == 1
    assert "the signature of spendfuse-audit is wrong" in done.stderr
    other = f"other={base64.b64encode(bytes(32)).decode()}"
    done = cli("audit", "verify", "--checkpoint", kept / NOTES_FILE, SPENDFUSE_AUDIT_PUBLIC_KEYS=other)
    assert "signed by no key that is known (other)" in done.stderr


@pytest.mark.parametrize(
    "identity", ["call-1-7", "fix-call-1-3", f"{1:032x}", f"{0:032x}", "spendfuse.operator.v1/0/3"]
)
def test_a_proof_holds_for_us_and_for_a_stranger(cli: Cli, key: str, tmp_path: Path, identity: str) -> None:
    """A usage, a correction, a command (and its acks), an alert and an event."""
    out = tmp_path / "proof.json"
    done = cli("audit", "prove", identity, "--out", out)
    assert done.returncode == 0, done.stderr
    done = cli("audit", "prove", "--check", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert "was sealed before the checkpoint that was signed at 2026-01-0" in done.stdout
    code, said = stranger(out, key)
    assert (code, said[:6]) == (0, "intact"), said


@pytest.mark.parametrize(
    "change",
    [
        lambda proof: proof["row"].update(cost_nanos=1),
        lambda proof: proof["row"].update(batch_row=proof["row"]["batch_row"] + 1),
        lambda proof: proof["row"]["tags"].update(more="x"),
        lambda proof: proof["path"].reverse(),
        lambda proof: proof["path"].pop(),
        lambda proof: proof["headers"][0].update(last_offset=9),
        lambda proof: proof["headers"][0].update(merkle_root="0" * 64),
        lambda proof: proof["headers"].pop(),
        lambda proof: proof["headers"].clear(),
        lambda proof: proof.update(checkpoint=proof["checkpoint"].replace("head 1 3", "head 1 4")),
        lambda proof: proof.pop("row"),
    ],
)
def test_a_proof_with_anything_changed_proves_nothing(cli: Cli, key: str, tmp_path: Path, change: Any) -> None:
    out = tmp_path / "proof.json"
    cli("audit", "prove", "call-1-7", "--out", out)
    proofs = json.loads(out.read_text())
    change(proofs[0])
    out.write_text(json.dumps(proofs))
    done = cli("audit", "prove", "--check", out)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    code, said = stranger(out, key)
    assert (code, "Traceback" in said) == (1, False), said


def test_an_id_that_no_row_has_is_said(cli: Cli) -> None:
    done = cli("audit", "prove", "nobody' OR 1=1 --")
    assert done.returncode == 1
    assert "no sealed row has the id" in done.stderr


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_a_bundle_is_checked_by_a_program_that_shares_no_line_with_ours(
    cli: Cli, key: str, tmp_path: Path, file_format: str
) -> None:
    bundle = tmp_path / "bundle"
    done = cli("audit", "export", bundle, "--format", file_format)
    assert done.returncode == 0, done.stderr
    assert stranger(bundle, key) == (0, f"intact: {ROWS} rows, 10 headers, 4 checkpointed heads\n")
    code, said = stranger(bundle)
    assert (code, "give the audit's public key" in said) == (1, True)
    assert "is not empty" in cli("audit", "export", bundle).stderr


def rewrite(bundle: Path, name: str, change: Callable[[list[Any]], object]) -> None:
    """Change a file's lines, and the manifest as a forger would."""
    path = bundle / name
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    change(lines)
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
    adopt(bundle)


def adopt(bundle: Path) -> None:
    """Write the manifest anew for the files as they are."""
    import hashlib

    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in bundle.iterdir()
        if path.name != "manifest.json"
    }
    (bundle / "manifest.json").write_text(json.dumps(manifest))


USAGE = "usage_events-00000.jsonl.gz"
HEADERS = "headers.jsonl.gz"
FORGERIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a cost": (lambda b: rewrite(b, USAGE, lambda rows: rows[1].update(cost_nanos=1)), "batch 1 .* rows altered"),
    "a row gone": (lambda b: rewrite(b, USAGE, lambda rows: rows.pop(1)), "batch 1 .* the first one missing is row 1"),
    "a row more": (lambda b: rewrite(b, USAGE, lambda rows: rows.append(rows[1])), "batch 1 .* rows inserted"),
    "an order": (
        lambda b: rewrite(b, USAGE, lambda rows: [rows[1].update(batch_row=2), rows[2].update(batch_row=1)]),
        "batch 1 .* rows reordered",
    ),
    "a header gone": (lambda b: rewrite(b, HEADERS, lambda heads: heads.pop(1)), "batch 3 .* missing header"),
    "a header's rows": (
        lambda b: rewrite(b, HEADERS, lambda heads: heads[1].update(rows=1)),
        "batch 2 .* header altered",
    ),
    "a tail cut": (lambda b: rewrite(b, HEADERS, lambda heads: heads.pop(4)), "batch 5 .* truncated: it is not there"),
    "a file gone": (lambda b: (b / "alerts-00000.jsonl.gz").unlink(), "alerts-00000.jsonl.gz: missing"),
    "a file more": (lambda b: (b / "more.jsonl.gz").touch(), "not in the manifest"),
    "a file changed": (lambda b: (b / "checkpoints.notes").write_text(""), "its SHA-256 is not"),
    "a time of a checkpoint": (
        lambda b: [
            (b / "checkpoints.notes").write_text(
                (b / "checkpoints.notes").read_text().replace("time 2026-01-03", "time 2026-01-04")
            ),
            adopt(b),
        ],
        "wrong signature of spendfuse-audit",
    ),
    "no manifest": (lambda b: (b / "manifest.json").write_text("{}"), "cannot be read"),
}


@pytest.fixture(scope="module")
def exported(kept: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("exported") / "bundle"
    env = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": os.defpath, "SPENDFUSE_CHDB_DIR": str(kept)}
    words = [sys.executable, "-m", "spendfuse", "audit", "export", str(bundle), "--format", "jsonl"]
    subprocess.run(words, env=env, cwd=bundle.parent, timeout=DEADLINE_S, check=True, capture_output=True)
    return bundle


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_bundle_is_found_by_the_stranger(exported: Path, key: str, tmp_path: Path, forgery: str) -> None:
    import re
    import shutil

    forge, says = FORGERIES[forgery]
    bundle = tmp_path / "bundle"
    shutil.copytree(exported, bundle)
    forge(bundle)
    code, said = stranger(bundle, key)
    assert code == 1, said
    assert re.search(says, said), said
    assert "Traceback" not in said
