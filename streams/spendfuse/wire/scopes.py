"""Whose money: the scopes of a usage, and how a budget's pattern matches them."""

from fnmatch import translate
from functools import lru_cache
from re import Pattern
from re import compile as compile_pattern
from typing import Final, Literal, get_args

from spendfuse.wire.correction import Correction
from spendfuse.wire.usage import Usage

ScopeKind = Literal["workspace", "team", "agent", "run"]
SCOPE_KINDS: Final[tuple[str, ...]] = get_args(ScopeKind)
PATTERN_CACHE_MAX: Final = 4_096


def agent_scope(workspace: str, team: str, agent: str) -> str:
    """Return `agent:workspace/team/agent`."""
    return f"agent:{workspace}/{team}/{agent}"


def shared_scopes(usage: Usage | Correction) -> tuple[str, str, str]:
    """Return the scopes an agent shares with others: its team, its workspace and its run tree."""
    workspace = usage.workspace
    return (
        f"team:{workspace}/{usage.team}",
        f"workspace:{workspace}",
        f"run:{workspace}/{usage.root_run or usage.run}",
    )


def ancestors(workspace: str, team: str, agent: str, root_run: str | None) -> tuple[str, ...]:
    """Return every scope whose halt stops this agent, the agent's own first."""
    scopes = (agent_scope(workspace, team, agent), f"team:{workspace}/{team}", f"workspace:{workspace}")
    return (*scopes, f"run:{workspace}/{root_run}") if root_run else scopes


def scope_kind(scope: str) -> str:
    """Return `workspace`, `team`, `agent` or `run`."""
    return scope.partition(":")[0]


def scope_workspace(scope: str) -> str:
    """Return the workspace a scope belongs to."""
    return scope.partition(":")[2].partition("/")[0]


@lru_cache(maxsize=PATTERN_CACHE_MAX)
def _compiled(pattern: str) -> tuple[Pattern[str], ...]:
    # `*` stays inside its segment: agent:acme/research/* is every agent of one team, not of every team.
    # A run id may hold slashes, so the last segment of a run pattern takes the rest.
    kind, _, path = pattern.partition(":")
    segments = path.split("/", 1 if kind == "run" else 2)
    return tuple(compile_pattern(translate(segment)) for segment in segments)


def matches(pattern: str, scope: str) -> bool:
    """Say whether a scope is one of a pattern's: `*` and `?` match inside one segment."""
    kind, _, path = scope.partition(":")
    if pattern.partition(":")[0] != kind:
        return False
    parts = _compiled(pattern)
    segments = path.split("/", len(parts) - 1)
    return len(parts) == len(segments) and all(
        part.match(segment) is not None for part, segment in zip(parts, segments, strict=True)
    )
