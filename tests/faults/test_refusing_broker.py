"""A broker that refuses what the worker writes: lag is told, nothing is called live, every sum is exact after it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from faults.refusing import Pressed, RefusingKafka, beats, fill, lag_alerts, live, small_disk
from kraft import kraft_missing
from pipeline import scenario
from spendfuse.client import Guard, GuardState, Meter
from spendfuse.settings import GuardSettings, MeterSettings
from spendfuse.wire.base import to_us
from spendfuse.wire.topics import HEARTBEATS, LEDGER, PACKED, USAGE
from workers import WorkerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.kafka

CALLS = 60
THROTTLED_CALLS = 600
QUOTA_BYTES = 20_000
"""A second's, of what a worker writes: some 1,200 bytes for each call."""
SMALL_BYTES = 2_000
END_S = 60.0
OLD_S = 5.0


@pytest.fixture(scope="module")
def pressed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pressed]:
    reason = kraft_missing()
    if reason is not None:
        pytest.skip(reason)
    with RefusingKafka(2) as kafka:
        made = Pressed(kafka, tmp_path_factory.mktemp("refusing"), replication=2)
        try:
            made.run()  # makes the changelogs, while there are two replicas
            kafka.kill(2)
            yield made
        finally:
            made.worker.stop()


@pytest.mark.parametrize(
    "topic",
    [PACKED.name, "spendfuse-scopes-changelog", "spendfuse-shared-changelog"],
    ids=["intake", "meter", "rollup"],
)
async def test_too_few_replicas_of_a_topic_are_waited_for_and_told(pressed: Pressed, topic: str) -> None:
    await asyncio.to_thread(pressed.run)
    async with scenario.watching(pressed.deployed) as watch:
        await pressed.emit(watch, CALLS)
        await pressed.exact(watch)
        told, pid = len(lag_alerts(watch)), pressed.worker.pid
        await asyncio.to_thread(pressed.kafka.refuse, "config", topic, "min.insync.replicas=2")
        await pressed.emit(watch, CALLS)
        await watch.until(lambda: beats(watch)[-1].stale, "a heartbeat that says stale")
        await watch.until(lambda: len(lag_alerts(watch)) > told, "the alert")
        assert lag_alerts(watch)[-1]["severity"] == "critical"
        said = len(watch.records[HEARTBEATS.name])
        await watch.until(lambda: len(beats(watch, said)) > 4, "further heartbeats")
        assert not any(live(beat) for beat in beats(watch, said)), "live, although nothing goes on"
        await asyncio.to_thread(pressed.kafka.refuse, "config", topic, "min.insync.replicas=")
        await pressed.exact(watch)
        await watch.until(lambda: lag_alerts(watch)[-1]["severity"] == "info", "the alert that it is over")
        assert pressed.worker.pid == pid, "it went on by itself"


@pytest.mark.parametrize(
    ("refuse", "lift", "reason", "advice"),
    [
        (
            ["config", PACKED.name, "max.message.bytes=200"],
            ["config", PACKED.name, "max.message.bytes=1048576"],
            "MESSAGE_SIZE_TOO_LARGE",
            "set the topic's max.message.bytes to at least 1048576",
        ),
        (
            ["deny", LEDGER.name],
            ["allow", LEDGER.name],
            "TOPIC_AUTHORIZATION_FAILED",
            "let the worker's principal write to it",
        ),
    ],
    ids=["too large", "forbidden"],
)
async def test_what_a_broker_will_never_take_ends_the_worker_with_words_and_it_goes_on_after_a_restart(
    pressed: Pressed, refuse: list[str], lift: list[str], reason: str, advice: str
) -> None:
    await asyncio.to_thread(pressed.run)
    async with scenario.watching(pressed.deployed) as watch:
        await pressed.emit(watch, CALLS)
        await pressed.exact(watch)
        told, logged = len(lag_alerts(watch)), len(pressed.worker.log)
        await asyncio.to_thread(pressed.kafka.refuse, *refuse)
        await pressed.emit(watch, CALLS)
        assert await asyncio.to_thread(pressed.worker.wait, END_S) == 69
        await watch.until(lambda: len(lag_alerts(watch)) > told, "the alert")
        words = f"the broker does not take records for {refuse[1]} ({reason}): {advice}, and start the worker again"
        assert words in pressed.worker.log[logged:]
        assert words in lag_alerts(watch)[-1]["message"]
        said = len(watch.records[HEARTBEATS.name])
        await asyncio.to_thread(pressed.worker.begin)  # in vain: as a supervisor of processes would
        assert await asyncio.to_thread(pressed.worker.wait, END_S) == 69
        assert not any(live(beat) for beat in beats(watch, said)), "live, although it decides nothing"
        await asyncio.to_thread(pressed.kafka.refuse, *lift)
        await asyncio.to_thread(pressed.run)
        await pressed.exact(watch)


