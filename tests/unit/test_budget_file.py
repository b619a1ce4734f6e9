"""A team lead's budget file: what it means, and how its mistakes are told."""

import time
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spendfuse.adapters.budget_file import BudgetFile, BudgetFileError, dump, load, parse, with_versions
from spendfuse.adapters.budget_values import amount, amount_text
from spendfuse.adapters.yaml_nodes import FAULTS_MAX, TEXT_CHARS_MAX
from spendfuse.wire import Budget, Cap, DegradeRule, WindowSpec, WorkspaceSettings

WHOLE = """\
version: 1
workspaces:
  acme: {timezone: Europe/Amsterdam}
budgets:
  - id: research-agents
    scope: agent:acme/research/*
    timezone: Europe/Amsterdam        # default: the workspace's zone, else UTC
    unknown_model: deny
    shadow: true
    grace: 90m
    note: agreed on Monday
    caps:
      - id: day-spend
        amount: 50 USD
        window: day
        warn: [80%, 50%]
        degrade: {at: 90%, models: {claude-opus-4-6: claude-haiku-4-5}, max_output_tokens: 512}
        halt: true
      - {amount: 5M tokens, window: rolling 90m, warn: 75%, halt: no}
"""


def one_cap(**lines: str) -> str:
    """Return a file with one cap, some of its lines replaced."""
    given_lines = {"scope": "agent:acme/research/*", "amount": "50 USD", "window": "day"} | lines
    cap = "".join(f"        {key}: {given_lines[key]}\n" for key in ("amount", "window", "warn") if key in given_lines)
    rest = "".join(
        f"    {key}: {given_lines[key]}\n"
        for key in ("scope", "timezone", "unknown_model", "shadow", "count_holds", "grace")
        if key in given_lines
    )
    return f"version: 1\nbudgets:\n  - id: b\n{rest}    caps:\n      -\n{cap}"


def read(text: str, **options: str) -> BudgetFile:
    return parse(text, name="budgets.yaml", **options)


def faults(text: str, **options: str) -> list[str]:
    with pytest.raises(BudgetFileError) as caught:
        read(text, **options)
    return [str(fault) for fault in caught.value.faults]


def test_a_whole_file_means_what_it_says() -> None:
    found = read(WHOLE)
    assert found.workspaces == (WorkspaceSettings(workspace="acme", timezone="Europe/Amsterdam"),)
    assert found.notes == ()
    assert found.budgets == (
        Budget(
            id="research-agents",
            version=1,
            scope="agent:acme/research/*",
            timezone="Europe/Amsterdam",
            unknown_model="deny",
            shadow=True,
            grace_s=5_400,
            note="agreed on Monday",
            caps=[
                Cap(
                    id="day-spend",
                    unit="nano-USD",
                    amount=50_000_000_000,
                    window=WindowSpec(kind="day"),
                    warn=[5_000, 8_000],
                    degrade=DegradeRule(
                        at=9_000, models={"claude-opus-4-6": "claude-haiku-4-5"}, max_output_tokens=512
                    ),
                ),
                Cap(
                    id="rolling-90m-tokens",
                    unit="tokens",
                    amount=5_000_000,
                    window=WindowSpec(kind="rolling", rolling_s=5_400),
                    warn=[7_500],
                    halt=False,
                ),
            ],
        ),
    )


def test_what_is_left_out_has_the_defaults_of_the_wire_model_and_the_zone_of_the_workspace() -> None:
    text = "version: 1\nworkspaces: {acme: {timezone: Asia/Tokyo}}\n" + one_cap().partition("\n")[2]
    (budget,) = read(text).budgets
    expected = Budget(
        id="b",
        version=1,
        scope="agent:acme/research/*",
        timezone="Asia/Tokyo",
        caps=[Cap(id="day-usd", unit="nano-USD", amount=50 * 10**9, window=WindowSpec(kind="day"))],
    )
    assert budget == expected


def test_a_workspace_that_was_applied_before_gives_its_zone() -> None:
    found = parse(one_cap(), name="budgets.yaml", zones={"acme": "America/New_York"})
    assert found.budgets[0].timezone == "America/New_York"
    assert read(one_cap()).budgets[0].timezone == "UTC"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("50 USD", (50 * 10**9, "nano-USD")),
        ("0.25 USD", (250_000_000, "nano-USD")),
        ("0.000000001 USD", (1, "nano-USD")),
        ("1.1000000000 USD", (1_100_000_000, "nano-USD")),
        ("2.5k USD", (2_500 * 10**9, "nano-USD")),
        ("1_000_000 tokens", (1_000_000, "tokens")),
        ("250k tokens", (250_000, "tokens")),
        ("5M tokens", (5_000_000, "tokens")),
        ("1.5M tokens", (1_500_000, "tokens")),
        ("2B tokens", (2_000_000_000, "tokens")),
        ("9223372036.854775807 USD", (2**63 - 1, "nano-USD")),
    ],
)
def test_an_amount_is_exact(text: str, expected: tuple[int, str]) -> None:
    (cap,) = read(one_cap(amount=text)).budgets[0].caps
    assert (cap.amount, cap.unit) == expected


