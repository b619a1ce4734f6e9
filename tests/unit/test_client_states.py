"""What a guard does that hears nothing: it counts for itself, has a grace, and remembers over a restart."""

from __future__ import annotations

import json
import stat
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spendfuse.client import Guard, GuardState, Halted, Meter, Tokens
from spendfuse.client.clock import ScaledClock, TrustedTime, wall_clock
from spendfuse.client.follow import Record
from spendfuse.client.keys import Signer, generate
from spendfuse.client.lease import Amount, Lease
from spendfuse.settings import BrokerSettings, GuardSettings, IdentitySettings
from spendfuse.wire.base import EPOCH, encode, from_us
from spendfuse.wire.control import Command, Heartbeat
from spendfuse.wire.remaining import Remaining
from spendfuse.wire.signing import SIGNATURE_HEADER
from spendfuse.wire.topics import COMMANDS, HEARTBEATS, REMAINING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PRIVATE, PUBLIC = generate("test")
SIGNER = Signer.parse(PRIVATE)
FORGER = Signer.parse(generate("test")[0])
NAMES = IdentitySettings(workspace="acme", team="research", agent="planner")
AGENT, TEAM = "agent:acme/research/planner", "team:acme/research"
NOWHERE = BrokerSettings(bootstrap_servers="127.0.0.1:1")
HOUR_US = 3_600_000_000


