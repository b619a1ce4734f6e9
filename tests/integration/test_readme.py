"""Every example of the README, run as it stands: files are written, shell blocks are run, in order."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(sh|python|yaml)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
UP_TIMEOUT_S = 90
SHELL_TIMEOUT_S = 90

pytestmark = [pytest.mark.broker, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with the README's files in it, and `spendfuse up` running."""
    directory = tmp_path_factory.mktemp("readme")
    for _, text in BLOCKS:
        named = re.match(r"# (\S+\.(?:py|yaml))\n", text)
        if named:
            (directory / named[1]).write_text(text, encoding="utf-8")
    log = directory / "up.log"
    with log.open("wb") as out:
        up = subprocess.Popen(
            ["spendfuse", "up"], cwd=directory, env=environment(), stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + UP_TIMEOUT_S
        while b"spendfuse is up" not in log.read_bytes():
            assert up.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield directory
    finally:
        up.send_signal(signal.SIGINT)
        try:
            up.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(up.pid, signal.SIGKILL)


def environment() -> dict[str, str]:
    """The shell of somebody who has installed spendfuse, with nothing set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SPENDFUSE_")}
    return kept | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def shell(script: str, place: Path) -> str:
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=place, env=environment(), capture_output=True, text=True,
        timeout=SHELL_TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_shell_examples_work_in_order_and_the_agent_is_stopped_by_its_budget(place: Path) -> None:
    printed = [shell(text, place) for kind, text in BLOCKS if kind == "sh"]
    agent = next(text for text in printed if "planner-7" in text)
    assert "reached its day cap of USD 0.50" in agent
    assert "tripped" in agent  # `spendfuse status --once`, in the same block


def test_the_example_of_a_test_without_a_broker_runs(tmp_path: Path) -> None:
    (example,) = [text for kind, text in BLOCKS if kind == "python" and text.startswith("# test_budgets.py")]
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "reached its day cap of USD 0.50" in done.stdout


@pytest.mark.parametrize("command", ["demo", "test"])
def test_the_two_commands_exist_and_make_their_own_environment(command: str) -> None:
    assert f"make {command}" in README
    dry = subprocess.run(["make", "-n", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ".venv" in dry.stdout


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
