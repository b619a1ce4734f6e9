"""The Guard against a broker: halts arrive, resumes let go, forgeries do neither, and it proves that it stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from shared_topics import make_topics
from spendfuse.client import Guard, GuardState, Halted, NoRoom, Tokens
from spendfuse.client.keys import Signer, generate
from spendfuse.embedded.processes import free_port
from spendfuse.embedded.tansu import EmbeddedBroker, broker_binary
from spendfuse.wire import Ack, Command, Heartbeat, Remaining, encode
from spendfuse.wire.signing import SIGNATURE_HEADER
from spendfuse.wire.topics import ACKS, COMMANDS, HEARTBEATS, REMAINING, USAGE

if TYPE_CHECKING:
    from collections.abc import Callable

DEADLINE_S = 20.0
PRIVATE, PUBLIC = generate("test")
SIGNER = Signer.parse(PRIVATE)
FORGER = Signer.parse(generate("test")[0])
WORKSPACE = "test-client-guard"
STREAMS = Path(__file__).parents[2] / "streams"


class Control:
    """A worker's side of the control plane, for tests: creates the topics, commands, beats, reads the acks."""

    def __init__(self, bootstrap: str) -> None:
        self.bootstrap = bootstrap

    def create_topics(self) -> None:
        make_topics(self.bootstrap, COMMANDS, HEARTBEATS, ACKS, REMAINING, USAGE)

    def send(self, topic: str, key: bytes, value: bytes | None, headers: list[tuple[str, bytes]] | None = None) -> None:
        async def produce() -> None:
            producer = AIOKafkaProducer(bootstrap_servers=self.bootstrap, acks="all", max_batch_size=1)
            await producer.start()
            await producer.send_and_wait(topic, value, key, headers=headers or [])
            await producer.stop()

        asyncio.run(produce())

    def command(self, command: Command, signer: Signer = SIGNER, key: str | None = None) -> None:
        name, value = (key or command.key).encode(), encode(command)
        self.send(COMMANDS.name, name, value, [(SIGNATURE_HEADER, signer.sign(COMMANDS.name, name, value))])

    def beat(self, *, ready: bool = True) -> None:
        beat = Heartbeat(emitter="worker-1", ts=datetime.now(UTC), ready=ready, version="0")
        name, value = b"worker-1", encode(beat)
        self.send(HEARTBEATS.name, name, value, [(SIGNATURE_HEADER, SIGNER.sign(HEARTBEATS.name, name, value))])

    def acks(self, guard: Guard, count: int) -> list[Ack]:
        """Return the guard's acks, read until there are so many, or the deadline passes."""

        async def read() -> list[Ack]:
            consumer = AIOKafkaConsumer(
                bootstrap_servers=self.bootstrap, fetch_max_wait_ms=20, auto_offset_reset="earliest"
            )
            await consumer.start()
            try:
                consumer.assign([TopicPartition(ACKS.name, 0)])
                found: list[Ack] = []
                give_up_at = time.monotonic() + DEADLINE_S
                while len(found) < count and time.monotonic() < give_up_at:
                    for records in (await consumer.getmany(timeout_ms=200)).values():
                        acks = [(record.key, Ack.model_validate_json(record.value)) for record in records]
                        assert all(key == ack.scope.encode() for key, ack in acks)
                        found += [ack for _, ack in acks if ack.guard == guard.id]
                return found
            finally:
                await consumer.stop()

        return asyncio.run(read())


@pytest.fixture(
    scope="module",
    params=[pytest.param("tansu", marks=pytest.mark.broker), pytest.param("kraft", marks=pytest.mark.kafka)],
)
def control(request: pytest.FixtureRequest) -> Control:
    control = Control(request.getfixturevalue(request.param).bootstrap_servers)
    control.create_topics()
    return control


def settings(control: Control, agent: str, **more: object) -> dict[str, Any]:
    return {
        "workspace": WORKSPACE,
        "team": agent,  # a team of its own, so that halts of the team are too
        "agent": agent,
        "run": f"run-{agent}",
        "bootstrap_servers": control.bootstrap,
        "fetch_max_wait_ms": 20,
        "producer_max_batch_size": 1,
        "public_keys": PUBLIC,
        "sync_timeout_s": DEADLINE_S,
        **more,
    }


