"""Which budgets speak to a scope: compiled once for each scope, thrown away when a budget changes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from spendfuse.engine.spend import Plan
from spendfuse.wire.budget import BASIS_POINTS, Budget, Cap, WorkspaceSettings
from spendfuse.wire.scopes import matches, scope_kind, scope_workspace

BASE_KINDS: Final = ("hour", "day", "month")
SCOPE_CACHE_MAX: Final = 200_000
GRACE_S_DEFAULT: Final = 3_600
UnknownModel = Literal["ceiling", "deny", "warn"]


class Threshold(NamedTuple):
    """At which fraction of a cap (1/10,000) which action is taken."""

    fraction: int
    action: Literal["warn", "degrade", "halt"]


@dataclass(frozen=True, slots=True)
class Limit:
    """One cap of one budget as it applies to one scope; thresholds in growing order."""

    budget: Budget
    cap: Cap
    thresholds: tuple[Threshold, ...]
    key: str
    """`budget|cap`, under which a scope's state keeps this fuse."""
    in_tokens: bool
    """Whether the cap counts tokens rather than money."""
    lines: tuple[int, ...]
    """What each threshold amounts to, in 1/10,000 of the cap's unit."""

    @classmethod
    def of(cls, budget: Budget, cap: Cap) -> "Limit":
        """Return a cap of a budget as it applies to a scope."""
        thresholds = _thresholds(cap)
        lines = tuple(threshold.fraction * cap.amount for threshold in thresholds)
        return cls(budget, cap, thresholds, f"{budget.id}|{cap.id}", cap.unit == "tokens", lines)


@dataclass(frozen=True, slots=True)
class ScopePolicy:
    """All that the budgets say about one scope."""

    plan: Plan
    limits: tuple[Limit, ...]
    deny_unknown: tuple[Budget, ...]
    warn_unknown: bool


class Policies:
    """The budgets and workspace zones in force; immutable, replaced as a whole on each change."""

    def __init__(self, budgets: Iterable[Budget] = (), workspaces: Iterable[WorkspaceSettings] = ()) -> None:
        """Take the budgets in force."""
        self.budgets = {budget.id: budget for budget in budgets}
        self.denying = {budget.id: budget for budget in self.budgets.values() if budget.unknown_model == "deny"}
        self.zones = {settings.workspace: settings.timezone for settings in workspaces}
        ordered = sorted(self.budgets.values(), key=lambda budget: budget.id)
        self._limits = {budget.id: tuple(Limit.of(budget, cap) for cap in budget.caps) for budget in ordered}
        self._ordered = tuple(ordered)
        self._scopes: dict[str, ScopePolicy] = {}
        self._alike: dict[tuple[tuple[str, ...], str, bool], ScopePolicy] = {}

    def of(self, scope: str) -> ScopePolicy:
        """Return what applies to a scope; scopes under the same budgets and zone share one object."""
        policy = self._scopes.get(scope)
        if policy is None:
            if len(self._scopes) >= SCOPE_CACHE_MAX:
                self._scopes.clear()
                self._alike.clear()
            policy = self._scopes[scope] = self._find(scope)
        return policy

    def _find(self, scope: str) -> ScopePolicy:
        budgets = tuple(budget for budget in self._ordered if matches(budget.scope, scope))
        zone, is_run = self.zones.get(scope_workspace(scope), "UTC"), scope_kind(scope) == "run"
        alike = (tuple(budget.id for budget in budgets), zone, is_run)
        policy = self._alike.get(alike)
        if policy is None:
            policy = self._alike[alike] = self._compile(budgets, zone, is_run=is_run)
        return policy

    def _compile(self, budgets: tuple[Budget, ...], zone: str, *, is_run: bool) -> ScopePolicy:
        calendar = {(kind, zone): None for kind in BASE_KINDS}  # a dict keeps the order, and each pair once
        rolling: dict[int, None] = {}
        for budget in budgets:
            for cap in budget.caps:
                if cap.window.rolling_s is not None:
                    rolling[cap.window.rolling_s] = None
                elif cap.window.kind != "run":
                    calendar[(cap.window.kind, budget.timezone)] = None
        grace_s = max((budget.grace_s for budget in budgets), default=GRACE_S_DEFAULT)
        return ScopePolicy(
            Plan(tuple(calendar), tuple(rolling), is_run, grace_s * 1_000_000),
            tuple(limit for budget in budgets for limit in self._limits[budget.id]),
            tuple(budget for budget in budgets if budget.unknown_model == "deny"),
            any(budget.unknown_model == "warn" for budget in budgets),
        )


def _thresholds(cap: Cap) -> tuple[Threshold, ...]:
    """Return the thresholds in growing order; a warning beyond the degrading one says to degrade, as before.

    A guard obeys the last command of a cap, so a later one must never ask for less than an earlier one.
    """
    found = [Threshold(fraction, "warn") for fraction in cap.warn]
    if cap.degrade is not None:
        found.append(Threshold(cap.degrade.at, "degrade"))
    if cap.halt:
        found.append(Threshold(BASIS_POINTS, "halt"))
    order = {"warn": 0, "degrade": 1, "halt": 2}
    found.sort(key=lambda threshold: (threshold.fraction, order[threshold.action]))
    degraded_at = BASIS_POINTS + 1 if cap.degrade is None else cap.degrade.at
    return tuple(
        Threshold(step.fraction, "degrade") if step.action == "warn" and step.fraction > degraded_at else step
        for step in found
    )
