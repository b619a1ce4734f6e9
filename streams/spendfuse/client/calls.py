"""One model call under a guard: announced before it starts, checked against what remains, settled when it has ended.

    with guard.call(Tokens(input=2_000, output=500), provider="anthropic", model="claude-sonnet-4-6") as call:
        response = client.messages.create(model=call.model, max_tokens=call.max_output_tokens, ...)
        call.settle(response)

    with guard.call(Tokens(input=2_000, output=4_000), provider="openai", model="gpt-5") as call:
        for chunk in stream:
            call.progress(Tokens(input=2_000, output=written))   # raises Halted: the stream is cut
        call.settle(chunk)                                       # the last event with usage

    @guard.call(Tokens(input=2_000, output=500), provider="openai", model="gpt-5")
    def ask(prompt): return client.responses.create(...)         # settled from what it returns; async def as well,
                                                                 # and generators: checked at each chunk they yield

What becomes of the hold, all under one call id:
- settled: the charge of what was used replaces it;
- an error or a cancellation before any progress releases it (a finished usage of no tokens);
- after progress, what was last reported is charged: the provider has done that work;
- a call that ended well and never said what it used is charged its bound, with a warning: unknown is never free;
- a process that dies leaves the hold to its deadline.
"""

import asyncio
import contextlib
import functools
import inspect
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from spendfuse.client.extract import Extracted, from_anthropic, from_gemini, from_openai_chat, from_openai_responses
from spendfuse.client.halted import NoRoom
from spendfuse.wire.usage import Kind, Tokens, Usage

if TYPE_CHECKING:
    from spendfuse.client.guard import Guard

DEADLINE_S: Final = 600.0
"""How long a call is held after its last sign of progress, unless it says."""
PROGRESS_INTERVAL_S: Final = 0.5
"""Progress is reported at most so often; a call that passes its bound says so at once."""
PATIENCE_S: Final = 1.0
"""How long a call waits to hear of the calls before it, or of itself where little is left."""
OTHERS_S: Final = 0.4
"""How long a call that needs much of what is left waits, once counted, for what others started without knowing."""
WAIT_STEP_S: Final = 0.01
SOURCE: Final = "spendfuse-python"

Extract = Callable[[Any], Extracted]
_Function = TypeVar("_Function", bound=Callable[..., Any])
_log = logging.getLogger("spendfuse")