def order(agent: str, action: str, seq: int, *, cap: str = "day", scope: str | None = None, **more: Any) -> Command:
    return Command.model_validate(
        {
            "id": f"{seq:032x}",
            "seq": seq,
            "action": action,
            "scope": scope or f"agent:{WORKSPACE}/{agent}/{agent}",
            "budget": "b",
            "cap": cap,
            "issued_at": datetime.now(UTC),
            **more,
        }
    )


def wait_until(true: Callable[[], Any]) -> None:
    """Return when `true()`; fail at the deadline."""
    give_up_at = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < give_up_at, "waited in vain"
        time.sleep(0.005)


def halted(guard: Guard) -> bool:
    """Ask without acknowledging."""
    return guard.wait_halted(0) is not None


def test_a_halt_raises_and_a_resume_of_its_cap_lets_go(control: Control) -> None:
    with Guard.from_env(**settings(control, "plain")) as guard:
        guard.check()
        control.command(order("plain", "halt", 10, message="Daily cap of USD 50 reached (spent 50.12)."))
        wait_until(lambda: halted(guard))
        with pytest.raises(Halted, match="Daily cap of USD 50 reached") as caught:
            guard.check()
        assert caught.value.command is not None
        assert caught.value.command.seq == 10
        control.command(order("plain", "resume", 11, cap="month"))
        control.command(order("plain", "halt", 9))  # older than what holds: changes nothing
        wait_until(lambda: guard.refused.get("old") == 1)
        assert halted(guard)  # neither did another cap's resume
        control.command(order("plain", "resume", 12))
        wait_until(lambda: not halted(guard))
        guard.check()


@pytest.mark.parametrize("scope", ["team:{w}/{a}", "run:{w}/run-{a}", "agent:{w}/{a}/{a}"])
def test_a_halt_of_any_ancestor_halts_the_agent(control: Control, scope: str) -> None:
    agent = f"below-{scope.partition(':')[0]}"
    with Guard.from_env(**settings(control, agent)) as guard:
        guard.check()
        control.command(order(agent, "halt", 1, scope=scope.format(w=WORKSPACE, a=agent)))
        wait_until(lambda: halted(guard))


def test_a_guard_that_comes_late_obeys_what_was_said_before_it(control: Control) -> None:
    control.command(order("late", "halt", 1, cap="day"))
    control.command(order("late", "halt", 2, cap="week"))
    control.command(order("late", "resume", 3, cap="week"))
    with Guard.from_env(**settings(control, "late")) as guard:
        with pytest.raises(Halted) as caught:
            guard.check()
        assert caught.value.command is not None
        assert caught.value.command.cap == "day"
        # Only the halt that still holds is acknowledged, and it says nothing of the speed of halts.
        acks = control.acks(guard, 2)
    assert [(ack.cap, ack.state, ack.halt_lag_us) for ack in acks] == [
        ("day", "received", None),
        ("day", "enforced", None),
    ]


def test_forged_unsigned_misplaced_and_deleted_commands_are_refused_and_counted(control: Control) -> None:
    with Guard.from_env(**settings(control, "forged")) as guard:
        guard.check()
        halt = order("forged", "halt", 1)
        control.command(halt, signer=FORGER)
        control.send(COMMANDS.name, halt.key.encode(), encode(halt))
        control.command(halt, key=order("forged", "halt", 1, cap="other").key)
        value = b"\xff not json"
        signature = SIGNER.sign(COMMANDS.name, halt.key.encode(), value)
        control.send(COMMANDS.name, halt.key.encode(), value, [(SIGNATURE_HEADER, signature)])
        value = encode(halt)  # rightly signed, for another topic
        signature = SIGNER.sign(ACKS.name, halt.key.encode(), value)
        control.send(COMMANDS.name, halt.key.encode(), value, [(SIGNATURE_HEADER, signature)])
        wait_until(lambda: sum(guard.refused.values()) == 5)
        assert guard.refused == {"signature": 2, "unsigned": 1, "key": 1, "invalid": 1}
        guard.check()
        control.command(halt)
        wait_until(lambda: halted(guard))
        control.send(COMMANDS.name, halt.key.encode(), None)
        wait_until(lambda: guard.refused.get("tombstone") == 1)
        assert halted(guard)


