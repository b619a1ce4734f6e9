"""A guarded call: announced, checked against what remains, settled once, whatever ends it. Without a broker."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from spendfuse.client import Guard, Halted, Meter, NoRoom, Tokens
from spendfuse.client.follow import Record
from spendfuse.embedded.processes import free_port
from spendfuse.settings import BrokerSettings, GuardSettings, IdentitySettings
from spendfuse.testing import PipelineDriver
from spendfuse.wire import Budget, Cap, Command, WindowSpec, encode
from spendfuse.wire.base import from_us
from spendfuse.wire.topics import COMMANDS, REMAINING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from spendfuse.wire import Usage

PLANNER = "agent:acme/research/planner"
ANSWER = {"model": "claude-sonnet-4-5", "usage": {"input_tokens": 10, "output_tokens": 30}}


class Pipe(Meter):
    """A meter whose usages go to the production stages in memory."""

    driver: PipelineDriver
    deliver: bool = True

    def emit(self, usage: Usage) -> None:
        super().emit(usage)
        with ThreadPoolExecutor(1) as pool:  # the driver has a loop of its own, and this thread may be in another
            pool.submit(self._drive, usage).result()

    def _drive(self, usage: Usage) -> None:
        if self.deliver:
            self.driver.emit(usage)
        self.driver.at(self.driver.now_us + 1_000)


class Bench:
    """Guards of one or several processes around one pipeline; nothing reaches them until `hear`."""

    def __init__(self, *budgets: Budget) -> None:
        self.driver = PipelineDriver(budgets=budgets)
        self.broker = BrokerSettings(bootstrap_servers=f"127.0.0.1:{free_port()}")  # nobody is there
        self.guards: list[Guard] = []
        self._heard: dict[tuple[int, str], int] = {}

    def guard(self, **more: Any) -> Guard:
        names = IdentitySettings(workspace="acme", team="research", agent="planner", run="run-planner")
        meter = Pipe(names, self.broker, clock=lambda: self.driver.now_us)
        meter.driver = self.driver
        settings = GuardSettings(**({"unsigned_commands": True, "sync_timeout_s": 0, "guard_dir": "off"} | more))
        guard = Guard(names, self.broker, settings, clock=lambda: self.driver.now_us, meter=meter)
        self.guards.append(guard)
        return guard

    def hear(self) -> None:
        """Let the pipeline come to its rest and every guard read what it said."""
        self.driver.advance(1)
        for nth, guard in enumerate(self.guards):
            for topic, take_in in ((COMMANDS.name, guard._on_command), (REMAINING.name, guard._on_remaining)):
                records = self.driver.records(topic)
                for record in records[self._heard.get((nth, topic), 0) :]:
                    take_in(Record(topic, 0, record.offset, record.timestamp_ms, record.key, record.value, ()))
                self._heard[nth, topic] = len(records)

    def close(self) -> None:
        for guard in self.guards:
            guard.meter.close(0)
            guard.close()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(*budgets: Budget) -> Bench:
        made.append(Bench(*budgets))
        # What Kafka stamps is the driver's time here.
        monkeypatch.setattr("spendfuse.client.admission._wall_ms", lambda: made[-1].driver.now_us // 1_000)
        return made[-1]

    yield make
    for each in made:
        each.close()


def budget(amount: int = 1_000, scope: str = PLANNER, unit: str = "tokens") -> Budget:
    cap = Cap(id="c", unit=unit, amount=amount, window=WindowSpec(kind="day"))
    return Budget(id="b", version=1, scope=scope, caps=[cap])


def call(guard: Guard, output: int = 100, **more: Any) -> Any:
    return guard.call(Tokens(output=output), **({"provider": "anthropic", "model": "claude-sonnet-4-5"} | more))


def held(bench: Bench, scope: str = PLANNER) -> int:
    (row,) = [row for row in bench.driver.wallet() if row.scope == scope]
    return row.committed - row.spend


def test_a_call_is_held_while_it_runs_and_charged_what_the_response_says(bench: Callable[..., Bench]) -> None:
    line = bench(budget())
    with call(line.guard(), 500) as running:
        assert held(line) == 500
        running.settle(ANSWER)
    assert held(line) == 0
    assert line.driver.spend(PLANNER).tokens == 40
    assert line.driver.spend(PLANNER).calls == 1


def test_a_call_whose_bound_does_not_fit_is_refused_before_anything_is_emitted(bench: Callable[..., Bench]) -> None:
    line = bench(budget(1_000, "team:acme/research"))
    guard = line.guard()
    with call(guard, 700) as running:
        line.hear()
        with pytest.raises(NoRoom, match=r"may use up to 300 tokens, and team:acme/research has 300 tokens left"):
            call(guard, 300).__enter__()
        with call(guard, 299) as fits:
            fits.settle(Tokens(output=1))
        running.settle(Tokens(output=10))
    line.hear()
    with call(guard, 900) as later:
        later.settle(Tokens(output=5))
    assert line.driver.spend(PLANNER).calls == 3
    assert line.driver.commands() == []


def test_money_is_checked_by_the_price_book(bench: Callable[..., Bench]) -> None:
    line = bench(budget(10_000_000, unit="nano-USD"))  # a cent
    guard = line.guard()
    with call(guard, 1) as first:
        first.settle(Tokens(output=1))
    line.hear()
    with pytest.raises(NoRoom, match=r"up to USD 0\.15"):
        call(guard, 10_000).__enter__()  # at USD 15 a million
    with call(guard, 600) as fits:
        fits.settle(Tokens(output=1))


def test_its_own_calls_count_at_once_although_nothing_more_is_heard(bench: Callable[..., Bench]) -> None:
    line = bench(budget())
    guard = line.guard()
    with call(guard, 1) as first:
        first.settle(Tokens(output=1))
    line.hear()
    guard.meter.deliver = False  # type: ignore[attr-defined]  # the worker is away: nothing comes back
    for _ in range(9):
        with call(guard, 100) as one:
            one.settle(Tokens(output=100))
    with pytest.raises(NoRoom, match="99 tokens left"):
        call(guard, 100).__enter__()
    with pytest.raises(NoRoom), call(guard, 50), call(guard, 49):
        pytest.fail("both at once do not fit")


@pytest.mark.parametrize(
    ("so_far", "charged"), [(None, 0), (25, 25)], ids=["before any progress", "in the middle of a stream"]
)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, asyncio.CancelledError])
def test_an_error_releases_the_hold_and_charges_what_was_reported(
    bench: Callable[..., Bench], so_far: int | None, charged: int, error: type[BaseException]
) -> None:
    line = bench(budget())
    with suppress(error), call(line.guard(), 500) as running:
        if so_far is not None:
            running.progress(so_far)
        raise error
    assert held(line) == 0
    assert line.driver.spend(PLANNER).tokens == charged


def test_a_call_that_never_says_what_it_used_is_charged_its_bound(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    line = bench(budget())
    with call(line.guard(), 500):
        pass
    assert line.driver.spend(PLANNER).tokens == 500
    assert "charged its upper bound" in caplog.text


def test_a_response_without_usage_is_charged_the_bound_and_not_given_away(bench: Callable[..., Bench]) -> None:
    line = bench(budget())
    with pytest.raises(ValueError, match="has no usage"), call(line.guard(), 500) as running:
        running.settle({"id": "x"})
    assert line.driver.spend(PLANNER).tokens == 500


def test_a_released_call_costs_nothing(bench: Callable[..., Bench]) -> None:
    line = bench(budget())
    with call(line.guard(), 500) as running:
        running.release()
    assert (held(line), line.driver.spend(PLANNER).tokens) == (0, 0)


def test_a_stream_is_cut_when_its_scope_halts_and_charged_what_it_had_used(bench: Callable[..., Bench]) -> None:
    line = bench(budget())
    guard = line.guard()
    written = []

    def write() -> None:
        with call(guard, 500) as stream:
            for so_far in range(1, 500):
                written.append(so_far)
                stream.progress(so_far)
                if so_far == 20:
                    line.driver.emit(line.driver.usage("acme/research/planner", output=600))
                    line.hear()

    with pytest.raises(Halted, match="in flight"):
        write()
    assert written[-1] == 21, "the first progress after the halt"
    line.hear()
    assert line.driver.spend(PLANNER).tokens == 621
    assert [command.action for command in line.driver.commands()] == ["halt", "resume"]
    guard.check()


def test_a_stream_beyond_its_bound_raises_the_hold_at_once(bench: Callable[..., Bench]) -> None:
    line = bench(budget())
    with call(line.guard(), 50) as stream:
        stream.progress(10)
        stream.progress(120)
        assert held(line) == 120
        stream.settle(Tokens(output=130))
    assert line.driver.spend(PLANNER).tokens == 130


def test_a_degraded_call_asks_for_the_other_model_and_holds_less(bench: Callable[..., Bench]) -> None:
    degrade = {"at": 5_000, "models": {"claude-opus-4-6": "claude-haiku-4-5"}, "max_output_tokens": 64}
    cap = {"id": "c", "unit": "tokens", "amount": 1_000, "window": {"kind": "day"}, "degrade": degrade}
    line = bench(Budget.model_validate({"id": "b", "version": 1, "scope": PLANNER, "caps": [cap]}))
    guard = line.guard()
    line.driver.emit(line.driver.usage("acme/research/planner", output=500))
    line.hear()
    with call(guard, 400, model="claude-opus-4-6") as running:
        assert (running.model, running.max_output_tokens) == ("claude-haiku-4-5", 64)
        assert held(line) == 64
        running.settle(Tokens(output=60))


def test_a_decorated_function_is_a_call_each_time(bench: Callable[..., Bench]) -> None:
    line = bench(budget())
    guard = line.guard()

    @call(guard, 400)
    def ask(prompt: str) -> dict[str, Any]:
        assert held(line) == 400
        return {**ANSWER, "prompt": prompt}

    @call(guard, 400)
    async def ask_later(prompt: str) -> dict[str, Any]:
        assert held(line) == 400
        return {**ANSWER, "prompt": prompt}

    assert [ask("a")["prompt"], ask("b")["prompt"], asyncio.run(ask_later("c"))["prompt"]] == ["a", "b", "c"]
    assert (line.driver.spend(PLANNER).tokens, line.driver.spend(PLANNER).calls) == (120, 3)
    assert ask.__name__ == "ask"


def streaming(guard: Guard, kind: str, chunks: list[Any], meanwhile: Callable[[int], None]) -> Callable[[], list[Any]]:
    """A decorated generator, sync or async; returns what it yields, read to its end."""

    @call(guard, 500)
    def stream() -> Iterator[Any]:
        for nth, chunk in enumerate(chunks):
            meanwhile(nth)
            yield chunk

    @call(guard, 500)
    async def stream_async() -> AsyncIterator[Any]:
        for nth, chunk in enumerate(chunks):
            await asyncio.to_thread(meanwhile, nth)  # the driver has a loop of its own
            yield chunk

    async def collected() -> list[Any]:
        return [chunk async for chunk in stream_async()]

    return (lambda: list(stream())) if kind == "sync" else lambda: asyncio.run(collected())


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_decorated_stream_is_held_to_its_end_and_charged_what_its_chunks_say(
    bench: Callable[..., Bench], kind: str
) -> None:
    line = bench(budget())
    chunks = [
        {"type": "message_start", "usage": {"input_tokens": 30, "output_tokens": 1}},
        {"type": "content_block_delta"},
        {"type": "message_delta", "usage": {"input_tokens": 0, "output_tokens": 12}},
        {"type": "message_stop"},
    ]
    seen: list[int] = []
    read = streaming(line.guard(), kind, chunks, lambda _: seen.append(held(line)))
    assert read() == chunks
    assert seen == [500] * 4
    assert (held(line), line.driver.spend(PLANNER).tokens) == (0, 42)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_decorated_stream_is_cut_when_its_scope_halts_and_never_free(bench: Callable[..., Bench], kind: str) -> None:
    line = bench(budget())
    written: list[int] = []

    def meanwhile(nth: int) -> None:
        written.append(nth)
        if nth == 3:
            line.driver.emit(line.driver.usage("acme/research/planner", output=600))
            line.hear()

    with pytest.raises(Halted):
        streaming(line.guard(), kind, [{"text": "x"}] * 100, meanwhile)()
    assert written == [0, 1, 2, 3], "the first chunk after the halt"
    line.hear()
    assert line.driver.spend(PLANNER).tokens == 600 + 500
    assert held(line) == 0


async def test_an_async_call_does_the_same(bench: Callable[..., Bench]) -> None:
    line = await asyncio.to_thread(bench, budget())
    guard = line.guard()
    async with call(guard, 400) as running:
        assert guard.calls_in_flight == 1
        running.settle(ANSWER)
    assert guard.calls_in_flight == 0
    with pytest.raises(RuntimeError, match="is ended, not new"):
        async with running:
            pass
    assert line.driver.spend(PLANNER).tokens == 40


@pytest.mark.parametrize("bad", [{"provider": "Not A Provider"}, {"model": "no model"}, {"tier": "no tier"}])
def test_what_no_usage_can_say_is_refused_when_the_call_is_written(
    bench: Callable[..., Bench], bad: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="should match pattern"):
        call(bench().guard(), **bad)


@pytest.mark.parametrize("emitters", [1, 3])
def test_full_use_of_holds_never_passes_the_cap_and_leaves_less_than_a_call_unused(
    bench: Callable[..., Bench], emitters: int
) -> None:
    """The guards hear of each other after each round: so many calls each start one at a time."""
    line = bench(budget(10_000, "team:acme/research"))
    guards = [line.guard() for _ in range(emitters)]
    refused = 0
    while refused < emitters:
        refused = 0
        for guard in guards:
            try:
                with call(guard, 130) as running:
                    running.settle(Tokens(output=100))
            except NoRoom:
                refused += 1
            line.hear()
    spent = line.driver.spend("team:acme/research").tokens
    assert 10_000 - 130 <= spent < 10_000
    assert line.driver.commands() == []


def test_where_only_calls_in_flight_fill_a_cap_a_call_finds_no_room_and_goes_on_when_they_have_ended(
    bench: Callable[..., Bench],
) -> None:
    line = bench(budget())
    one, other = line.guard(), line.guard()
    with call(one, 600) as first, call(other, 600) as second:  # neither can know of the other
        line.hear()
        with pytest.raises(Halted) as halted:
            one.check()
        assert not isinstance(halted.value, NoRoom)
        with pytest.raises(NoRoom, match="try again when calls in flight have ended"):
            call(one, 10).__enter__()
        first.settle(Tokens(output=100))
        second.settle(Tokens(output=100))
    line.hear()
    with call(one, 700) as later:
        later.settle(Tokens(output=100))
    assert [command.action for command in line.driver.commands()] == ["halt", "resume"]


def test_a_halt_by_spend_or_by_a_person_is_a_halt_for_a_call_too(bench: Callable[..., Bench]) -> None:
    line = bench(budget())
    one, other = line.guard(), line.guard()
    with suppress(Halted), call(one, 600) as first, call(other, 600) as second:
        line.hear()
        first.settle(Tokens(output=600))
        second.settle(Tokens(output=600))
    line.hear()
    with pytest.raises(Halted) as by_spend:
        call(one, 10).__enter__()
    assert not isinstance(by_spend.value, NoRoom)

    held = bench(budget())
    three, four = held.guard(), held.guard()
    with call(three, 600) as first, call(four, 600) as second:
        held.hear()
        manual = Command(
            id="0" * 32, seq=1, action="halt", scope=PLANNER, budget="manual", cap="halt", by="user:ada",
            issued_at=from_us(held.driver.now_us),
        )  # fmt: skip
        three._on_command(Record(COMMANDS.name, 0, 99, 0, manual.key.encode(), encode(manual), ()))
        with pytest.raises(Halted) as by_person:
            call(three, 10).__enter__()
        assert not isinstance(by_person.value, NoRoom)
        first.release()
        second.release()
