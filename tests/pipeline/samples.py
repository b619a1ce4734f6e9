"""A price book small enough to compute by hand, and the budgets the pipeline's tests use."""

from __future__ import annotations

from typing import Any

from spendfuse.engine.prices import rows_sha256
from spendfuse.testing import PipelineDriver
from spendfuse.wire import Budget, Cap, PriceBookFile, PriceRow, Rates, WindowSpec

DOLLAR = 1_000_000_000
"""Nano-dollars of a dollar."""
INPUT_NANOS = 3_000
OUTPUT_NANOS = 15_000
"""What one token of `claude` costs in the book below."""
DEAR_NANOS = 75_000
"""What one token of output costs at the dearest, hence that of an unknown model."""


def rates(input_nanos: int, output_nanos: int) -> Rates:
    return Rates(
        input=input_nanos * 1_000_000,
        cache_read=input_nanos * 100_000,
        cache_write_5m=input_nanos * 1_250_000,
        cache_write_1h=input_nanos * 2_000_000,
        output=output_nanos * 1_000_000,
    )


ROWS = [
    PriceRow(provider="anthropic", model="claude", rates=rates(INPUT_NANOS, OUTPUT_NANOS)),
    PriceRow(provider="anthropic", model="opus", rates=rates(15_000, DEAR_NANOS)),
]
BOOK = PriceBookFile(book="test", sha256=rows_sha256(ROWS), source="made up", currency="USD", rows=ROWS)


def cap(amount: int, *, unit: str = "nano-USD", window: str = "day", **more: Any) -> Cap:
    return Cap(id=f"{window}-{unit[-3:].lower()}", unit=unit, amount=amount, window=WindowSpec(kind=window), **more)


def budget(scope: str, *caps: Cap, name: str = "b1", version: int = 1, **more: Any) -> Budget:
    return Budget(id=name, version=version, scope=scope, caps=list(caps), **more)


def driver(*budgets: Budget, **more: Any) -> PipelineDriver:
    return PipelineDriver(budgets=budgets, price_book=BOOK, **more)


def call(pipeline: PipelineDriver, agent: str = "acme/research/planner", **fields: Any) -> Any:
    return pipeline.usage(agent, **{"model": "claude", **fields})
