"""The command line as it presents itself: quick, with an example for every command, and in sentences when it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import typer.main
from typer.testing import CliRunner, Result

from spendfuse.cli.app import app
from spendfuse.cli.faults import EXIT_BUG, EXIT_INTERRUPTED, EXIT_SETTINGS, EXIT_UNAVAILABLE, EXIT_USAGE, sentence

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Run = Callable[..., Result]
HEAVY = ("faust", "chdb", "clickhouse_connect", "aiokafka", "yaml", "pydantic")
COMMANDS = {
    "demo", "up", "worker", "topics create", "budgets apply", "budgets check", "budgets list", "status", "usage emit",
    "usage correct", "usage import", "dlq list", "dlq show", "dlq replay", "halt", "resume", "incidents",
    "doctor", "keys list", "keys new", "keys rotate",
    "guard check", "guard exec", "guard mirror", "audit migrate", "audit run",
    "audit verify", "audit prove", "audit export",
    "audit retention", "audit rebuild", "audit subject-key", "audit forget", "audit roles",
    "report wallet", "report team", "report agent", "report run", "report workflow", "report models",
    "report chargeback", "audit duplicates", "state rebuild",
}  # fmt: skip


def commands(group: object, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in getattr(group, "commands", {}).items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


ALL = sorted(" ".join(path) for path in commands(typer.main.get_command(app)))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    for name in [name for name in os.environ if name.startswith("SPENDFUSE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    runner = CliRunner()
    return lambda *words, **options: runner.invoke(app, list(words), **options)


def test_all_the_commands_are_there() -> None:
    assert set(ALL) == COMMANDS


@pytest.mark.parametrize("command", ALL)
def test_the_help_of_every_command_has_an_example_of_itself(run: Run, command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    examples = result.stdout.partition("Examples:")[2]
    assert f"spendfuse {command}" in " ".join(examples.split())


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['spendfuse', '--help']\n"
        "from spendfuse.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "Usage: spendfuse" in done.stdout
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["status", "--once", "-b", "127.0.0.1:1"], EXIT_UNAVAILABLE, "127.0.0.1:1"),
        (["halt", "agent:acme/*", "--reason", "x", "--by", "ada"], EXIT_SETTINGS, "SPENDFUSE_SIGNING_KEY_FILE"),
        (["halt", "team:a/b", "--reason", "x", "--by", "ada", "--for", "soon"], EXIT_USAGE, "'soon'"),
        (["resume", "team:a/b", "--reason", "x", "--by", "ada", "--cap", "c"], EXIT_USAGE, "--budget and --cap"),
        (["usage", "emit", "--agent", "a"], EXIT_USAGE, "--workspace, --team, --provider, --model"),
        (["usage", "import", "x.csv"], EXIT_USAGE, "--preset"),
        (["usage", "import", "x.csv", "--preset", "nothing"], EXIT_SETTINGS, "azure-llm-2023"),
        (["usage", "import", "x.csv", "--preset", "mooncake"], EXIT_SETTINGS, "x.csv"),
        (["budgets", "check", "missing.yaml"], EXIT_SETTINGS, "missing.yaml"),
        (["keys", "new", "--out", "k", "--kid", "a b"], EXIT_USAGE, "a b"),
        (["nonsense"], EXIT_USAGE, "nonsense"),
    ],
)
def test_an_error_is_a_sentence_with_the_value_and_an_exit_code(
    run: Run, words: list[str], code: int, said: str
) -> None:
    result = run(*words)
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_settings_at_fault_are_all_named_at_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPENDFUSE_PARTITIONS", "many")
    monkeypatch.setenv("SPENDFUSE_FLUSH_INTERVAL_MS", "1")
    result = run("worker")
    assert result.exit_code == EXIT_SETTINGS
    assert "SPENDFUSE_PARTITIONS" in result.stderr
    assert "SPENDFUSE_FLUSH_INTERVAL_MS" in result.stderr


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            ModuleNotFoundError("no", name="faust"),
            ("faust is not installed: pip install 'spendfuse[worker]'", EXIT_SETTINGS),
        ),
        (
            ModuleNotFoundError("no", name="chdb.dbapi"),
            ("chdb.dbapi is not installed: pip install 'spendfuse[embedded]'", EXIT_SETTINGS),
        ),
        (ModuleNotFoundError("no", name="nobody_knows"), None),
        (KeyboardInterrupt(), ("interrupted", EXIT_INTERRUPTED)),
        (RuntimeError("boom"), None),
    ],
)
def test_a_missing_extra_names_the_install_and_a_bug_stays_a_bug(error: BaseException, told: object) -> None:
    assert sentence(error) == told


def test_a_fault_of_ours_is_said_to_be_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def boom(*_args: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr("spendfuse.cli.target.find", boom)
    result = run("budgets", "list")
    assert result.exit_code == EXIT_BUG
    assert "fault of spendfuse: RuntimeError: boom" in result.stderr


def test_what_came_from_outside_cannot_steer_the_terminal(run: Run, tmp_path: Path) -> None:
    (tmp_path / "budgets.yaml").write_text('version: 1\nbudgets: ["\\e[2Jx"]\n', encoding="utf-8")
    result = run("budgets", "check", "budgets.yaml")
    assert result.exit_code == EXIT_SETTINGS
    assert "\x1b" not in result.stderr


def test_new_keys_are_a_pair_that_nobody_else_can_read_and_the_secret_is_not_shown(run: Run, tmp_path: Path) -> None:
    result = run("keys", "new", "--out", "k", "--kid", "test", "--json")
    assert result.exit_code == 0
    said = json.loads(result.stdout)
    secret = (tmp_path / "k" / "signing.key").read_text(encoding="utf-8").strip()
    assert secret.partition("=")[2] not in result.stdout
    assert [oct(path.stat().st_mode & 0o777) for path in sorted((tmp_path / "k").iterdir())] == ["0o600", "0o600"]
    # The oracle is cryptography itself: what one signs the other verifies.
    import base64

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

    private = Ed25519PrivateKey.from_private_bytes(base64.b64decode(secret.partition("=")[2]))
    public = Ed25519PublicKey.from_public_bytes(base64.b64decode(said["public_keys"].partition("=")[2]))
    public.verify(private.sign(b"x"), b"x")


def test_keys_that_exist_are_never_overwritten(run: Run, tmp_path: Path) -> None:
    run("keys", "new", "--out", "k")
    before = (tmp_path / "k" / "signing.key").read_bytes()
    result = run("keys", "new", "--out", "k")
    assert result.exit_code == EXIT_SETTINGS
    assert (tmp_path / "k" / "signing.key").read_bytes() == before