@given(st.integers(min_value=1, max_value=2**63 - 1), st.sampled_from(["tokens", "nano-USD"]))
def test_an_amount_written_and_read_again_is_the_same(value: int, unit: str) -> None:
    text = amount_text(value, unit)
    assert amount(text, "USD") == (value, unit)
    scale = 1 if unit == "tokens" else 10**9
    assert Fraction(text.split()[0]) == Fraction(value, scale)


@pytest.mark.parametrize(
    ("text", "problem", "instead"),
    [
        ("50", "has no unit", "write 50 USD or 50 tokens"),
        ("50USD", "has no space before its unit", "write 50 USD"),
        ("$50", "has a currency sign", "write 50 USD"),
        ("50 usd", "the unit 'usd' is unknown", "write USD"),
        ("50 EUR", "the price book is in USD: nothing is converted", "write the amount in USD, or in tokens"),
        ("5m tokens", "the multiple 'm' of '5m tokens' is unknown", "M million"),
        ("5 token", "the unit 'token' is unknown", "write tokens"),
        ("1,000 USD", "has a comma", "1_000 USD"),
        ("0.0000000001 USD", "finer than 0.000000001 USD", "at most 9"),
        ("0.5 tokens", "finer than a whole token", "fewer decimals"),
        ("0 USD", "the amount is zero", "above zero"),
        ("-5 USD", "is not an amount", "50 USD"),
        ("1e3 USD", "is not an amount", "50 USD"),
        ("9223372036.854775808 USD", "too large", "9223372036.854775807 USD"),
        ("99999999999999999999999999999999999999999999 USD", "is not an amount", ""),
        ("\u0665\u0660 USD", "is not an amount", ""),  # digits, and not those of this file
        ("[50, USD]", "expected one value, found a list", "write 50 USD"),
        ("", "is empty", "write 50 USD"),
    ],
)
def test_a_wrong_amount_says_what_to_write(text: str, problem: str, instead: str) -> None:
    (fault,) = faults(one_cap(amount=text))
    assert fault.startswith("7:17: " if text else "7:16: ")
    assert "budgets[0].caps[0].amount" in fault
    assert problem in fault
    assert instead in fault


def test_another_currency_is_right_when_the_price_book_has_it() -> None:
    (cap,) = read(one_cap(amount="50 EUR"), currency="EUR").budgets[0].caps
    assert (cap.id, cap.unit) == ("day-eur", "nano-EUR")


@pytest.mark.parametrize(
    ("window", "kind", "rolling_s", "cap_id"),
    [
        ("hour", "hour", None, "hour-usd"),
        ("week", "week", None, "week-usd"),
        ("month", "month", None, "month-usd"),
        ("rolling 5m", "rolling", 300, "rolling-5m-usd"),
        ("rolling 60m", "rolling", 3_600, "rolling-1h-usd"),
        ("rolling 24h", "rolling", 86_400, "rolling-24h-usd"),
    ],
)
def test_a_window_is_read(window: str, kind: str, rolling_s: int | None, cap_id: str) -> None:
    (cap,) = read(one_cap(window=window)).budgets[0].caps
    assert (cap.window.kind, cap.window.rolling_s, cap.id) == (kind, rolling_s, cap_id)


