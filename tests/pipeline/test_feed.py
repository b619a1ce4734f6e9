"""What the worker takes from the compacted topics, and what it refuses with a reason."""

from spendfuse.adapters import price_book_file
from spendfuse.pipeline.feed import PolicyFeed
from spendfuse.wire.base import encode
from spendfuse.wire.budget import Budget, Cap, WindowSpec


def budget(unit: str, amount: int = 1) -> bytes:
    cap = Cap(id="day", unit=unit, amount=amount, window=WindowSpec(kind="day"))
    return encode(Budget(id="b", version=1, scope="agent:acme/research/*", caps=[cap]))


def test_a_cap_in_a_currency_the_price_book_does_not_have_is_refused_and_what_was_in_force_stays() -> None:
    feed = PolicyFeed(price_book_file.shipped())
    assert feed.budget_record(b"b", budget("nano-USD", 5)) is None
    refused = feed.budget_record(b"b", budget("nano-EUR", 9))
    assert refused is not None
    assert "nano-EUR" in refused
    assert "USD" in refused
    assert feed.policies.budgets["b"].caps[0].amount == 5


def test_a_cap_in_tokens_needs_no_currency() -> None:
    feed = PolicyFeed(price_book_file.shipped())
    assert feed.budget_record(b"b", budget("tokens")) is None
    assert set(feed.policies.budgets) == {"b"}
