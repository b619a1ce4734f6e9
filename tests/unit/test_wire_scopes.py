"""Whose money: which scopes a pattern means."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factories import usage
from spendfuse.wire.scopes import agent_scope, ancestors, matches, scope_kind, scope_workspace, shared_scopes


@pytest.mark.parametrize(
    ("pattern", "scope", "expected"),
    [
        ("agent:acme/research/*", "agent:acme/research/planner", True),
        ("agent:acme/research/*", "agent:acme/sales/planner", False),
        ("agent:acme/*/*", "agent:acme/sales/planner", True),
        ("agent:*/*/*", "agent:other/sales/planner", True),
        ("agent:acme/research/p?an*", "agent:acme/research/planner", True),
        ("agent:acme/research/p?", "agent:acme/research/planner", False),
        ("agent:acme/research/planner", "agent:acme/research/planner", True),
        ("agent:acme/research/planner", "agent:acme/research/planner-2", False),
        ("agent:acme/research/PLANNER", "agent:acme/research/planner", False),
        ("agent:acme/research/plan.er", "agent:acme/research/planner", False),
        ("team:acme/*", "team:acme/research", True),
        ("team:acme/*", "agent:acme/research/planner", False),
        ("team:acme/*", "workspace:acme", False),
        ("workspace:*", "workspace:acme", True),
        ("workspace:ac*", "workspace:acme", True),
        ("workspace:acme", "workspace:acme2", False),
        ("run:acme/*", "run:acme/r1", True),
        ("run:acme/*", "run:acme/a/b/c", True),
        ("run:acme/nightly/*", "run:acme/nightly/7", True),
        ("run:acme/nightly/*", "run:acme/daily/7", False),
        ("run:*/x", "run:acme/a/x", False),
        ("run:acme/a:b@c#1", "run:acme/a:b@c#1", True),
    ],
)
def test_a_star_stays_inside_its_segment_and_a_run_id_is_one_segment(
    pattern: str, scope: str, *, expected: bool
) -> None:
    assert matches(pattern, scope) is expected


names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,6}", fullmatch=True)


@given(names, names, names, names)
def test_a_scope_matches_itself_and_the_star_of_its_own_parents_only(w: str, t: str, a: str, other: str) -> None:
    scope = agent_scope(w, t, a)
    assert matches(scope, scope)
    assert matches(f"agent:{w}/{t}/*", scope)
    assert matches(f"agent:{w}/{other}/*", scope) == (other == t)
    assert matches(f"agent:{other}/{t}/*", scope) == (other == w)


def test_the_scopes_of_a_usage_are_the_ones_whose_halt_stops_it() -> None:
    message = usage(root_run="tree/1", run="leaf/2")
    shared = shared_scopes(message)
    assert shared == ("team:acme/research", "workspace:acme", "run:acme/tree/1")
    assert ancestors("acme", "research", "planner", "tree/1") == ("agent:acme/research/planner", *shared)
    assert ancestors("acme", "research", "planner", None) == ("agent:acme/research/planner", *shared[:2])
    assert shared_scopes(usage(run="leaf/2"))[2] == "run:acme/leaf/2"
    assert [scope_kind(scope) for scope in shared] == ["team", "workspace", "run"]
    assert {scope_workspace(scope) for scope in shared} == {"acme"}