class Call:
    """A call that `Guard.call` returned; `model` and `max_output_tokens` are what to ask the provider for.

    A context manager serves once; as a decorator it makes a call of its own each time the function is called.
    """

    def __init__(
        self,
        guard: "Guard",
        bound: Tokens,
        *,
        provider: str,
        model: str,
        call_id: str | None,
        deadline_s: float,
        extract: Extract | None,
        labels: dict[str, Any],
    ) -> None:
        self.id = call_id or f"{SOURCE}:{uuid.uuid4().hex}"
        self.model = model
        self.bound = bound
        self._guard = guard
        self._asked: dict[str, Any] = {
            "provider": provider, "model": model, "call_id": call_id, "deadline_s": deadline_s,
            "extract": extract, "labels": labels,
        }  # fmt: skip
        self._provider = provider
        self._deadline_s = deadline_s
        self._extract = extract
        self._labels = labels
        self._so_far: Tokens | None = None
        self._said_at = float("-inf")
        self._known_at: float | None = None
        self._state = "new"
        self.said: Extracted | None = None

    @property
    def max_output_tokens(self) -> int:
        """Return the most output tokens to ask for: the bound's, or fewer while degraded."""
        return self.bound.output

    # -- while it runs ---------------------------------------------------------------------------------------------

    def progress(self, so_far: Tokens | int) -> None:
        """Report what a stream has used so far (cumulative: tokens, or output tokens alone), or raise Halted.

        More than the bound raises the hold; raises NoRoom when that does not fit. Leave the block when it raises.
        """
        self._must_be("running", "report progress")
        tokens = so_far if isinstance(so_far, Tokens) else self.bound.model_copy(update={"output": so_far})
        self._so_far = tokens
        beyond = tokens.total > self.bound.total
        now = monotonic()
        if beyond or now - self._said_at >= PROGRESS_INTERVAL_S:
            self._said_at = now
            usage = self._usage("progress", tokens)
            if beyond:
                self.bound = tokens
                self._guard.widen(self.id, usage, self._deadline_us())
            self._guard.meter.emit(usage)
        self._guard.check()

    def settle(self, response: Any) -> Usage:
        """End the call with what it used, and return the usage: Tokens, or a provider's response to read it from.

        The last event of a stream serves as a response. Raises ValueError when a response does not say; the call is
        then charged its bound unless it is settled again.
        """
        self._must_be("running", "settle")
        if isinstance(response, Tokens):
            return self._finish(response, self.model)
        self._so_far = self._so_far or self.bound  # the provider has answered, whatever can be read of it
        found = (
            response if isinstance(response, Extracted) else (self._extract or _extract_of(self._provider))(response)
        )
        return self._finish(found.tokens, found.model or self.model)

    def release(self) -> None:
        """End the call without a charge: it never reached the provider."""
        self._must_be("running", "release")
        self._finish(Tokens(), self.model)

    # -- as a context manager, sync and async ----------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._must_be("new", "start")
        self._guard.check_call()
        self._guard.wait_for_remaining(self._guard.lease_wait_s())
        give_up_at = monotonic() + PATIENCE_S
        usage = self._draft()
        while not self._admitted(usage, patient=monotonic() < give_up_at):
            self._guard.wait_for_news(WAIT_STEP_S)
        give_up_at = monotonic() + PATIENCE_S
        try:
            while not self._confirmed(usage) and monotonic() < give_up_at:
                self._guard.wait_for_news(WAIT_STEP_S)
        except BaseException as error:
            self._give_up(error)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._state != "running":
            return
        if error is not None or kind is not None:
            self._finish(self._so_far or Tokens(), self.model)
            return
        if self._so_far is None:
            _log.warning("spendfuse call %s ended and was not settled: it is charged its upper bound", self.id)
        self._finish(self._so_far or self.bound, self.model)

    async def __aenter__(self) -> Self:
        self._must_be("new", "start")
        await self._guard.acheck_call()
        while (wait_s := self._guard.lease_wait_s()) > 0:  # noqa: ASYNC110 - set by another thread
            await asyncio.sleep(min(wait_s, WAIT_STEP_S))
        give_up_at = monotonic() + PATIENCE_S
        usage = self._draft()
        while not self._admitted(usage, patient=monotonic() < give_up_at):  # noqa: ASYNC110 - heard by another thread
            await asyncio.sleep(WAIT_STEP_S)
        give_up_at = monotonic() + PATIENCE_S
        try:
            while not self._confirmed(usage) and monotonic() < give_up_at:  # noqa: ASYNC110 - the same
                await asyncio.sleep(WAIT_STEP_S)
        except BaseException as error:
            self._give_up(error)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)

    # -- as a decorator --------------------------------------------------------------------------------------------

    def __call__(self, function: _Function) -> _Function:
        """Return the function under the guard: each call of it is announced, and settled from what it returns."""
        if inspect.isasyncgenfunction(function):
            return self._guarded_stream_async(function)  # type: ignore[no-any-return]  # the same signature
        if inspect.isgeneratorfunction(function):
            return self._guarded_stream(function)  # type: ignore[no-any-return]  # the same
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def guarded_async(*args: Any, **kwargs: Any) -> Any:
                async with self._another() as call:
                    response = await function(*args, **kwargs)
                    call.settle_if_said(response)
                    return response

            return guarded_async  # type: ignore[return-value]  # the same signature, by functools.wraps

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            with self._another() as call:
                response = function(*args, **kwargs)
                call.settle_if_said(response)
                return response

        return guarded  # type: ignore[return-value]  # the same

    def _guarded_stream(self, function: Any) -> Any:
        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Iterator[Any]:
            with self._another() as call, contextlib.closing(function(*args, **kwargs)) as chunks:
                for chunk in chunks:
                    call.pass_on(chunk)
                    yield chunk
                call.settle_if_said(call.said)

        return guarded

    def _guarded_stream_async(self, function: Any) -> Any:
        @functools.wraps(function)
        async def guarded(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            async with self._another() as call, contextlib.aclosing(function(*args, **kwargs)) as chunks:
                async for chunk in chunks:
                    call.pass_on(chunk)
                    yield chunk
                call.settle_if_said(call.said)

        return guarded

    def pass_on(self, chunk: Any) -> None:
        """Take note of a chunk of a stream, or raise Halted: the stream is cut, and charged its bound.

        What a chunk says of its usage is kept in `said`: of each counter the most that any chunk said, since providers
        report cumulative values, and not all of them in the last one.
        """
        self._so_far = self._so_far or self.bound  # the provider is answering, whatever can be read of it
        try:
            found = (self._extract or _extract_of(self._provider))(chunk)
        except ValueError:
            found = None
        if found is not None:
            self.said = found if self.said is None else found._replace(tokens=_most(self.said.tokens, found.tokens))
        self._guard.check()

    def settle_if_said(self, response: Any) -> None:
        """Settle from a response; one that does not say what it used is charged the bound, with a warning."""
        try:
            self.settle(response)
        except ValueError as error:
            _log.warning("spendfuse call %s is charged its upper bound: %s", self.id, error)
            self._finish(self.bound, self.model)

    def check_bound(self) -> None:
        """Raise ValueError for a bound, provider, model or label that no usage can have."""
        self._usage("started", self.bound)

    def _another(self) -> "Call":
        return Call(self._guard, self.bound, **{**self._asked, "call_id": None})

    def _draft(self) -> Usage:
        """Return what announces the call: with another model and a shorter answer while degraded."""
        self.model = self._guard.model(self.model)
        most = self._guard.max_output_tokens
        if most is not None and most < self.bound.output:
            reasoning = min(self.bound.reasoning, most)
            self.bound = self.bound.model_copy(update={"output": most, "reasoning": reasoning})
        return self._usage("started", self.bound)

    def _admitted(self, usage: Usage, *, patient: bool) -> bool:
        """Announce the call if it may start now; raise NoRoom or Halted if it may not start at all."""
        self._guard.check_call(usage)
        if not self._guard.admit(self.id, usage, self._deadline_us(), patient=patient):
            return False
        self._state = "running"
        self._guard.meter.emit(usage)
        return True

    def _confirmed(self, usage: Usage) -> bool:
        """Say whether the announced call may go on; raise NoRoom or Halted when others left no room for it."""
        self._guard.check_call(usage)
        known = self._guard.confirmed(self.id, usage)
        if known is None:
            return True
        if known and self._known_at is None:
            self._known_at = monotonic()
        if self._known_at is None or monotonic() - self._known_at < OTHERS_S:
            return False
        self._guard.took_turn(gave_way=False)
        return True

    def _give_up(self, error: BaseException) -> None:
        """Release a call that was announced and did not begin: leaving the block will not be asked for."""
        if isinstance(error, NoRoom):
            self._guard.took_turn(gave_way=True)
        if self._state == "running":
            self._finish(Tokens(), self.model)

    def _finish(self, tokens: Tokens, model: str) -> Usage:
        usage = self._usage("finished", tokens, model)
        self._state = "ended"
        self._guard.meter.emit(usage)
        return usage

    def _usage(self, kind: Kind, tokens: Tokens, model: str | None = None) -> Usage:
        return self._guard.meter.usage(
            provider=self._provider,
            model=model or self.model,
            tokens=tokens,
            id=self.id,
            kind=kind,
            deadline=None if kind == "finished" else self._guard.deadline(self._deadline_s),
            **self._labels,
        )

    def _deadline_us(self) -> int:
        return self._guard.deadline_us(self._deadline_s)

    def _must_be(self, state: str, what: str) -> None:
        if self._state != state:
            raise RuntimeError(f"cannot {what}: call {self.id} is {self._state}, not {state}")


def _most(a: Tokens, b: Tokens) -> Tokens:
    return Tokens(**{name: max(getattr(a, name), getattr(b, name)) for name in Tokens.model_fields})


def _extract_of(provider: str) -> Extract:
    """Return how to read a provider's responses; one that nobody knows is read as OpenAI's, whose form most took."""
    if provider == "anthropic":
        return from_anthropic
    if provider in ("google", "gemini", "vertex", "vertex-ai"):
        return from_gemini
    return _from_openai


def _from_openai(response: Any) -> Extracted:
    inner = response.get("usage") if isinstance(response, dict) else getattr(response, "usage", None)
    names = inner if isinstance(inner, dict) else getattr(inner, "__dict__", {})
    return from_openai_chat(response) if "prompt_tokens" in names else from_openai_responses(response)
