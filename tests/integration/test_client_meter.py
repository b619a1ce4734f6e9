"""The Meter against a broker: all of it, once, in order; and without a broker: never in the agent's way."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from shared_topics import make_topics, usage_records
from spendfuse.client import Meter
from spendfuse.embedded.processes import free_port
from spendfuse.embedded.tansu import EmbeddedBroker, broker_binary
from spendfuse.wire import decode_usages
from spendfuse.wire.topics import USAGE

DEADLINE_S = 30.0
STREAMS = Path(__file__).parents[2] / "streams"


@pytest.fixture(
    scope="module",
    params=[pytest.param("tansu", marks=pytest.mark.broker), pytest.param("kraft", marks=pytest.mark.kafka)],
)
def usage_topic(request: pytest.FixtureRequest) -> str:
    bootstrap: str = request.getfixturevalue(request.param).bootstrap_servers
    make_topics(bootstrap, USAGE)
    return bootstrap


def overrides(bootstrap: str, agent: str, **more: object) -> dict[str, Any]:
    """Return a meter's settings for an agent of this module's own workspace, on the embedded broker."""
    return {
        "workspace": "test-client-meter",
        "team": "t",
        "agent": agent,
        "bootstrap_servers": bootstrap,
        "producer_max_batch_size": 1,
        **more,
    }


def messages_of(bootstrap: str, agent: str, usages: int) -> list[Any]:
    return usage_records(bootstrap, f"test-client-meter/t/{agent}", usages)


def test_five_thousand_usages_arrive_once_each_in_order_and_packed(usage_topic: str) -> None:
    with Meter.from_env(**overrides(usage_topic, "five-thousand")) as meter:
        for nth in range(5_000):
            meter.record(provider="openai", model="gpt-5", input=nth, output=1, id=f"call-{nth}")
        assert meter.flush(DEADLINE_S)
        assert meter.stats == (5_000, 5_000, 0, 0, 0)
    records = messages_of(usage_topic, "five-thousand", 5_000)
    usages = [usage for record in records for usage in decode_usages(record.value)]
    assert [usage.id for usage in usages] == [f"call-{nth}" for nth in range(5_000)]
    assert [usage.tokens.input for usage in usages] == list(range(5_000))
    assert len(records) <= 100  # packs of up to 500
    assert len({record.partition for record in records}) == 1


def test_a_single_usage_is_sent_plain_with_cloudevents_headers(usage_topic: str) -> None:
    with Meter.from_env(**overrides(usage_topic, "single", run="run-1", root_run="run-0")) as meter:
        sent = meter.record(provider="anthropic", model="claude-sonnet-4-6", input=7, output=3, tags={"ticket": "T-1"})
    (record,) = messages_of(usage_topic, "single", 1)
    assert b'"usages"' not in record.value
    assert decode_usages(record.value) == [sent]
    assert (sent.run, sent.root_run) == ("run-1", "run-0")
    headers = dict(record.headers)
    assert headers["ce_type"] == b"dev.spendfuse.usage.v1"
    assert headers["ce_id"] == sent.id.encode()
    assert headers["ce_specversion"] == b"1.0"


def test_a_meter_used_by_async_code_sends_all_at_the_end_of_its_block(usage_topic: str) -> None:
    async def emit() -> Meter:
        async with Meter.from_env(**overrides(usage_topic, "async")) as meter:
            for nth in range(10):
                meter.record(provider="openai", model="gpt-5", input=1, id=f"async-{nth}")
        return meter

    assert asyncio.run(emit()).stats.sent == 10


def test_without_a_broker_emitting_takes_no_time_and_the_oldest_are_dropped_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    nowhere = f"127.0.0.1:{free_port()}"
    meter = Meter.from_env(**overrides(nowhere, "nobody", meter_buffer_max=1_000))
    slowest_s = 0.0
    for nth in range(5_000):
        before = time.perf_counter()
        meter.record(provider="openai", model="gpt-5", input=nth)
        slowest_s = max(slowest_s, time.perf_counter() - before)
    assert slowest_s < 1.0  # a connection attempt would take longer than any pause of a busy machine
    stats = meter.stats
    assert stats.emitted == 5_000
    assert stats.sent == 0
    # At most one round is in flight beside the buffer.
    assert 1_000 <= stats.buffered <= 3_000
    assert stats.dropped == 5_000 - stats.buffered
    before = time.perf_counter()
    assert not meter.flush(0.2)
    with caplog.at_level(logging.WARNING, "spendfuse"):
        assert not meter.close(0.2)
    assert time.perf_counter() - before < 10
    assert meter.stats.dropped == 5_000
    assert "dropped 5000 usages" in caplog.text


def test_what_was_emitted_while_the_broker_was_away_arrives_when_it_is_back(tmp_path: Path) -> None:
    port = free_port()
    meter = Meter.from_env(**overrides(f"127.0.0.1:{port}", "later", meter_buffer_max=100))
    for nth in range(50):
        meter.record(provider="openai", model="gpt-5", input=1, id=f"later-{nth}")
    wait_until(lambda: meter.stats.send_errors >= 1)
    for nth in range(50, 150):
        meter.record(provider="openai", model="gpt-5", input=1, id=f"later-{nth}")
    wait_until(lambda: meter.stats.send_errors >= 2)
    broker = EmbeddedBroker(tmp_path)
    broker._start_at(port, broker_binary(tmp_path))
    with contextlib.ExitStack() as stack:
        stack.callback(broker.stop)
        make_topics(broker.bootstrap_servers, USAGE)
        assert meter.flush(DEADLINE_S)
        meter.close()
        records = messages_of(broker.bootstrap_servers, "later", 100)
    ids = [usage.id for record in records for usage in decode_usages(record.value)]
    # The oldest fifty were pushed out of the buffer of a hundred; the others came in order.
    assert ids == [f"later-{nth}" for nth in range(50, 150)]
    assert meter.stats[:4] == (150, 100, 50, 0)


def wait_until(true: Any) -> None:
    """Return when `true()`; fail at the deadline."""
    give_up_at = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < give_up_at, "waited in vain"
        time.sleep(0.01)


def run_python(code: str, bootstrap: str, agent: str) -> subprocess.CompletedProcess[str]:
    """Run a program that emits, with its settings in the environment."""
    env = {**os.environ, "PYTHONPATH": str(STREAMS)} | {
        f"SPENDFUSE_{name.upper()}": str(value) for name, value in overrides(bootstrap, agent).items()
    }
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_program_that_just_ends_has_sent_what_it_emitted(usage_topic: str) -> None:
    # By name, not by number: resolving it needs an executor, and those end before atexit.
    by_name = usage_topic.replace("127.0.0.1", "localhost")
    done = run_python(
        "from spendfuse.client import Meter\n"
        "meter = Meter.from_env()\n"
        "for nth in range(300): meter.record(provider='openai', model='gpt-5', input=1, id=f'exit-{nth}')\n",
        *(by_name, "at-exit"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    records = messages_of(usage_topic, "at-exit", 300)
    assert [u.id for record in records for u in decode_usages(record.value)] == [f"exit-{nth}" for nth in range(300)]


def test_a_program_that_ends_without_a_broker_says_what_it_lost_within_its_time(usage_topic: str) -> None:
    before = time.monotonic()
    done = run_python(
        "from spendfuse.client import Meter\n"
        "meter = Meter.from_env(meter_flush_timeout_s=0.5)\n"
        "meter.record(provider='openai', model='gpt-5', input=1)\n",
        *(f"127.0.0.1:{free_port()}", "lost"),
    )
    assert done.returncode == 0
    assert "dropped 1 usages" in done.stderr
    assert time.monotonic() - before < 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_parent_and_forked_child_each_send_their_own_usages_once(usage_topic: str) -> None:
    done = run_python(
        "import os, sys\n"
        "from spendfuse.client import Meter\n"
        "meter = Meter.from_env()\n"
        "meter.record(provider='openai', model='gpt-5', input=1, id='parent-0')\n"
        "meter.flush()\n"
        "meter.record(provider='openai', model='gpt-5', input=1, id='parent-1')\n"
        "if (pid := os.fork()) == 0:\n"
        "    meter.record(provider='openai', model='gpt-5', input=1, id='child-0')\n"
        "    sys.exit(0 if meter.flush(20) and meter.stats.emitted == 1 else 3)\n"
        "_, status = os.waitpid(pid, 0)\n"
        "meter.record(provider='openai', model='gpt-5', input=1, id='parent-2')\n"
        "sys.exit(os.waitstatus_to_exitcode(status) or (0 if meter.flush(20) else 4))\n",
        *(usage_topic, "forked"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    ids = [u.id for record in messages_of(usage_topic, "forked", 4) for u in decode_usages(record.value)]
    assert sorted(ids) == ["child-0", "parent-0", "parent-1", "parent-2"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_multiprocessing_child_that_just_ends_has_sent_what_it_emitted(usage_topic: str) -> None:
    # Such a child ends by os._exit: atexit never runs in it.
    done = run_python(
        "import multiprocessing\n"
        "from spendfuse.client import Meter\n"
        "meter = Meter.from_env()\n"
        "def work(): meter.record(provider='openai', model='gpt-5', input=1, id='from-pool')\n"
        "child = multiprocessing.get_context('fork').Process(target=work)\n"
        "child.start(); child.join(); raise SystemExit(child.exitcode)\n",
        *(usage_topic, "multiprocessing"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    ids = [u.id for record in messages_of(usage_topic, "multiprocessing", 1) for u in decode_usages(record.value)]
    assert ids == ["from-pool"]
