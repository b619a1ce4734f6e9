"""The price book that ships with spendfuse, for a guard to price a call before it starts.

The worker's own prices decide; a guard whose worker has a book of its own, or overrides, is given that book.
"""

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Final

from spendfuse.engine.prices import PriceBook
from spendfuse.wire.prices import PriceBookFile

_FOLDERS: Final = (
    files("spendfuse").joinpath("data/schemas/pricebook"),
    Path(__file__).resolve().parents[3] / "schemas/pricebook",
)


@cache
def shipped_book() -> PriceBook:
    """Return the newest price book that ships, read once for each process.

    Raises FileNotFoundError when none does.
    """
    for folder in _FOLDERS:
        books = sorted(
            (file for file in folder.iterdir() if file.name.endswith(".json")) if folder.is_dir() else (),
            key=lambda file: file.name,
        )
        if books:
            return PriceBook.compile(PriceBookFile.model_validate_json(books[-1].read_bytes()))
    raise FileNotFoundError("no price book ships with this spendfuse: install it again, or give Guard a price_book")
