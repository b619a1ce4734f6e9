"""The command line as a person uses it: `spendfuse up`, and the other commands against it, each a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import pytest

from spendfuse.client import Guard, Halted, Meter
from spendfuse.embedded.tansu import BrokerUnavailableError, broker_binary
from spendfuse.wire.topics import TOPICS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

UP_DEADLINE_S = 120.0
COMMAND_DEADLINE_S = 60.0
EFFECT_DEADLINE_S = 30.0
SOURCES = Path(__file__).parents[2] / "streams"
AGENT = {"workspace": "acme", "team": "research", "agent": "planner-7"}
SCOPE = "agent:acme/research/planner-7"
BUDGETS = """version: 1
budgets:
  - id: research
    scope: agent:acme/research/*
    caps: [{amount: 1M tokens, window: day}, {amount: 50 USD, window: day}]
  - id: everybody
    scope: workspace:acme
    caps: [{amount: 10M tokens, window: month}]
"""

pytestmark = pytest.mark.broker


class Answer(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


class Up(NamedTuple):
    directory: Path
    process: subprocess.Popen[str]
    state: dict[str, Any]

    def run(self, *words: str, stdin: str = "") -> Answer:
        done = subprocess.run(
            [sys.executable, "-m", "spendfuse", *words],
            input=stdin, capture_output=True, text=True, timeout=COMMAND_DEADLINE_S, check=False,
            cwd=self.directory, env=environment(),
        )  # fmt: skip
        return Answer(done.returncode, done.stdout, done.stderr)

    def settings(self) -> dict[str, object]:
        """What an agent is told, as keyword arguments."""
        lines = (self.directory / ".spendfuse" / "agent.env").read_text(encoding="utf-8").splitlines()
        pairs = (line.partition("=") for line in lines)
        return {name.removeprefix("SPENDFUSE_").lower(): value for name, _, value in pairs}


def environment() -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("SPENDFUSE_")}
    return env | {"PYTHONPATH": str(SOURCES)}


def until(what: Callable[[], Any], deadline_s: float = EFFECT_DEADLINE_S) -> Any:
    give_up_at = time.monotonic() + deadline_s
    while not (found := what()):
        assert time.monotonic() < give_up_at, f"{what} did not come about within {deadline_s} s"
        time.sleep(0.05)
    return found


def start_up(directory: Path, *words: str) -> Up:
    try:
        broker_binary(directory)
    except BrokerUnavailableError as error:
        pytest.skip(str(error))
    log = (directory / "up.err").open("w", encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "spendfuse", "up", "--json", *words],
        stdout=subprocess.PIPE, stderr=log, text=True, cwd=directory, env=environment(), start_new_session=True,
    )  # fmt: skip
    log.close()
    timer = time.monotonic() + UP_DEADLINE_S
    path = directory / ".spendfuse" / "up.json"
    try:
        while not path.exists():
            assert process.poll() is None, (directory / "up.err").read_text(encoding="utf-8")
            assert time.monotonic() < timer, "up was not ready in time"
            time.sleep(0.1)
        assert process.stdout is not None
        return Up(directory, process, json.loads(process.stdout.readline()))
    except BaseException:
        process.kill()
        process.wait()
        raise


def end(up: Up) -> None:
    up.process.terminate()
    try:
        up.process.wait(timeout=COMMAND_DEADLINE_S)
    finally:
        up.process.kill()
        if up.process.stdout is not None:
            up.process.stdout.close()


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    directory = tmp_path_factory.mktemp("up")
    (directory / "budgets.yaml").write_text(BUDGETS, encoding="utf-8")
    running = start_up(directory, "--partitions", "2", "--budgets", "budgets.yaml")
    try:
        yield running
    finally:
        end(running)


def rows(up: Up, *words: str) -> dict[tuple[str, str], dict[str, Any]]:
    status = up.run("status", "--once", "--json", *words).data
    return {(row["scope"], row["cap"]): row for row in status["rows"]}


def test_the_topics_are_there_and_creating_them_again_changes_nothing(up: Up) -> None:
    reports = up.run("topics", "create", "--json").data
    assert len(reports) == len(TOPICS)
    assert {report["state"] for report in reports} == {"exists"}
    assert next(report for report in reports if report["topic"] == "spendfuse.usage.v1")["partitions"] == 2
    wrong = up.run("topics", "create", "--partitions", "3")
    assert wrong.code == 64
    assert "2 partitions" in wrong.err


def test_budgets_are_applied_once_and_listed(up: Up) -> None:
    again = up.run("budgets", "apply", "budgets.yaml", "--json").data
    assert {change["state"] for change in again["changes"]} == {"unchanged"}
    listed = up.run("budgets", "list", "--json").data["budgets"]
    assert [(budget["id"], budget["version"]) for budget in listed] == [("everybody", 1), ("research", 1)]

    extra = BUDGETS + "  - id: extra\n    scope: workspace:other\n    caps: [{amount: 5 USD, window: day}]\n"
    dry = up.run("budgets", "apply", "-", "--dry-run", "--json", stdin=extra).data
    assert [change["key"] for change in dry["changes"] if change["state"] == "new"] == ["extra"]
    assert len(up.run("budgets", "list", "--json").data["budgets"]) == 2
    assert up.run("budgets", "apply", "-", stdin=extra).code == 0
    raised = extra.replace("5 USD", "6 USD")
    up.run("budgets", "apply", "-", stdin=raised)
    listed = up.run("budgets", "list", "--json").data["budgets"]
    assert [(budget["id"], budget["version"]) for budget in listed if budget["id"] == "extra"] == [("extra", 2)]
    up.run("budgets", "apply", "budgets.yaml", "--prune")
    assert len(up.run("budgets", "list", "--json").data["budgets"]) == 2


def test_what_is_emitted_is_in_the_wallet_to_the_token_and_the_nano_dollar(up: Up) -> None:
    words = [f"--{name}={value}" for name, value in AGENT.items()]
    call = ["--provider", "anthropic", "--model", "claude-sonnet-4-6", "--input", "1000", "--output", "100"]
    emitted = up.run("usage", "emit", *words, *call, "--id", "call-1", "--json").data
    assert emitted["emitted"] == 1
    up.run("usage", "emit", *words, *call, "--id", "call-1")  # the same call again is charged once
    pack = {"v": 1, "usages": [emitted["usages"][0] | {"id": f"call-{number}"} for number in (2, 3)]}
    assert up.run("usage", "emit", "--stdin", "--json", stdin=json.dumps(pack)).data["emitted"] == 2

    def settled() -> dict[tuple[str, str], dict[str, Any]] | None:
        found = rows(up)
        return found if found.get(("workspace:acme", "month-tokens"), {}).get("spend") == 3_300 else None

    wallet = until(settled)
    tokens, dollars = wallet[SCOPE, "day-tokens"], wallet[SCOPE, "day-usd"]
    assert (tokens["spend"], tokens["cap_amount"], tokens["used"]) == (3_300, 1_000_000, 33)
    # 3 USD a million in, 15 USD a million out, by the vendor's list: 1,000 and 100 tokens, three times.
    assert dollars["spend"] == 3 * (1_000 * 3_000 + 100 * 15_000)
    assert {row["state"] for row in wallet.values()} == {"armed"}
    assert {scope for scope, _ in rows(up, "--scope", "workspace:*")} == {"workspace:acme"}


def test_status_for_a_person_is_plain_text_where_there_is_no_terminal(up: Up) -> None:
    answer = up.run("status", "--once")
    assert answer.code == 0
    assert "\x1b" not in answer.out
    assert "ready" in answer.out


def test_a_persons_halt_stops_an_agent_and_resume_lets_it_go(up: Up) -> None:
    with Guard.from_env(**AGENT, **up.settings()) as guard:
        guard.check()
        halted = up.run("halt", SCOPE, "--reason", "it loops", "--by", "ada", "--wait", "5", "--json").data
        halt = until(lambda: guard.wait_halted(1.0))
        assert isinstance(halt, Halted)
        assert halt.command is not None
        assert (halt.command.id, halt.command.by, halt.command.reason) == (halted["command"]["id"], "ada", "it loops")
        with pytest.raises(Halted, match="it loops"):
            guard.check()
        assert {ack["agent"] for ack in halted["acks"]} == {SCOPE}
        assert {row["state"] for (scope, _), row in rows(up).items() if scope == SCOPE} == {"held"}

        second = up.run("resume", SCOPE, "--reason", "fixed", "--by", "ada", "--json").data
        assert second["command"]["seq"] > halted["command"]["seq"]
        until(lambda: guard.wait_halted(0.0) is None)
        guard.check()
    assert {row["state"] for (scope, _), row in rows(up).items() if scope == SCOPE} == {"armed"}


def test_a_table_is_imported_with_its_bad_rows_named_and_again_charges_nothing_more(up: Up) -> None:
    lines = [
        f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(time.time() - n))},a{n % 2},{n},10" for n in range(1, 51)
    ]
    table = "when,who,tokens_in,tokens_out\n" + "\n".join([*lines[:10], "yesterday,a1,1,1", *lines[10:]]) + "\n"
    (up.directory / "calls.csv").write_text(table, encoding="utf-8")
    columns = ["ts=when", "agent=who", "input=tokens_in", "output=tokens_out", "workspace='imp'", "team='t'"]
    literals = ["provider='anthropic'", "model='claude-sonnet-4-6'"]
    words = [
        "usage",
        "import",
        "calls.csv",
        *(word for item in columns + literals for word in ("--map", item)),
        "--json",
    ]
    first = up.run(*words)
    assert first.code == 1  # one row could not be used
    said = json.loads(first.out)
    assert (said["usages"], said["bad_rows"], said["errors"][0]["row"]) == (50, 1, 12)
    cost = sum(range(1, 51)) * 3_000 + 50 * 10 * 15_000

    def spent() -> int:
        return rows(up, "--all").get(("workspace:imp", ""), {}).get("spend", 0)

    until(lambda: spent() == cost)
    up.run(*words)
    # A call of each agent behind the second import: once it is charged, so would the import be.
    settings = {name: value for name, value in up.settings().items() if name != "public_keys"}
    for agent in ("a0", "a1"):
        with Meter.from_env(workspace="imp", team="t", agent=agent, **settings) as meter:
            meter.record(provider="anthropic", model="claude-sonnet-4-6", input=1)
    until(lambda: spent() >= cost + 2 * 3_000)
    assert spent() == cost + 2 * 3_000


def test_the_doctor_finds_everything_well_and_says_what_is_not(up: Up) -> None:
    checks = {check["name"]: check for check in up.run("doctor", "--json").data["checks"]}
    assert {name: check["state"] for name, check in checks.items()} == dict.fromkeys(checks, "ok")
    assert {"broker", "topics", "workers", "clocks", "clickhouse", "trail", "public keys", "signing key"} <= set(checks)
    away = up.run("doctor", "-b", "127.0.0.1:1", "--json")
    assert away.code == 1
    assert {check["name"] for check in json.loads(away.out)["checks"] if check["state"] == "failed"} == {"broker"}


def test_a_second_up_in_the_same_directory_is_refused(up: Up) -> None:
    answer = up.run("up")
    assert answer.code == 64
    assert "another `spendfuse up`" in answer.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_running_after_up_has_ended(tmp_path: Path, number: signal.Signals) -> None:
    if number is signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only the Linux kernel ends the children of a parent that was killed")
    up = start_up(tmp_path, "--no-audit", "--partitions", "1")
    try:
        children = psutil.Process(up.process.pid).children(recursive=True)
        assert len(children) >= 2
        up.process.send_signal(number)
        code = up.process.wait(timeout=COMMAND_DEADLINE_S)
    finally:
        end(up)
    assert code == (-9 if number is signal.SIGKILL else 0)
    until(lambda: not [child for child in children if alive(child)])
    assert up.run("status", "--once").code == 69


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