@pytest.mark.parametrize(
    ("lines", "problem", "instead"),
    [
        ({"window": "daily"}, "the window 'daily' is unknown", "write day"),
        ({"window": "dya"}, "the window 'dya' is unknown", "write day"),
        ({"window": "90m"}, "the window '90m' is unknown", "write rolling 90m"),
        ({"window": "rolling"}, "has no length", "rolling 30m"),
        ({"window": "rolling 3m"}, "not between 5m and 24h", "write rolling 5m"),
        ({"window": "rolling 25h"}, "not between 5m and 24h", "write rolling 24h"),
        ({"window": "rolling 330s"}, "in whole minutes", "write rolling 5m"),
        ({"window": "run"}, "window run needs a scope run:...", "write scope: run:workspace/*"),
        ({"warn": "[0.8]"}, "'0.8' is not per cent of the cap", "write 80%"),
        ({"warn": "[80]"}, "'80' is not per cent of the cap", "write 80%"),
        ({"warn": "[101%]"}, "not between 0.01% and 100%", "the cap itself is 100%"),
        ({"warn": "[50%, 50.0%]"}, "50% stands twice", "keep one"),
        ({"timezone": "Amsterdam"}, "the time zone 'Amsterdam' is unknown", "write Europe/Amsterdam"),
        ({"timezone": "europe/amsterdam"}, "is unknown", "write Europe/Amsterdam"),
        ({"timezone": "../../etc/passwd"}, "is unknown", "IANA name"),
        ({"unknown_model": "cieling"}, "'cieling' is unknown", "write ceiling"),
        ({"shadow": "maybe"}, "neither true nor false", "write true or false"),
        ({"grace": "30"}, "not a length of time", "write 30m or 30h"),
        ({"grace": "8d"}, "longer than 7 days", "at most 7d"),
        ({"scope": "agent:acme/*"}, "has 2 segments, a scope agent has 3", "write agent:acme/*/*"),
        ({"scope": "agent:acme/**"}, "** in 'agent:acme/**': a * stays inside its segment", "agent:acme/*/*"),
        ({"scope": "team:acme/a/b"}, "has 3 segments, a scope team has 2", "write team:acme/a"),
        ({"scope": "acme/research/*"}, "does not start with workspace:", "agent:acme/research/*"),
        ({"scope": "agnet:acme/r/p"}, "does not start with workspace:", "write agent"),
        ({"scope": "agent:acme/research/ada@example.com"}, "matches no name", "letters, digits"),
    ],
)
def test_a_wrong_value_says_what_to_write(lines: dict[str, str], problem: str, instead: str) -> None:
    (fault,) = faults(one_cap(**lines))
    assert problem in fault
    assert instead in fault


def test_every_mistake_is_told_at_once_with_its_line_and_column() -> None:
    text = """\
version: 2
budgets:
  - id: a b
    scop: agent:acme/research/*
    scope: agent:acme/*
    caps:
      - amount: $50
        windw: day
      - amount: 1 USD
        window: day
        amount: 2 USD
  - id: other
"""
    assert [(fault.line, fault.column, fault.path) for fault in _faults(text)] == [
        (1, 10, "version"),
        (3, 9, "budgets[0].id"),
        (4, 5, "budgets[0]"),
        (5, 12, "budgets[0].scope"),
        (7, 9, "budgets[0].caps[0].window"),
        (7, 17, "budgets[0].caps[0].amount"),
        (8, 9, "budgets[0].caps[0]"),
        (11, 9, "budgets[0].caps[1]"),
        (12, 5, "budgets[1].caps"),
        (12, 5, "budgets[1].scope"),
    ]


def _faults(text: str) -> list:
    with pytest.raises(BudgetFileError) as caught:
        read(text)
    return caught.value.faults


@pytest.mark.parametrize(
    ("key", "instead"),
    [("limit", "write amount"), ("period", "write window"), ("amout", "write amount"), ("xyzzy", "one of: id, amount")],
)
def test_an_unknown_key_of_a_cap_names_the_known_one(key: str, instead: str) -> None:
    (fault,) = faults(one_cap() + f"        {key}: 1\n")
    assert f"unknown key '{key}'" in fault
    assert instead in fault


def test_two_budgets_of_one_id_are_a_mistake_that_names_the_first_line() -> None:
    second = one_cap().partition("budgets:\n")[2]
    (fault,) = faults(one_cap() + second)
    assert "the id 'b' stands already in line 3" in fault


def test_two_caps_that_would_have_one_id_are_a_mistake() -> None:
    (fault,) = faults(one_cap() + "      - {amount: 60 USD, window: day}\n")
    assert "two caps of this budget are called 'day-usd'" in fault


def test_a_degrade_that_asks_for_nothing_is_a_mistake_and_one_below_a_warn_is_not() -> None:
    (fault,) = faults(one_cap() + "        degrade: {at: 90%}\n")
    assert "asks for nothing" in fault
    (cap,) = read(one_cap(warn="80%") + "        degrade: {at: 50%, max_output_tokens: 512}\n").budgets[0].caps
    assert (cap.warn, cap.degrade) == ([8_000], DegradeRule(at=5_000, max_output_tokens=512))


def test_words_that_yaml_takes_for_booleans_or_dates_are_names_when_a_name_is_meant() -> None:
    found = read(one_cap().replace("id: b", "id: no").replace("agent:acme/research/*", "workspace:2026-11-23"))
    assert (found.budgets[0].id, found.budgets[0].scope) == ("no", "workspace:2026-11-23")


