"""The quick way of a usage against the models: what it accepts they accept, with the same values and the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from factories import book, call, packed, row, usage
from spendfuse.engine.call import Call
from spendfuse.engine.ids import SeenIds
from spendfuse.engine.meter import PartitionMeter
from spendfuse.engine.policies import Policies
from spendfuse.pipeline import quick
from spendfuse.pipeline.ledger_text import charged_texts
from spendfuse.wire.base import encode, to_us
from spendfuse.wire.ledger import LedgerEntry
from spendfuse.wire.packed import Packed
from spendfuse.wire.usage import Usage, decode_usages

EXAMPLES = Path(__file__).parents[2] / "schemas" / "examples"
GOOD: dict[str, Any] = json.loads(encode(usage(tags={"cost_center": "R&D"}, workflow="nightly", source="test/1")))
FIELDS = [*Usage.model_fields, "unknown"]
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2**40), st.floats(), st.text(max_size=130), st.just({}), st.just([]),
    st.sampled_from(
        [
            "a\n", "", "é", "a" * 64, "a" * 65, "a" * 128, "a" * 129, "x@y.z", "-a", "\x7f", "\u2028", "\u0661",
            "2026-11-23T10:00:00Z", "2026-11-23T10:00:00.5Z", "2026-11-23T10:00:00.123Z", "2026-11-23T10:00:00.123456Z",
            "2026-11-23T10:00:00.1234567Z", "2026-11-23T10:00:00,123456Z", "2026-11-23 10:00:00Z", "20261123T100000Z",
            "2026-W48-1T10:00:00Z", "2026-11-23T24:00:00Z", "2026-11-23T10:00:60Z", "2026-02-30T10:00:00Z",
            "2026-11-23t10:00:00z", "2026-11-23T10:00:00+01:00", "1969-12-31T23:59:59Z", "1970-01-01T00:00:00Z",
            "9998-12-31T23:59:59Z", "9999-01-01T00:00:00Z", "2026-11-23T10:00:00.\u0661\u0662\u0663Z",
            "2026-11-23T10:00Z", "started", "progress", "finished", "standard", "1", "batch",
        ]
    ),
    st.dictionaries(st.text(max_size=3), st.text(max_size=3) | st.integers(), max_size=20),
)  # fmt: skip
COUNTS = st.one_of(st.integers(-1, 10**9 + 1), st.floats(0, 10), st.booleans(), st.text(max_size=2), st.none())
TOKENS = st.dictionaries(
    st.sampled_from(["input", "cache_read", "cache_write_5m", "cache_write_1h", "output", "reasoning", "total"]), COUNTS
)


@st.composite
def altered(draw: st.DrawFn) -> dict[str, Any]:
    """A good usage with some of its fields made odd, or left out."""
    made = dict(GOOD)
    for name in draw(st.lists(st.sampled_from(FIELDS), max_size=3)):
        if draw(st.booleans()):
            made.pop(name, None)
        else:
            made[name] = draw(TOKENS if name == "tokens" else ODD)
    if draw(st.booleans()):
        made["kind"] = draw(st.sampled_from(["started", "progress"]))
    return made


def agrees(value: bytes) -> bool:
    """Hold the quick way to the models; say whether it answered."""
    found = quick.usages(value)
    if found is None:
        return False
    models = decode_usages(value)  # raises where the quick way has accepted what is at fault
    assert [quick.encode(each.usage) for each in found] == [encode(model) for model in models]
    for (_, who, ts_us, deadline_us), model in zip(found, models, strict=True):
        assert who == Call.of(packed(model, 0)).who
        assert ts_us == to_us(model.ts)
        assert deadline_us == (to_us(model.deadline) if model.deadline else None)
    return True


@settings(max_examples=1_500, deadline=None)
@given(altered())
def test_what_the_quick_way_accepts_the_models_accept_with_the_same_values(made: dict[str, Any]) -> None:
    text = json.dumps(made).encode()
    accepted = agrees(text)
    agrees(b'{"v":1,"usages":[' + text + b"," + json.dumps(GOOD).encode() + b"]}")
    if not accepted and text == json.dumps(GOOD).encode():
        raise AssertionError("the plainest usage takes the quick way, or nobody is served by it")


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b'{"usages":[]}')
@example(b"\x00\x00\x00\x00\x07" + json.dumps(GOOD).encode())
@example(json.dumps(GOOD).encode()[:-1] + b',"id":"twice"}')
@example(json.dumps(GOOD | {"source": "\ud800"}).encode())
@example(b"[" * 5_000)
def test_any_bytes_get_the_same_answer_or_none(value: bytes) -> None:
    agrees(value)
    calls = quick.calls(value)
    assert calls is None or len(calls) == len(Packed.model_validate_json(value).usages)


@pytest.mark.parametrize("path", sorted((EXAMPLES / "valid").glob("usage*.json")), ids=lambda path: path.name)
def test_the_valid_examples_agree(path: Path) -> None:
    agrees(path.read_bytes())


@pytest.mark.parametrize("path", sorted((EXAMPLES / "invalid").glob("usage*.json")), ids=lambda path: path.name)
def test_no_invalid_example_takes_the_quick_way(path: Path) -> None:
    with pytest.raises(ValidationError):
        decode_usages(path.read_bytes())
    assert quick.usages(path.read_bytes()) is None


@settings(max_examples=300, deadline=None)
@given(altered(), st.integers(-1, 2**47), st.integers(-1, 2**16), st.integers(-2, 2**40))
def test_a_packed_call_is_the_one_the_models_make(made: dict[str, Any], offset: int, nth: int, t: int) -> None:
    value = json.dumps({"usages": [{"p": 3, "o": offset, "i": nth, "t": t, "u": made}]}).encode()
    found = quick.calls(value)
    if found is None:
        return
    (model,) = Packed.model_validate_json(value).usages
    (got,), wanted = found, Call.of(model)
    assert got._replace(used=wanted.used) == wanted
    assert (got.used.id, got.used.kind, got.used.provider, got.used.model, got.used.tier) == (
        model.u.id, model.u.kind, model.u.provider, model.u.model, model.u.tier,
    )  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 10**9), st.sampled_from(["known", "strange"])), min_size=1))
def test_the_ledgers_text_of_a_charge_is_what_its_model_writes(spent: list[tuple[int, int, str]]) -> None:
    """Over charges, duplicates and unknown models, byte for byte."""
    calls = [
        call(usage(nth, output=output, model=model, tags={"q": '"\\é'}), offset, t=5)
        for offset, (nth, output, model) in enumerate(spent)
    ]
    outcome = PartitionMeter(0, lambda _: None, SeenIds()).apply(calls, Policies(), book(row()), 1_794_592_800_000_001)
    texts = charged_texts(outcome.charged)
    assert texts == [encode(entry) for entry in outcome.entries]
    assert [LedgerEntry.model_validate_json(text) for text in texts] == outcome.entries
    assert len(texts) == len(spent)


def test_names_without_end_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "NAMES_MAX", 100)
    monkeypatch.setattr(quick, "SECONDS_MAX", 100)
    for nth in range(500):
        assert quick.usages(encode(usage(nth, run=f"r{nth}", ts_us=1_794_592_800_000_000 + nth * 1_000_000)))
    assert len(quick._names) <= 100
    assert len(quick._seconds) <= 100
