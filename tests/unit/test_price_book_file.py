"""A price book file is used only when it is whole: readable, of the right shape, and under its own hash."""

import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from spendfuse.adapters.price_book_file import FILE_BYTES_MAX, PriceBookError, load, parse, shipped, shipped_file
from spendfuse.engine.prices import PriceBook

ROOT = Path(__file__).parents[2]


def test_the_shipped_book_is_the_newest_file_and_compiles() -> None:
    book = shipped()
    names = sorted(path.stem for path in (ROOT / "schemas" / "pricebook").glob("*.json"))
    assert shipped_file().name == f"{names[-1]}.json"
    assert book.book == names[-1]
    assert date.fromisoformat(book.book)
    assert PriceBook.compile(book).knows("anthropic", "claude-sonnet-4-6")


def test_the_shipped_book_is_small_and_has_every_provider_that_agents_name() -> None:
    assert len(shipped_file().read_bytes()) < 1_500_000
    assert {row.provider for row in shipped().rows} == {
        "anthropic",
        "openai",
        "google",
        "mistral",
        "x-ai",
        "deepseek",
        "groq",
        "aws",
        "azure",
    }


def test_the_shipped_book_has_no_two_rows_for_one_model_tier_and_instant() -> None:
    spans: dict[tuple[str, str, str], list[Any]] = {}
    names: dict[tuple[str, str], set[str]] = {}
    for row in shipped().rows:
        spans.setdefault((row.provider, row.model, row.tier), []).append(row)
        for name in (row.model, *row.models):
            names.setdefault((row.provider, name), set()).add(row.model)
    for rows in spans.values():
        assert [row.valid_from for row in rows[1:]] == [row.valid_to for row in rows[:-1]]
        assert (rows[0].valid_from, rows[-1].valid_to) == (None, None)
    assert {key: models for key, models in names.items() if len(models) > 1} == {}


def test_the_shipped_book_is_what_its_builder_gives() -> None:
    pytest.importorskip("genai_prices", reason="genai-prices is not installed (extra: prices)")
    done = subprocess.run(
        [sys.executable, "schemas/build_price_book.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_row_changed_by_hand_is_refused_with_both_hashes_and_what_to_do() -> None:
    raw = json.loads(shipped_file().read_bytes())
    honest = raw["sha256"]
    raw["rows"][0]["rates"]["output"] = 0
    with pytest.raises(PriceBookError, match="changed after the book was made") as caught:
        parse(json.dumps(raw).encode(), name="mine.json")
    assert honest in str(caught.value)
    assert "mine.json" in str(caught.value)
    assert "override" in str(caught.value)


def test_the_hash_does_not_depend_on_how_the_file_is_laid_out() -> None:
    raw = json.loads(shipped_file().read_bytes())
    assert parse(json.dumps(raw, indent=3, sort_keys=True).encode(), name="mine.json") == shipped()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rows": []}, "rows: List should have at least 1 item"),
        ({"currency": "usd"}, "currency: String should match pattern"),
        ({"unit": "USD"}, "unit: Input should be 'nano-units per 1000000 tokens'"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
        ({"sha256": None}, "sha256: Input should be a valid string"),
    ],
)
def test_a_book_of_the_wrong_shape_says_which_field(change: dict[str, Any], says: str) -> None:
    raw = {**json.loads(shipped_file().read_bytes()), **change}
    with pytest.raises(PriceBookError) as caught:
        parse(json.dumps(raw).encode(), name="mine.json")
    assert says in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]", b"null", b"[" * 100_000])
def test_bytes_that_are_no_book_are_refused_without_a_crash(data: bytes) -> None:
    with pytest.raises(PriceBookError, match=r"mine\.json: not a price book"):
        parse(data, name="mine.json")


def test_many_faults_are_told_as_the_first_few_and_a_count() -> None:
    raw = json.loads(shipped_file().read_bytes())
    for row in raw["rows"][:50]:
        row["rates"]["input"] = -1
    with pytest.raises(PriceBookError, match="and 40 more") as caught:
        parse(json.dumps(raw).encode(), name="mine.json")
    assert "rows.0.rates.input: Input should be greater than or equal to 0" in str(caught.value)


def test_a_file_that_is_missing_or_too_large_is_said(tmp_path: Path) -> None:
    with pytest.raises(PriceBookError, match="cannot be read: No such file"):
        load(tmp_path / "none.json")
    large = tmp_path / "large.json"
    with large.open("wb") as file:
        file.truncate(FILE_BYTES_MAX + 10)
    with pytest.raises(PriceBookError, match="larger than"):
        load(large)