def test_a_window_in_another_zone_than_the_workspace_keeps_is_a_note() -> None:
    text = WHOLE.replace("timezone: Europe/Amsterdam  ", "timezone: Asia/Tokyo  ")
    (note,) = read(text).notes
    assert note.line == 13
    assert "its day is that of Asia/Tokyo, while the workspace keeps Europe/Amsterdam" in str(note)
    assert "counts from when it is applied" in str(note)


def test_a_cap_that_does_nothing_is_a_note() -> None:
    (note,) = read(one_cap() + "        halt: off\n").notes
    assert "it only shows" in str(note)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the file is empty"),
        ("# nothing\n", "the file is empty"),
        ("just words", "expected keys and values, found the value 'just words'"),
        ("version: 1\nbudgets:\n\t- id: b\n", "indent with spaces, not with a tab"),
        ("version: 1\nbudgets: [", "not YAML"),
        ("version: 1: 2", "mapping values are not allowed here"),
        ("version: 1\n---\nversion: 1\n", "remove the second '---'"),
        ("version: 1\x00", "U+0000 may not be in a YAML file"),
        ("[" * 200_000, "more than 12 levels of nesting"),
        ("{a: " * 60_000, "more than 12 levels of nesting"),
        ("a: &a x\nb: [" + "*a, " * 200 + "]", "more than 100 aliases"),
        ("x" * (TEXT_CHARS_MAX + 1), "more than 262,144 characters"),
        ("a: [" + "1," * 60_000 + "]", "more than 50,000 values"),
        ("a: &a [*a]", "unknown key 'a'"),
        ("version: !!python/object/apply:os.system [id]", "expected one value"),
        ("version: !!python/name:os.system x", "the tag 'tag:yaml.org,2002:python/name:os.system' is not read"),
        ("version: 1\nbudgets: {a: 1}", "expected a list, found keys and values"),
        ("version: 1\nbudgets: [1]", "expected keys and values, found the value '1'"),
        ("version: 1\n<<: {a: 1}\nbudgets: []", "merge keys (<<) are not read"),
        ('version: "\\UFFFFFFFF"', "not YAML"),
        ("version: 1\n? [a]\n: b\nbudgets: []", "a key must be a plain word"),
    ],
)
def test_a_text_that_is_no_budget_file_is_told_quickly_and_without_a_crash(text: str, says: str) -> None:
    started = time.monotonic()
    assert any(says in fault for fault in faults(text))
    assert time.monotonic() - started < 5


@given(st.text(alphabet="abc:-[]{}&*!|>'\"%#?, \n\t0189", max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        read(text)
    except BudgetFileError as error:
        assert error.faults  # noqa: PT017 - most texts are refused, a few may be read


def test_a_nested_alias_bomb_is_walked_by_shape_and_not_by_size() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 45))
    started = time.monotonic()
    assert len(faults(f"version: 1\nbudgets: []\n{bomb}")) == 45
    assert time.monotonic() - started < 5


def test_the_number_of_mistakes_that_are_told_is_bounded() -> None:
    text = "version: 1\nbudgets:\n" + "  - {}\n" * 500
    assert len(faults(text)) == FAULTS_MAX


def test_a_version_is_kept_when_nothing_changed_and_grows_when_something_did() -> None:
    (new,) = read(one_cap()).budgets
    then = datetime(2026, 11, 1, tzinfo=UTC)
    current = new.model_copy(update={"version": 7, "applied_at": then})
    assert with_versions([new], {}) == [new]
    assert with_versions([new], {"b": current}) == [current]
    (raised,) = read(one_cap(amount="60 USD")).budgets
    (bumped,) = with_versions([raised], {"b": current})
    assert (bumped.version, bumped.applied_at, bumped.caps) == (8, None, raised.caps)


def test_a_budget_is_dumped_as_one_line_that_a_person_reads() -> None:
    assert dump(read(WHOLE).budgets[0]) == (
        "research-agents v1  agent:acme/research/*  50 USD a day: warn 50% 80%, degrade 90%, halt; "
        "5000000 tokens rolling 90m: warn 75%, no halt  (Europe/Amsterdam, unknown models: deny, shadow)"
    )


def test_a_file_on_disk_is_read_or_its_fault_said(tmp_path: Path) -> None:
    path = tmp_path / "budgets.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + WHOLE.encode())
    assert load(path) == read(WHOLE)
    path.write_bytes(b"version: \xff")
    with pytest.raises(BudgetFileError, match="the file is not UTF-8"):
        load(path)
    with pytest.raises(BudgetFileError, match="cannot be read: No such file"):
        load(tmp_path / "none.yaml")
