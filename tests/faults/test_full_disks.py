"""Full disks: of the broker, of what a worker and the programs around it write. Each is said, and gone on from."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from faults.refusing import Pressed, RefusingKafka, beats, fill, live, small_disk
from kraft import KraftUnavailableError, kraft_missing
from pipeline import scenario
from spendfuse.audit.checkpoints import Head, NoteSigner, append_note, make_checkpoint, read_notes
from spendfuse.cli import guard_check
from spendfuse.client import Guard, GuardState
from spendfuse.client.follow import Record
from spendfuse.client.keys import generate, parse_public_keys
from spendfuse.client.memory import Memory
from spendfuse.client.mirror import Mirror
from spendfuse.settings import BrokerSettings, GuardSettings
from spendfuse.wire import Command
from spendfuse.wire.base import encode, from_us
from spendfuse.wire.topics import COMMANDS, HEARTBEATS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CALLS = 60
END_S = 150.0
MANY = 100
"""Halts whose file does not fit into what is left of a page."""


@pytest.mark.kafka
@pytest.mark.timeout(300)
async def test_a_broker_with_a_full_disk_silences_the_worker_and_everything_goes_on_with_room(tmp_path: Path) -> None:
    reason = kraft_missing()
    if reason is not None:
        pytest.skip(reason)
    try:
        kafka = await asyncio.to_thread(RefusingKafka(on_small_disk=True).start)
    except KraftUnavailableError as error:
        pytest.skip(str(error))
    with kafka:
        pressed = await asyncio.to_thread(Pressed, kafka, tmp_path)
        settings = GuardSettings.from_env({}, public_keys=scenario.PUBLIC, stale_after_s=3.0, blind_after_s=8.0)
        try:
            await asyncio.to_thread(pressed.run)
            async with scenario.watching(pressed.deployed) as watch:
                guard = Guard(scenario.identity("chaos", "agent-1"), pressed.broker, settings)
                try:
                    await pressed.emit(watch, CALLS)
                    await pressed.exact(watch)
                    await watch.until(lambda: guard.state is GuardState.LIVE, "a guard that is live")
                    filler = await asyncio.to_thread(fill, kafka.data)
                    emitting = asyncio.create_task(pressed.emit(watch, CALLS))
                    await watch.until(lambda: guard.state is GuardState.BLIND, "a guard that trusts nobody", END_S)
                    said = len(watch.records[HEARTBEATS.name])
                    filler.unlink()
                    await asyncio.to_thread(kafka.restart)
                    await emitting
                    await asyncio.to_thread(pressed.run)  # if it has ended meanwhile, as its supervisor would
                    await pressed.exact(watch)
                    assert any(live(beat) for beat in beats(watch, said))
                    await watch.until(lambda: guard.state is GuardState.LIVE, "a guard that is live again")
                finally:
                    await asyncio.to_thread(guard.close)
        finally:
            pressed.worker.stop()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a megabyte."""
    try:
        with small_disk(tmp_path / "disk", 1) as mounted:
            yield mounted
    except OSError as error:
        pytest.skip(str(error))


def halt(agent: str, seq: int = 1) -> Record:
    command = Command(
        id=f"{seq:032x}", seq=seq, action="halt", scope=f"agent:acme/research/{agent}", budget="b1", cap="day",
        issued_at=from_us(time.time_ns() // 1_000), message=f"{agent} reached its cap",
    )  # fmt: skip
    return Record(COMMANDS.name, 0, seq, 0, command.key.encode(), encode(command), ())


def test_a_guard_keeps_its_halts_when_the_disk_has_room_again(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    memory = Memory(str(disk), "broker", ["agent"])
    memory.keep([halt("one")])
    filler = fill(disk)
    memory.keep([halt(f"agent-{number}") for number in range(MANY)])
    memory.keep_again()
    assert caplog.text.count("cannot keep its halts") == 1, "said once, not at each attempt"
    assert len(Memory(str(disk), "broker", ["agent"]).read()) == 1, "what was kept before is whole"
    filler.unlink()
    memory.keep_again()
    assert "keeps its halts over a restart again" in caplog.text
    assert len(Memory(str(disk), "broker", ["agent"]).read()) == MANY
    assert [path.name for path in disk.iterdir()] == [memory.path.name], "no half of a file is left"


def test_a_mirror_on_a_full_disk_ages_until_readers_refuse_and_is_written_again_with_room(
    disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = disk / "mirror.json"
    settings = GuardSettings.from_env({}, unsigned_commands=True, fail_mode="closed", blind_after_s=0.3)
    mirror = Mirror(path, BrokerSettings.from_env({}), settings, None)
    ask = ["agent:acme/research/one", "--mirror", str(path), "-q"]
    mirror._write()
    assert guard_check.main(ask) == 0
    filler = fill(disk)
    mirror._on_command(halt("one"))
    give_up_at = time.monotonic() + 10
    while guard_check.main(ask) == 0:
        mirror._write_or_say()
        assert time.monotonic() < give_up_at, "a file that says nothing of the halt is trusted"
    assert guard_check.main(ask) == 69
    assert caplog.text.count("cannot write") == 1, "said once, not at each attempt"
    filler.unlink()
    mirror._write_or_say()
    assert guard_check.main(ask) == 1, "halted"
    assert "again" in caplog.text
    assert len(json.loads(path.read_bytes())["halts"]) == 1


def test_a_checkpoint_that_a_full_disk_cuts_short_does_not_spoil_the_file(disk: Path) -> None:
    private, public = generate("audit")
    signer, path = NoteSigner.parse(private), disk / "checkpoints.txt"
    heads = [Head(partition, 7, "ab" * 32) for partition in range(300)]
    append_note(path, signer.sign(make_checkpoint("spendfuse/test", datetime.now(UTC), heads[:1])))
    filler = fill(disk)
    note = signer.sign(make_checkpoint("spendfuse/test", datetime.now(UTC), heads))
    with pytest.raises(OSError, match=r"No space left on device.*checkpoints\.txt"):
        append_note(path, note)
    keys = parse_public_keys(public)
    known = {kid: key.raw for kid, key in keys.items()}
    assert [len(each.heads) for each in read_notes(path, known)] == [1]
    filler.unlink()
    append_note(path, note)
    assert [len(each.heads) for each in read_notes(path, known)] == [1, 300]


def test_a_worker_without_room_for_its_directory_says_so_and_ends(tmp_path: Path) -> None:
    try:
        with small_disk(tmp_path / "disk", 1, inodes=2) as mounted:
            (mounted / "last").touch()
            env = {"SPENDFUSE_DATA_DIR": str(mounted / "data"), "SPENDFUSE_UNSIGNED_COMMANDS": "true"}
            argv = [sys.executable, "-m", "spendfuse.pipeline.worker"]
            ended = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        pytest.skip(str(error))
    assert ended.returncode == 73
    said = json.loads(ended.stderr.splitlines()[-1])
    assert said["event"] == "no data directory"
    assert "No space left on device" in said["reason"]
    assert said["path"] == env["SPENDFUSE_DATA_DIR"]
    assert "SPENDFUSE_DATA_DIR" in said["advice"]
