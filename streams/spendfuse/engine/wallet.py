"""The wallet: what each scope has spent of what it may spend, as a person wants to see it."""

from typing import Literal, NamedTuple

from spendfuse.engine.crossings import Held
from spendfuse.engine.forecast import burn_per_hour, runway_s
from spendfuse.engine.policies import Limit, ScopePolicy
from spendfuse.engine.spend import NANOS, TOKENS, Spend
from spendfuse.engine.state import Fuse
from spendfuse.engine.windows import RUN_KEY, calendar_window
from spendfuse.wire.budget import BASIS_POINTS

FuseLook = Literal["armed", "warned", "degraded", "tripped", "held", "shadow"]


class WalletRow(NamedTuple):
    """One cap of one scope; amounts in `unit`, `used` in 1/10,000 of the cap, `burn` in units an hour."""

    scope: str
    budget: str
    cap: str
    window: str
    unit: str
    spend: int
    committed: int
    cap_amount: int
    used: int
    burn: int
    runway_s: int | None
    state: FuseLook
    until_us: int | None


def wallet_rows(
    scope: str, policy: ScopePolicy, spend: Spend, held: Held, fuses: dict[str, Fuse], *, zone: str, now_us: int
) -> list[WalletRow]:
    """Return a row for each cap that applies to a scope, in the order of the budgets."""
    rows = []
    for limit in policy.limits:
        index = TOKENS if limit.in_tokens else NANOS
        key, total = _running(limit, spend, now_us)
        spent = total[index]
        in_flight = (held.tokens if limit.in_tokens else held.nanos) if limit.budget.count_holds else 0
        committed = spent + in_flight
        burn = burn_per_hour(spend, zone, now_us, index)
        look, until_us = _look(limit, fuses.get(limit.key), key, now_us)
        rows.append(
            WalletRow(
                scope,
                limit.budget.id,
                limit.cap.id,
                limit.cap.window.label,
                limit.cap.unit,
                spent,
                committed,
                limit.cap.amount,
                committed * BASIS_POINTS // limit.cap.amount,
                burn,
                runway_s(limit.cap.amount - committed, burn),
                look,
                until_us,
            )
        )
    return rows


def _running(limit: Limit, spend: Spend, now_us: int) -> tuple[str, list[int]]:
    window = limit.cap.window
    if window.rolling_s is not None:
        return f"rolling@{window.rolling_s}", spend.in_rolling(window.rolling_s, now_us)
    key = RUN_KEY if window.kind == "run" else calendar_window(window.kind, limit.budget.timezone, now_us).key
    return key, spend.in_window(key)


def _look(limit: Limit, fuse: Fuse | None, key: str, now_us: int) -> tuple[FuseLook, int | None]:
    if limit.budget.shadow:
        return "shadow", None
    fired = fuse.fired.get(key) if fuse else None
    if fired is None or fired.until_us <= now_us:
        return "armed", None
    action = next((step.action for step in limit.thresholds[::-1] if step.fraction <= fired.fraction), None)
    looks: dict[str | None, FuseLook] = {"warn": "warned", "degrade": "degraded", "halt": "tripped"}
    return looks.get(action, "armed"), fired.until_us
