"""How commands find a running `spendfuse up`, and what they take from it."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from spendfuse.cli import target
from spendfuse.cli.state_dir import AlreadyUpError, UpState, held, running
from spendfuse.client.keys import generate

if TYPE_CHECKING:
    from pathlib import Path

STATE = UpState(
    pid=1,
    partitions=8,
    env={
        "SPENDFUSE_BOOTSTRAP_SERVERS": "127.0.0.1:5",
        "SPENDFUSE_FETCH_MAX_WAIT_MS": "20",
        "SPENDFUSE_PUBLIC_KEYS": "a=b",
    },
    signing_key_file="/keys/signing.key",
    public_key_file="/keys/public.key",
    run_directory="/run",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SPENDFUSE_")]:
        monkeypatch.delenv(name)


def test_a_running_up_is_found_and_nobody_else_may_take_its_directory(tmp_path: Path) -> None:
    assert running(tmp_path) is None
    with held(tmp_path):
        STATE.write(tmp_path)
        assert running(tmp_path) == STATE
        assert oct((tmp_path / "up.json").stat().st_mode & 0o777) == "0o600"
        with pytest.raises(AlreadyUpError, match="another"), held(tmp_path):
            pass
    assert running(tmp_path) is None
    assert not (tmp_path / "up.json").exists()


def test_what_a_killed_up_left_behind_is_not_believed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, pathlib\n"
        "from spendfuse.cli.state_dir import held\n"
        "directory = pathlib.Path(sys.argv[1])\n"
        "with held(directory):\n"
        "    (directory / 'up.json').write_text(sys.argv[2])\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), STATE.model_dump_json()], timeout=60, check=False)
    assert done.returncode == -9
    assert (tmp_path / "up.json").exists()
    assert running(tmp_path) is None


def test_its_timings_keys_and_servers_are_used_when_nothing_else_is_named(tmp_path: Path) -> None:
    key_file = tmp_path / "signing.key"
    key_file.write_text(generate("dev")[0], encoding="utf-8")
    with held(tmp_path):
        STATE.model_copy(update={"signing_key_file": str(key_file)}).write(tmp_path)
        where = target.find(None, tmp_path)
    assert where.broker.bootstrap_servers == "127.0.0.1:5"
    assert where.broker.fetch_max_wait_ms == 20
    assert where.operator.partitions == 8
    signer = where.signer()
    assert signer is not None
    assert signer.kid == "dev"


@pytest.mark.parametrize("by_option", [True, False])
def test_other_servers_are_not_mixed_with_its_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_option: bool
) -> None:
    if not by_option:
        monkeypatch.setenv("SPENDFUSE_BOOTSTRAP_SERVERS", "kafka:9092")
    with held(tmp_path):
        STATE.write(tmp_path)
        where = target.find("kafka:9092" if by_option else None, tmp_path)
    assert where.broker.bootstrap_servers == "kafka:9092"
    assert where.broker.fetch_max_wait_ms == 500
    assert where.up is None
    assert "SPENDFUSE_SIGNING_KEY_FILE" not in where.env


def test_the_environment_comes_before_it_also_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "public"
    keys.write_text("mine=x", encoding="utf-8")
    monkeypatch.setenv("SPENDFUSE_PUBLIC_KEYS_FILE", str(keys))
    monkeypatch.setenv("SPENDFUSE_SIGNING_KEY", "mine=too")
    with held(tmp_path):
        STATE.write(tmp_path)
        assert target.find(None, tmp_path).operator.public_keys == "mine=x"
