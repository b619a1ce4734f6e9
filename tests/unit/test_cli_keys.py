"""`spendfuse keys`: a rotation in two steps, in which no guard meets a key it does not know."""

from __future__ import annotations

import base64
import json
import stat
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from spendfuse.cli.app import app
from spendfuse.client.keys import BadSignature, Signer, Verifier, guard_signer_of
from spendfuse.settings import GuardSettings
from spendfuse.wire.base import to_us
from spendfuse.wire.topics import COMMANDS

if TYPE_CHECKING:
    from pathlib import Path

DAY_US = 86_400_000_000


def run(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["keys", *arguments])
    assert done.exit_code == code, done.output
    return done.output


def listed(directory: Path, code: int = 0) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(run("list", "--dir", str(directory), "--json", code=code).splitlines()[0])
    return rows


def signed(directory: Path) -> bytes:
    return Signer.parse((directory / "signing.key").read_text()).sign(COMMANDS.name, b"k", b"v")


def believed(public: str, header: bytes, now_us: int = 0) -> bool:
    try:
        Verifier.parse(public, lambda: now_us).verify(COMMANDS.name, b"k", b"v", header)
    except BadSignature:
        return False
    return True


def test_in_a_rotation_every_guard_believes_every_worker(tmp_path: Path) -> None:
    """Guards with the file from before, between and after; workers with the key from before and after."""
    from datetime import UTC, datetime

    directory = tmp_path / "keys"
    run("new", "--out", str(directory), "--kid", "one")
    public, headers = [(directory / "public.key").read_text()], [signed(directory)]
    run("rotate", "--dir", str(directory), "--kid", "two")
    public.append((directory / "public.key").read_text())
    assert signed(directory) == headers[0]  # a worker that starts now still signs with what old guards know
    assert [(row["kid"], row["signs"], row["known"]) for row in listed(directory)] == [
        ("one", "now", "yes"), ("two", "next", "yes"),
    ]  # fmt: skip
    run("rotate", "--dir", str(directory), "--finish", "--overlap", "2d")
    public.append((directory / "public.key").read_text())
    headers.append(signed(directory))
    now_us = to_us(datetime.now(UTC))
    assert [[believed(each, header, now_us) for each in public] for header in headers] == [
        [True, True, True], [False, True, True],
    ]  # fmt: skip
    assert not believed(public[2], headers[0], now_us + 3 * DAY_US)
    assert believed(public[2], headers[1], now_us + 3 * DAY_US)
    rows = listed(directory)
    assert [(row["kid"], row["signs"], row["until"] is None) for row in rows] == [
        ("two", "now", True),
        ("one", "", False),
    ]
    assert not (directory / "signing.next.key").exists()


def test_files_stay_readable_by_their_owner_alone_and_no_private_key_is_shown(tmp_path: Path) -> None:
    directory = tmp_path / "keys"
    said = run("new", "--out", str(directory))
    said += run("rotate", "--dir", str(directory)) + run("list", "--dir", str(directory))
    secrets = [(directory / name).read_text().strip().partition("=")[2] for name in ("signing.key", "signing.next.key")]
    said += run("rotate", "--dir", str(directory), "--finish") + run("list", "--dir", str(directory), "--json")
    assert not any(secret in said for secret in secrets)
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}
    assert len({row["kid"] for row in listed(directory)}) == 2  # two keys of one day have two ids


def test_steps_out_of_order_are_refused_and_change_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "keys"
    assert "there are no keys" in run("rotate", "--dir", str(directory), code=64)
    run("new", "--out", str(directory), "--kid", "one")
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert "no rotation has begun" in run("rotate", "--dir", str(directory), "--finish", code=64)
    assert "is taken" in run("rotate", "--dir", str(directory), "--kid", "one", code=2)
    assert "no length of time" in run("rotate", "--dir", str(directory), "--finish", "--overlap", "soon", code=2)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    run("rotate", "--dir", str(directory), "--kid", "two")
    assert "has begun" in run("rotate", "--dir", str(directory), "--kid", "three", code=64)


def test_a_key_that_guards_refuse_is_said_by_list(tmp_path: Path) -> None:
    for name in ("one", "two"):
        run("new", "--out", str(tmp_path / name), "--kid", name)
    (tmp_path / "one" / "public.key").write_bytes((tmp_path / "two" / "public.key").read_bytes())
    assert "guards with these public keys refuse it" in run("list", "--dir", str(tmp_path / "one"), code=1)


@pytest.mark.parametrize("text", ["one=AAAA", "rubbish", "one=AAAA;until=tomorrow"])
def test_a_public_key_file_that_cannot_be_used_is_named(tmp_path: Path, text: str) -> None:
    run("new", "--out", str(tmp_path / "keys"))
    (tmp_path / "keys" / "public.key").write_text(text)
    assert "public.key cannot be used" in run("list", "--dir", str(tmp_path / "keys"), code=64)


def test_the_doctor_says_whether_the_key_that_signs_is_believed(tmp_path: Path) -> None:
    from spendfuse.cli.doctor import key_checks
    from spendfuse.cli.target import Target
    from spendfuse.settings import BrokerSettings

    run("new", "--out", str(tmp_path), "--kid", "one")
    public = (tmp_path / "public.key").read_text().strip()

    def signing(public_keys: str) -> tuple[str, str]:
        env = {"SPENDFUSE_SIGNING_KEY_FILE": str(tmp_path / "signing.key"), "SPENDFUSE_PUBLIC_KEYS": public_keys}
        check = key_checks(Target(BrokerSettings.from_env({}), "test", env, None))[-1]
        return check.state, check.found

    assert signing(public) == ("ok", "one, and guards know it")
    assert signing(f"{public};until=2099-01-01T00:00:00Z")[0] == "warning"
    assert signing(f"{public};until=2020-01-01T00:00:00Z") == ("failed", "one ended at 2020-01-01T00:00:00.000000Z")
    assert signing(public.replace("one=", "two="))[0] == "failed"


def test_a_guards_own_key_is_enrolled_with_its_scope_and_its_secret_is_not_shown(tmp_path: Path) -> None:
    made = json.loads(
        run("new", "--out", str(tmp_path), "--for", "guard", "--kid", "g1", "--scope", "team:a/b", "--json")
    )
    secret = (tmp_path / "g1.key").read_text().strip()
    assert stat.S_IMODE((tmp_path / "g1.key").stat().st_mode) == 0o600
    assert made["public_keys"].endswith(";scope=team:a/b")
    settings = GuardSettings.from_env({"SPENDFUSE_GUARD_KEY_FILE": str(tmp_path / "g1.key")})
    signer = guard_signer_of(settings)
    assert signer is not None
    assert signer.public_bytes == base64.b64decode(made["public_keys"].partition("=")[2].partition(";")[0])
    shown = run("new", "--out", str(tmp_path / "other"), "--for", "guard")
    assert "SPENDFUSE_GUARD_KEYS=" in shown
    for text in (json.dumps(made), repr(settings)):
        assert secret.partition("=")[2] not in text
    assert "bound to run:a/1" in " ".join(
        run("new", "--out", "x", "--for", "guard", "--scope", "run:a/1", code=2).split()
    )