class Time:
    """The monotonic clock of the guards of a test."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    found = Time()
    for module in ("guard", "silence"):
        monkeypatch.setattr(f"spendfuse.client.{module}.monotonic", found)
    return found


@pytest.fixture
def guard(time: Time) -> Iterator[Callable[..., Guard]]:
    made: list[Guard] = []

    def make(**more: Any) -> Guard:
        settings = {"public_keys": PUBLIC, "sync_timeout_s": 0, "guard_dir": "off"} | more
        made.append(Guard(NAMES, NOWHERE, GuardSettings.model_validate(settings)))
        return made[-1]

    yield make
    for each in made:
        each._acks.close(0)  # nobody is there to take them
        each.meter.close(0)
        each.close()


def record(topic: str, key: str, value: bytes, signer: Signer = SIGNER, *, offset: int = 0) -> Record:
    signature = signer.sign(topic, key.encode(), value)
    return Record(topic, 0, offset, 0, key.encode(), value, ((SIGNATURE_HEADER, signature),))


def order(action: str, seq: int, scope: str = AGENT, **more: Any) -> Record:
    values = {"id": f"{seq:032x}", "seq": seq, "action": action, "scope": scope, "budget": "b", "cap": "c"}
    command = Command.model_validate({**values, "issued_at": EPOCH, **more})
    return record(COMMANDS.name, command.key, encode(command))


def left(committed: int, amount: int = 1_000, *, scope: str = AGENT, signer: Signer = SIGNER) -> Record:
    said = Remaining(
        scope=scope, budget="b", cap="c", unit="tokens", amount=amount, spend=committed, committed=committed,
        at=from_us(wall_clock() - 1_000), as_of_ms=0,
    )  # fmt: skip
    return record(REMAINING.name, said.key, encode(said), signer)


def beat(guard: Guard) -> None:
    said = Heartbeat(emitter="w", ts=from_us(guard._clock()), ready=True, version="0")
    guard._on_heartbeat(record(HEARTBEATS.name, "w", encode(said)))


def live(guard: Guard) -> Guard:
    guard._on_commands_read()
    guard._on_heartbeats_read()
    beat(guard)
    assert guard.state is GuardState.LIVE
    return guard


def use(guard: Guard, tokens: int) -> None:
    """Emit a usage as a Meter of this process does."""
    with Meter(NAMES, NOWHERE) as meter:
        meter._outbox.close(0)
        said = Tokens(output=tokens)
        guard.on_usage(meter.usage(provider="openai", model="gpt-5", tokens=said, id=f"c{guard._tokens}"))


def test_silence_makes_it_stale_then_blind_and_after_the_grace_it_halts_until_a_sign_of_life(
    guard: Callable[..., Guard], time: Time
) -> None:
    one = live(guard(stale_after_s=15, blind_after_s=120, grace_s=300))
    for seconds, state in ((14, "live"), (16, "stale"), (121, "blind"), (299, "blind")):
        time.now = 1_000.0 + seconds
        assert one.state == state
        one.check()
    time.now = 1_000.0 + 121 + 300
    with pytest.raises(Halted, match=r"grace of 300 s and 50,000 tokens is used up \(300 s, 0 tokens\)"):
        one.check()
    beat(one)
    one.check()
    time.now += 130
    one.check()  # the grace is whole again: the worker has counted what was used


def test_a_forged_or_recorded_heartbeat_is_no_sign_of_life(guard: Callable[..., Guard], time: Time) -> None:
    one = live(guard(stale_after_s=15, blind_after_s=120))
    true = Heartbeat(emitter="w", ts=from_us(one._clock()), ready=True, version="0")
    one._on_heartbeat(record(HEARTBEATS.name, "w", encode(true)))
    later = true.model_copy(update={"ts": true.ts + timedelta(seconds=20)})
    ago = Heartbeat(emitter="gone", ts=true.ts - timedelta(days=2), ready=True, version="0")
    time.now += 20
    assert one.state is GuardState.STALE
    refused = [
        Record(HEARTBEATS.name, 0, 0, 0, b"w", encode(later)),
        record(HEARTBEATS.name, "w", encode(later), FORGER),
        record(COMMANDS.name, "w", encode(later))._replace(topic=HEARTBEATS.name),
        record(HEARTBEATS.name, "other", encode(later)),
        record(HEARTBEATS.name, "w", b"no heartbeat"),
    ]
    repeated = [record(HEARTBEATS.name, "w", encode(true)), record(HEARTBEATS.name, "gone", encode(ago))]
    for each in (*refused, *repeated, record(HEARTBEATS.name, "w", encode(later))._replace(value=None)):
        one._on_heartbeat(each)
        assert one.state is GuardState.STALE
    assert one.refused == {"heartbeat": len(refused)}
    one._on_heartbeat(record(HEARTBEATS.name, "w", encode(later)))
    assert one.state is GuardState.LIVE
    one._on_heartbeat(record(HEARTBEATS.name, "new", encode(later.model_copy(update={"emitter": "new"}))))
    assert one.state is GuardState.LIVE


def test_the_grace_is_of_tokens_as_well(guard: Callable[..., Guard], time: Time) -> None:
    one = live(guard(grace_tokens=1_000))
    use(one, 5_000)
    time.now += 130
    one.check()
    use(one, 1_000)
    one.check()
    use(one, 1)
    with pytest.raises(Halted, match="1,001 tokens"):
        one.check()


@pytest.mark.parametrize(("fail_mode", "halts"), [("bounded", False), ("open", False), ("closed", True)])
def test_a_guard_that_never_read_anything_goes_by_its_fail_mode(
    guard: Callable[..., Guard], fail_mode: str, halts: bool, time: Time
) -> None:
    one = guard(fail_mode=fail_mode)
    assert (one.wait_halted(0) is not None) == halts
    time.now += 301
    assert (one.wait_halted(0) is not None) == (fail_mode != "open")


def test_while_stale_its_own_calls_use_up_what_was_last_known_to_remain(
    guard: Callable[..., Guard], time: Time
) -> None:
    one = live(guard())
    one._follow_remaining()
    one._on_remaining(left(700))
    time.now += 20
    assert one.state is GuardState.STALE
    use(one, 299)
    one.check()
    use(one, 1)
    with pytest.raises(Halted, match="its own calls have since used up what was left of agent:acme/research/planner"):
        one.check()
    (known,) = one.remaining()
    assert (known.left, known.heard.left) == (0, 300)
    assert known.age_s > 0
    beat(one)
    one.check()  # alive again, a worker decides


def test_forged_misplaced_and_unsigned_remaining_is_refused_and_counted(guard: Callable[..., Guard]) -> None:
    one = live(guard())
    one._follow_remaining()
    good = left(10)
    one._on_remaining(left(10, signer=FORGER))
    one._on_remaining(good._replace(headers=()))
    one._on_remaining(good._replace(topic=COMMANDS.name))
    one._on_remaining(good._replace(value=None))
    one._on_remaining(left(10, scope="agent:acme/research/other"))
    assert one.remaining() == []
    assert one.refused == {"signature": 1, "unsigned": 1, "topic": 1, "tombstone": 1}


def test_a_halt_is_kept_over_a_restart_without_a_broker_and_a_resume_ends_it(
    guard: Callable[..., Guard], tmp_path: Path
) -> None:
    kept = {"guard_dir": str(tmp_path / "guard"), "fail_mode": "open"}
    first = live(guard(**kept))
    assert list(tmp_path.iterdir()) == [], "nothing is written before a halt"
    first._on_command(order("halt", 5, TEAM))
    (file,) = (tmp_path / "guard").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(Halted, match=TEAM):
        guard(**kept).check()
    first._on_command(order("resume", 6, TEAM))
    assert list((tmp_path / "guard").iterdir()) == []
    guard(**kept).check()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: b"",
        lambda _: b"\xff\x00",
        lambda _: b"[]",
        lambda _: b'{"records":[{"key":"!"}]}',
        lambda data: data.replace(json.loads(data)["records"][0]["value"].encode(), b"eyJ2IjoxfQ=="),
        lambda data: b" " * 5_000_000 + data,
    ],
)
def test_a_file_that_somebody_changed_halts_nobody_and_stops_nothing(
    guard: Callable[..., Guard], tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    kept = {"guard_dir": str(tmp_path), "fail_mode": "open"}
    live(guard(**kept))._on_command(order("halt", 5))
    (file,) = tmp_path.iterdir()
    file.write_bytes(spoil(file.read_bytes()))
    guard(**kept).check()


def test_a_place_that_cannot_be_written_costs_the_memory_and_nothing_else(
    guard: Callable[..., Guard], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a directory")
    one = live(guard(guard_dir=str(tmp_path / "file")))
    one._on_command(order("halt", 5))
    assert "cannot keep its halts" in caplog.text
    assert one.wait_halted(0) is not None


def test_what_could_not_be_kept_is_kept_with_the_next_heartbeat_when_there_is_room(
    guard: Callable[..., Guard], tmp_path: Path
) -> None:
    place, kept = tmp_path / "full", {"guard_dir": str(tmp_path / "full"), "fail_mode": "open"}
    place.write_text("not a directory")
    one = live(guard(**kept))
    one._on_command(order("halt", 5))
    place.unlink()
    beat(one)
    assert guard(**kept).wait_halted(0) is not None, "a guard started anew knows of it"


def test_a_clock_that_jumps_forward_ends_no_halt_and_one_set_back_prolongs_it() -> None:
    clock = [10 * HOUR_US]
    trusted = TrustedTime(lambda: clock[0])
    assert trusted.now_us() == 10 * HOUR_US
    clock[0] += HOUR_US
    assert trusted.now_us() < 10 * HOUR_US + 60_000_000
    clock[0] -= 2 * HOUR_US
    assert trusted.now_us() == 9 * HOUR_US
    clock[0] = 30 * HOUR_US
    trusted.hear(30 * HOUR_US - 1_000_000)
    assert trusted.now_us() == 30 * HOUR_US, "the workers' clocks agree"


def test_a_fast_clock_is_believed_at_its_own_pace() -> None:
    fast = ScaledClock(0, 0, 10_000)
    trusted = TrustedTime(fast)
    said = trusted.now_us()
    assert 0 <= fast() - said < 10_000 * 1_000_000


# -- the lease, against a list of what was emitted -----------------------------------------------------------------

EVENTS = st.lists(
    st.tuples(st.sampled_from(["start", "finish", "record"]), st.integers(0, 6), st.integers(0, 50)), max_size=40
)


@given(EVENTS, st.integers(0, 40))
def test_what_is_left_is_the_cap_less_what_the_record_knows_and_what_came_later(
    events: list[tuple[str, int, int]], known: int
) -> None:
    """The oracle replays the events into two sums: those the record knows of, and all of them."""
    lease = Lease([AGENT])
    calls: dict[str, tuple[int, int | None]] = {}

    def committed() -> int:
        return sum(bound if used is None else used for bound, used in calls.values())

    spent_known = held_known = 0
    for nth, (kind, number, tokens) in enumerate(events, start=1):
        name = f"c{number}" if kind != "record" else f"r{nth}"
        if kind == "start" and name not in calls:
            calls[name] = (tokens, None)
            lease.start(name, Amount(0, tokens), nth, HOUR_US)
        elif kind == "finish" and name in calls and calls[name][1] is None:
            calls[name] = (calls[name][0], tokens)
            lease.finish(name, Amount(0, tokens), nth)
        elif kind == "record":
            calls[name] = (tokens, tokens)
            lease.finish(name, Amount(0, tokens), nth)
        if nth <= known:
            spent_known = sum(used for _, used in calls.values() if used is not None)
            held_known = committed() - spent_known
    said = Remaining(
        scope=AGENT, budget="b", cap="c", unit="tokens", amount=10_000, spend=spent_known,
        committed=spent_known + held_known, at=EPOCH, as_of_ms=known,
    )  # fmt: skip
    assert lease.hear(said)
    ((_, rest),) = lease.rests(0)
    assert rest == 10_000 - committed()
    room = lease.no_room(Amount(0, 10_000 - committed()), 0)
    assert room is not None
    assert room.left == rest
    if committed() < 10_000:
        assert lease.no_room(Amount(0, 9_999 - committed()), 0) is None


def test_an_older_record_never_replaces_a_newer_one_and_a_new_window_frees_all_but_calls_in_flight() -> None:
    lease = Lease([AGENT])
    said = Remaining(
        scope=AGENT, budget="b", cap="c", unit="tokens", amount=100, spend=70, committed=90, at=from_us(1_000),
        as_of_ms=5, resets_at=from_us(HOUR_US),
    )  # fmt: skip
    assert lease.hear(said)
    assert not lease.hear(said.model_copy(update={"at": from_us(999), "committed": 0}))
    assert [rest for _, rest in lease.rests(HOUR_US - 1)] == [10]
    assert [rest for _, rest in lease.rests(HOUR_US)] == [80]
    assert [rest for _, rest in lease.rests(30 * HOUR_US)] == [], "older than the topic keeps it"
    assert lease.hear(said.model_copy(update={"withdrawn": True}))
    assert list(lease.rests(0)) == []


def test_many_calls_are_counted_in_bounded_memory() -> None:
    lease = Lease([AGENT])
    for nth in range(5_000):
        lease.finish(f"c{nth}", Amount(0, 1), 10 + nth)
    lease.hear(
        Remaining(
            scope=AGENT, budget="b", cap="c", unit="tokens", amount=9_000, spend=0, committed=0, at=EPOCH, as_of_ms=0
        )
    )
    assert len(lease._calls) <= 2_000
    assert [rest for _, rest in lease.rests(0)] == [4_000]


PROCESSES = 3
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["call"] * 9 + ["settle", "publish", "hear"]),
        st.integers(0, PROCESSES - 1),
        st.sampled_from([20, 60, 80, 100, 120, 600]),
    ),
    min_size=30,
    max_size=60,
)


@settings(max_examples=100, deadline=None)
@given(STEPS)
def test_no_interleaving_of_several_processes_lets_calls_run_past_a_cap(  # noqa: C901 - one story of all that may happen
    steps: list[tuple[str, int, int]],
) -> None:
    """Each process hears a record some time before the next one is published; every bound is used up."""
    cap, now = 1_000, 1
    leases = [Lease([AGENT]) for _ in range(PROCESSES)]
    running: dict[str, int] = {}
    waiting: dict[str, tuple[int, int, int]] = {}
    spent = 0
    unheard: set[int] = set()
    said = Remaining(
        scope=AGENT, budget="b", cap="c", unit="tokens", amount=cap, spend=0, committed=0, at=EPOCH, as_of_ms=0
    )

    def hear(nth: int) -> None:
        leases[nth].hear(said)
        unheard.discard(nth)
        for name, (owner, bound, before) in list(waiting.items()):
            if owner == nth:
                known, room = leases[nth].confirmed(name, 0)
                counted = before + known
                if room is not None:
                    del waiting[name]
                    leases[nth].finish(name, Amount(0, 0), now)
                elif counted == 2:  # counted, and what the others started without knowing is counted as well
                    del waiting[name]
                    running[name] = bound
                else:
                    waiting[name] = (owner, bound, counted)

    for nth in range(PROCESSES):
        hear(nth)
    for number, (kind, nth, size) in enumerate(steps):
        now += 1
        if kind == "call":
            name, bound = f"call-{number}", Amount(0, size)
            if leases[nth].no_room(bound, 0) is None and not leases[nth].is_crowded(bound, 0):
                leases[nth].start(name, bound, now, HOUR_US)
                if leases[nth].needs_confirmation(name, bound, 0):
                    waiting[name] = (nth, size, 0)
                else:
                    running[name] = size
        elif kind == "settle" and running:
            name = min(running)
            spent += running[name]
            for lease in leases:
                if name in lease._calls:
                    lease.finish(name, Amount(0, running[name]), now)
            del running[name]
        elif kind == "publish":
            for each in list(unheard):
                hear(each)
            held = sum(running.values()) + sum(bound for _, bound, _ in waiting.values())
            said = said.model_copy(
                update={"spend": spent, "committed": spent + held, "as_of_ms": now, "at": from_us(now)}
            )
            unheard = set(range(PROCESSES))
        elif kind == "hear" and nth in unheard:
            hear(nth)
        assert spent + sum(running.values()) <= cap