async def test_a_worker_whose_heartbeats_alone_are_refused_is_silent_to_guards_and_goes_on(pressed: Pressed) -> None:
    await asyncio.to_thread(pressed.run)
    settings = GuardSettings.from_env({}, public_keys=scenario.PUBLIC, stale_after_s=2.0, blind_after_s=60.0)
    async with scenario.watching(pressed.deployed) as watch:
        guard = Guard(scenario.identity("chaos", "agent-1"), pressed.broker, settings)
        try:
            await watch.until(lambda: guard.state is GuardState.LIVE, "a guard that is live")
            await asyncio.to_thread(pressed.kafka.refuse, "config", HEARTBEATS.name, "min.insync.replicas=2")
            await watch.until(lambda: guard.state is GuardState.STALE, "a guard that hears nothing")
            said = len(watch.records[HEARTBEATS.name])
            await pressed.emit(watch, CALLS)
            charged = pressed.sent
            await watch.until(lambda: len(watch.charges("chaos")) >= charged, "charges without a heartbeat")
            assert len(watch.records[HEARTBEATS.name]) == said
            assert guard.state is GuardState.STALE
            await asyncio.to_thread(pressed.kafka.refuse, "config", HEARTBEATS.name, "min.insync.replicas=")
            await watch.until(lambda: guard.state is GuardState.LIVE, "a guard that is live again")
            first = watch.records[HEARTBEATS.name][said]
            age_s = watch.arrived[(first.topic, first.partition, first.offset)] - to_us(beats(watch, said)[0].ts) / 1e6
            assert age_s < OLD_S, "it waited, and says of the past that it is live"
        finally:
            await asyncio.to_thread(guard.close)
        await pressed.exact(watch)


async def test_a_throttled_worker_is_behind_and_says_so_until_it_has_caught_up(pressed: Pressed) -> None:
    await asyncio.to_thread(pressed.run)
    async with scenario.watching(pressed.deployed) as watch:
        await pressed.exact(watch)
        told = len(lag_alerts(watch))
        await asyncio.to_thread(pressed.kafka.refuse, "quota", "spendfuse-worker", str(QUOTA_BYTES))
        await pressed.emit(watch, THROTTLED_CALLS)
        await watch.until(lambda: beats(watch)[-1].stale, "a heartbeat that says stale")
        await watch.until(lambda: len(lag_alerts(watch)) > told, "the alert")
        await asyncio.to_thread(pressed.kafka.refuse, "quota", "spendfuse-worker", "0")
        await pressed.exact(watch)


async def test_a_worker_whose_own_disk_is_full_goes_on(pressed: Pressed, tmp_path: Path) -> None:
    await asyncio.to_thread(pressed.worker.stop)
    try:
        with small_disk(tmp_path / "disk", 1) as disk:
            other = WorkerProcess(disk, "other", pressed.broker, pressed.env)
            async with scenario.watching(pressed.deployed) as watch:
                with other:
                    filler = fill(disk)
                    await pressed.emit(watch, CALLS)
                    await pressed.exact(watch)
                filler.unlink()
                with other:
                    await pressed.emit(watch, CALLS)
                    await pressed.exact(watch)
    except OSError as error:
        pytest.skip(str(error))


async def test_an_emitter_keeps_what_a_broker_refuses_and_sends_smaller_what_is_too_large(pressed: Pressed) -> None:
    await asyncio.to_thread(pressed.run)
    who = scenario.identity("chaos", "emitter")
    async with scenario.watching(pressed.deployed) as watch:
        await pressed.emit(watch, CALLS)
        await pressed.exact(watch)
        meter = Meter(who, pressed.broker, MeterSettings.from_env({}))
        try:
            await asyncio.to_thread(pressed.kafka.refuse, "config", USAGE.name, "min.insync.replicas=2")
            for _ in range(CALLS):
                meter.record(provider="anthropic", model="claude", input=5, output=1)
            await watch.until(lambda: meter.stats.send_errors > 0, "a refusal")
            assert (meter.stats.sent, meter.stats.dropped, meter.stats.buffered) == (0, 0, CALLS)
            await asyncio.to_thread(pressed.kafka.refuse, "config", USAGE.name, f"max.message.bytes={SMALL_BYTES}")
            await asyncio.to_thread(pressed.kafka.refuse, "config", USAGE.name, "min.insync.replicas=")
            assert await asyncio.to_thread(meter.flush, END_S)
            assert (meter.stats.sent, meter.stats.dropped) == (CALLS, 0)
        finally:
            await asyncio.to_thread(meter.close)
            await asyncio.to_thread(pressed.kafka.refuse, "config", USAGE.name, "max.message.bytes=1048576")
        pressed.sent += CALLS
        await pressed.exact(watch)
        sizes = [
            len(record.value or b"") for record in watch.records[USAGE.name] if record.key == b"chaos/team-0/emitter"
        ]
        assert len(sizes) > 1
        assert max(sizes) < SMALL_BYTES


async def test_a_worker_started_while_a_broker_refuses_is_not_live_for_a_moment(pressed: Pressed) -> None:
    await asyncio.to_thread(pressed.run)
    async with scenario.watching(pressed.deployed) as watch:
        await pressed.emit(watch, CALLS)
        await pressed.exact(watch)
        await asyncio.to_thread(pressed.kafka.refuse, "config", PACKED.name, "min.insync.replicas=2")
        await pressed.emit(watch, CALLS)
        await watch.until(lambda: beats(watch)[-1].stale, "a heartbeat that says stale")
        await asyncio.to_thread(pressed.worker.kill)
        await asyncio.to_thread(pressed.run)
        of_new = f"/{pressed.worker.pid}"
        await watch.until(
            lambda: any(beat.stale for beat in beats(watch) if beat.emitter.endswith(of_new)),
            "its own lag beyond bound",
        )
        assert not any(live(beat) for beat in beats(watch) if beat.emitter.endswith(of_new)), "live at its start"
        await asyncio.to_thread(pressed.kafka.refuse, "config", PACKED.name, "min.insync.replicas=")
        await pressed.exact(watch)