def test_an_expired_halt_is_not_obeyed_and_a_held_one_lapses_without_a_message(control: Control) -> None:
    clock = [int(datetime.now(UTC).timestamp()) * 1_000_000]
    base = settings(control, "expiry")
    with Guard.from_env(**base) as guard:
        guard._clock = guard._time._clock = lambda: clock[0]
        now = datetime.fromtimestamp(clock[0] // 1_000_000, UTC)
        control.command(order("expiry", "halt", 1, cap="past", expires_at=now))
        wait_until(lambda: guard.refused.get("expired") == 1)
        guard.check()
        control.command(order("expiry", "halt", 2, expires_at=now + timedelta(seconds=60)))
        wait_until(lambda: halted(guard))
        clock[0] += 60_000_000
        assert halted(guard), "a clock that was set forward ends no halt"
        guard._time.hear(clock[0] - 1_000_000)  # a worker's heartbeat agrees
        clock[0] -= 1
        assert halted(guard)
        clock[0] += 1
        guard.check()
        assert not halted(guard)


def test_received_and_enforced_are_acknowledged_once_with_the_halt_lag(control: Control) -> None:
    crossed_at = datetime.now(UTC)
    cause = {"usage_id": "call-1", "ts": crossed_at, "partition": 0, "offset": 7}
    with Guard.from_env(**settings(control, "proof")) as guard:
        guard.check()
        control.command(order("proof", "halt", 5, cause=cause))
        wait_until(lambda: halted(guard))
        for _ in range(3):
            with pytest.raises(Halted):
                guard.check()
        first = control.acks(guard, 2)
    assert [ack.state for ack in first] == ["received", "enforced"]
    assert control.acks(guard, 2) == first  # closed, and still only two
    for ack in first:
        assert (ack.seq, ack.scope) == (5, f"agent:{WORKSPACE}/proof/proof")
        assert (ack.agent, ack.run) == (f"agent:{WORKSPACE}/proof/proof", "run-proof")
        assert ack.halt_lag_us == (ack.at - crossed_at) // timedelta(microseconds=1)
        assert 0 < ack.halt_lag_us < DEADLINE_S * 1e6


def test_a_degraded_agent_uses_other_models_and_shorter_answers(control: Control) -> None:
    with Guard.from_env(**settings(control, "degraded")) as guard:
        guard.check()
        assert (guard.model("gpt-5"), guard.max_output_tokens) == ("gpt-5", None)
        models = {"claude-opus-4-6": "claude-haiku-4-5", "*": "gpt-5-mini"}
        control.command(order("degraded", "degrade", 1, degrade={"models": models, "max_output_tokens": 512}))
        wait_until(lambda: guard.max_output_tokens == 512)
        assert guard.model("claude-opus-4-6") == "claude-haiku-4-5"
        assert guard.model("gpt-5") == "gpt-5-mini"
        guard.check()
        control.command(order("degraded", "warn", 2))
        control.command(order("degraded", "resume", 3))
        wait_until(lambda: guard.max_output_tokens is None)
        assert guard.model("gpt-5") == "gpt-5"


def test_a_supervisor_waits_for_the_halt(control: Control) -> None:
    with Guard.from_env(**settings(control, "supervised")) as guard:
        guard.check()
        assert guard.wait_halted(0.05) is None
        seen: list[Halted | None] = []
        waiter = threading.Thread(target=lambda: seen.append(guard.wait_halted(DEADLINE_S)))
        waiter.start()
        control.command(order("supervised", "halt", 1))
        waiter.join(DEADLINE_S)
        assert isinstance(seen[0], Halted)
        assert [ack.state for ack in control.acks(guard, 1)] == ["received"]
        guard.enforced()
        assert [ack.state for ack in control.acks(guard, 2)] == ["received", "enforced"]


async def test_async_code_is_halted_without_its_loop_being_blocked(control: Control) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    ticking = asyncio.create_task(tick())
    nowhere = Control(f"127.0.0.1:{free_port()}")
    async with Guard.from_env(**settings(nowhere, "async", sync_timeout_s=0.2, fail_mode="closed")) as guard:
        with pytest.raises(Halted, match="may not start"):
            await guard.acheck()
        assert ticks > 10
    ticking.cancel()


def test_heartbeats_make_a_guard_live_then_stale_then_blind_and_closed_halts_it(control: Control) -> None:
    times = {"stale_after_s": 0.4, "blind_after_s": 0.8}
    with Guard.from_env(**settings(control, "hearts", fail_mode="closed", **times)) as guard:
        control.beat(ready=False)  # a worker that does not work yet is no comfort
        wait_until(lambda: guard.state is not GuardState.SYNCING)
        control.beat()
        wait_until(lambda: guard.state is GuardState.LIVE)
        guard.check()
        seen = []

        def blind() -> bool:
            state = guard.state
            if not seen or seen[-1] is not state:
                seen.append(state)
            return state is GuardState.BLIND

        wait_until(blind)
        assert seen[-2:] == [GuardState.STALE, GuardState.BLIND]
        with pytest.raises(Halted, match="no sign of life") as caught:
            guard.check()
        assert caught.value.command is None
        control.beat()
        wait_until(lambda: not halted(guard))
        guard.check()


def test_a_guard_without_a_broker_waits_its_time_once_and_then_fails_open_or_closed() -> None:
    nowhere = Control(f"127.0.0.1:{free_port()}")
    with Guard.from_env(**settings(nowhere, "alone", sync_timeout_s=0.3)) as guard:
        before = time.monotonic()
        guard.check()
        assert 0.25 < time.monotonic() - before < 5
        before = time.monotonic()
        for _ in range(100):
            guard.check()
        assert time.monotonic() - before < 0.25
        assert guard.state is GuardState.SYNCING
    with (
        Guard.from_env(**settings(nowhere, "alone", sync_timeout_s=0.0, fail_mode="closed")) as guard,
        pytest.raises(Halted, match="could not be read"),
    ):
        guard.check()


def test_a_guard_that_starts_before_the_topics_and_outlives_the_broker_still_obeys(tmp_path: Path) -> None:
    port = free_port()
    control = Control(f"127.0.0.1:{port}")
    with Guard.from_env(**settings(control, "patient", sync_timeout_s=0.1)) as guard:
        for nth in (1, 2):  # the second broker knows nothing of the first: commands come again from offset 0
            broker = EmbeddedBroker(tmp_path / str(nth))
            broker._start_at(port, broker_binary(tmp_path / str(nth)))
            with contextlib.ExitStack() as stack:
                stack.callback(broker.stop)
                control.create_topics()
                control.command(order("patient", "halt", 2 * nth))
                wait_until(lambda: halted(guard))
                control.command(order("patient", "resume", 2 * nth + 1))
                wait_until(lambda: not halted(guard))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_forked_child_follows_by_itself(control: Control) -> None:
    given = settings(control, "forked")
    control.command(order("forked", "halt", 1, cap="early"))
    code = (
        "import os, sys\n"
        "from spendfuse.client import Guard, Halted\n"
        "def halted():\n"
        "    try: guard.check()\n"
        "    except Halted: return True\n"
        "    return False\n"
        "guard = Guard.from_env()\n"
        "if not halted(): sys.exit(2)\n"
        "if (pid := os.fork()) == 0: sys.exit(0 if halted() else 3)\n"
        "_, status = os.waitpid(pid, 0)\n"
        "sys.exit(os.waitstatus_to_exitcode(status) or (0 if halted() else 4))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(STREAMS)} | {f"SPENDFUSE_{k.upper()}": str(v) for k, v in given.items()}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


# -- calls, the mirror and the supervisor, as processes and over a broker -------------------------------------------


def environment(control: Control, agent: str, **more: object) -> dict[str, str]:
    given = settings(control, agent, **more)
    return {**os.environ, "PYTHONPATH": str(STREAMS)} | {f"SPENDFUSE_{k.upper()}": str(v) for k, v in given.items()}


def test_a_call_is_checked_against_what_a_worker_said_remains(control: Control) -> None:
    def say(committed: int) -> None:
        said = Remaining(
            scope=f"team:{WORKSPACE}/room", budget="b", cap="c", unit="tokens", amount=1_000, spend=committed,
            committed=committed, at=datetime.now(UTC), as_of_ms=0,
        )  # fmt: skip
        key, value = said.key.encode(), encode(said)
        control.send(REMAINING.name, key, value, [(SIGNATURE_HEADER, SIGNER.sign(REMAINING.name, key, value))])

    say(900)
    with Guard.from_env(**settings(control, "room")) as guard:
        bound, what = Tokens(output=100), {"provider": "openai", "model": "gpt-5"}
        with pytest.raises(NoRoom, match=f"team:{WORKSPACE}/room has 100 tokens left of its cap of 1,000 tokens"):
            guard.call(bound, **what).__enter__()
        say(500)
        wait_until(lambda: [left.left for left in guard.remaining()] == [500])
        with guard.call(bound, **what) as call:
            call.settle(Tokens(output=7))
        assert guard.meter.flush(DEADLINE_S)
        assert (guard.meter.stats.sent, guard.calls_in_flight) == (2, 0)


def test_a_supervised_program_is_ended_with_its_group_and_the_halt_is_acknowledged(
    control: Control, tmp_path: Path
) -> None:
    program = f"import pathlib, time; pathlib.Path({str(tmp_path / 'up')!r}).touch(); time.sleep(60)"
    words = [sys.executable, "-m", "spendfuse", "guard", "exec", "--grace", "2", "--", sys.executable, "-c", program]
    child = subprocess.Popen(
        words, env=environment(control, "executed"), cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until((tmp_path / "up").exists)
        halted_at = time.monotonic()
        control.command(order("executed", "halt", 1, message="Daily cap of USD 50 reached."))
        _, said = child.communicate(timeout=DEADLINE_S)
    finally:
        child.kill()
    assert child.returncode == 75
    assert "Daily cap of USD 50 reached" in said
    assert time.monotonic() - halted_at < 10
    states = []
    for record in read_all(control, ACKS.name):
        ack = Ack.model_validate_json(record)
        if ack.scope.endswith("/executed/executed"):
            states.append(ack.state)
    assert states == ["received", "enforced"]
    again = subprocess.run(
        words, env=environment(control, "executed"), cwd=tmp_path, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    assert again.returncode == 75
    assert "it was not started" in again.stderr


def test_the_mirror_says_what_is_halted_to_programs_that_cannot_speak_kafka(control: Control, tmp_path: Path) -> None:
    file = tmp_path / "mirror.json"
    env = environment(control, "mirrored", mirror_file=file)
    command = [sys.executable, "-m", "spendfuse", "guard"]
    scope = f"agent:{WORKSPACE}/mirrored/mirrored"

    def ask() -> int:
        return subprocess.run([*command, "check", scope, "-q"], env=env, check=False, timeout=60).returncode

    assert ask() == 69
    child = subprocess.Popen([*command, "mirror"], env=env, cwd=tmp_path)
    try:
        wait_until(file.exists)
        assert file.stat().st_mode & 0o777 == 0o600
        assert ask() == 0
        control.command(order("mirrored", "halt", 1), signer=FORGER)
        control.command(order("mirrored", "halt", 2, scope=f"team:{WORKSPACE}/mirrored"))
        wait_until(lambda: "mirrored" in file.read_text())
        assert ask() == 1
        control.command(order("mirrored", "resume", 3, scope=f"team:{WORKSPACE}/mirrored"))
        wait_until(lambda: "mirrored" not in file.read_text())
        assert ask() == 0
        child.terminate()
        assert child.wait(DEADLINE_S) == 0
    finally:
        child.kill()


def read_all(control: Control, topic: str) -> list[bytes]:
    async def read() -> list[bytes]:
        consumer = AIOKafkaConsumer(bootstrap_servers=control.bootstrap, fetch_max_wait_ms=20)
        await consumer.start()
        try:
            place = TopicPartition(topic, 0)
            consumer.assign([place])
            await consumer.seek_to_beginning(place)
            end = (await consumer.end_offsets([place]))[place]
            found: list[bytes] = []
            give_up_at = time.monotonic() + DEADLINE_S
            while await consumer.position(place) < end and time.monotonic() < give_up_at:
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    found += [record.value for record in records]
            return found
        finally:
            await consumer.stop()

    return asyncio.run(read())
