"""The short cut for validated values: what it makes is what validation would have made."""

import pytest

from factories import meter, packed, usage
from spendfuse.adapters import price_book_file
from spendfuse.engine.policies import Policies
from spendfuse.engine.prices import PriceBook
from spendfuse.wire.base import WireModel, encode
from spendfuse.wire.ledger import Charge, LedgerBatch, LedgerEntry


@pytest.mark.parametrize("model", [Charge, LedgerEntry])
def test_an_entry_of_the_meter_names_every_field_and_survives_validation(model: type[WireModel]) -> None:
    book = PriceBook.compile(price_book_file.shipped())
    outcome = meter().apply([packed(usage(), 0)], Policies(), book, 1_794_592_800_000_000)
    (entry,) = outcome.entries
    made = entry if model is LedgerEntry else entry.charge
    assert made is not None
    assert set(made.__dict__) == set(model.model_fields)
    again = LedgerBatch.model_validate_json(encode(LedgerBatch(entries=[entry]))).entries[0]
    assert again == entry
