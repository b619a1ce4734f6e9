"""The weekend as a plan of events: 23 subagents, 72 hours, exactly $47,000 at list prices if nothing stops them.

Every agent loops: it re-reads a context that grows until it starts over, and writes an answer. The pauses and sizes
are drawn from a seed, so the plan is the same in every process that makes it. Only the last call of an agent is
adjusted, so that the sum is what the weekend cost, to the nano-dollar.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from spendfuse.wire.usage import Tokens

AGENTS: Final = 23
WEEKEND_US: Final = 72 * 3_600_000_000
WEEKEND_NANOS: Final = 47_000 * 1_000_000_000
WEEKEND_NANOS_PER_S: Final = WEEKEND_NANOS // (72 * 3_600)
"""The real pace of the incident: $0.181 a second."""

WORKSPACE: Final = "acme"
TEAM: Final = "research"
ROOT_RUN: Final = "weekend-crawl"
WORKFLOW: Final = "competitor-research"
PROVIDER: Final = "anthropic"
MODEL: Final = "claude-opus-4-6"

CALL_NANOS_MEAN: Final = 1_000_000_000
"""What one call costs on average: a long context on a dear model."""
CONTEXT_MAX: Final = 120_000
"""Tokens at which a loop starts over with a short context."""
GRANULE_NANOS: Final = 500
"""What one cached token costs, the smallest step a sum of calls can take at these rates."""


class Rates(NamedTuple):
    """What a token of each kind costs the plan, in nano-dollars; checked against the price book by its test."""

    input: int = 5_000
    cache_read: int = 500
    cache_write_5m: int = 6_250
    output: int = 25_000


RATES: Final = Rates()


class Call(NamedTuple):
    """One call: when, counted from the weekend's start in microseconds, and its tokens."""

    offset_us: int
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class AgentPlan:
    """One subagent's weekend."""

    number: int
    share_nanos: int

    @property
    def name(self) -> str:
        """Return the agent's name."""
        return f"subagent-{self.number:02d}"

    def calls(self) -> Iterator[Call]:
        """Yield the calls in order; their cost is `share_nanos`, and they fill the weekend."""
        draw = random.Random(self.number)  # noqa: S311 - a reproducible plan, not a secret
        count = max(2, self.share_nanos // CALL_NANOS_MEAN)
        left = self.share_nanos
        step_us = WEEKEND_US // (count + 1)
        context = 0
        for nth in range(count):
            offset_us = nth * step_us + draw.randrange(step_us)
            target = left // (count - nth)
            if nth == count - 1:
                yield Call(offset_us, _exactly(left))
                return
            tokens, context = _turn(draw, context, target)
            left -= cost_nanos(tokens)
            yield Call(offset_us, tokens)


def _turn(draw: random.Random, context: int, target_nanos: int) -> tuple[Tokens, int]:
    """Return one turn of a loop that costs about `target_nanos`, and the context it leaves behind."""
    if context > CONTEXT_MAX or not context:
        context = draw.randrange(8_000, 16_000)
    output = draw.randrange(600, 2_400)
    cache_read = context
    spent = output * RATES.output + cache_read * RATES.cache_read
    wanted = target_nanos * draw.randrange(80, 120) // 100
    # What is left of the turn's price is prompt that no cache served: the loop edits the top of its context.
    fresh = max(1_000, (wanted - spent) // RATES.input)
    written = min(2_000, fresh // 10)
    fresh -= written * RATES.cache_write_5m // RATES.input
    return Tokens(input=fresh, cache_read=cache_read, cache_write_5m=written, output=output), context + written * 4


def _exactly(nanos: int) -> Tokens:
    """Return a call that costs exactly `nanos`, a multiple of the granule."""
    output = min(2_000, nanos // (2 * RATES.output))
    left = nanos - output * RATES.output
    fresh = left // RATES.input
    left -= fresh * RATES.input
    return Tokens(input=fresh, cache_read=left // RATES.cache_read, output=output)


def cost_nanos(tokens: Tokens) -> int:
    """Return what a call of the plan costs."""
    return (
        tokens.input * RATES.input
        + tokens.cache_read * RATES.cache_read
        + tokens.cache_write_5m * RATES.cache_write_5m
        + tokens.output * RATES.output
    )


def weekend() -> list[AgentPlan]:
    """Return the plans of all agents: some burn faster than others, together exactly `WEEKEND_NANOS`."""
    weights = [80 + (number * 7) % 41 for number in range(1, AGENTS + 1)]
    granules = WEEKEND_NANOS // GRANULE_NANOS
    shares = [granules * weight // sum(weights) for weight in weights]
    shares[-1] += granules - sum(shares)
    return [AgentPlan(number, share * GRANULE_NANOS) for number, share in enumerate(shares, start=1)]
