"""Price book files: read, checked against their own hash, and found where they ship."""

import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from spendfuse.engine.prices import rows_sha256
from spendfuse.wire.prices import PriceBookFile

FILE_BYTES_MAX: Final = 16_777_216
"""Largest price book file that is read, in bytes."""
FAULTS_SHOWN_MAX: Final = 10
_IN_WHEEL: Final = "data/schemas/pricebook"
_IN_REPOSITORY: Final = "schemas/pricebook"
_BOOK_NAME: Final = re.compile(r"^[0-9a-z.-]{1,32}\.json$")


class PriceBookError(Exception):
    """A price book that cannot be used: which file, what is wrong, what to do."""


def parse(data: bytes, *, name: str) -> PriceBookFile:
    """Return the price book in some bytes; `name` says where they are from.

    Raises `PriceBookError` for bytes that are not a price book, and for rows that their `sha256` does not cover.
    """
    if len(data) > FILE_BYTES_MAX:
        raise PriceBookError(f"{name}: larger than {FILE_BYTES_MAX} bytes: not a price book")
    try:
        book = PriceBookFile.model_validate_json(data)
    except ValidationError as error:
        faults = error.errors(include_input=False, include_url=False, include_context=False)
        lines = [
            f"  {'.'.join(str(part) for part in fault['loc']) or 'file'}: {fault['msg']}"
            for fault in faults[:FAULTS_SHOWN_MAX]
        ]
        if len(faults) > FAULTS_SHOWN_MAX:
            lines.append(f"  and {len(faults) - FAULTS_SHOWN_MAX} more")
        raise PriceBookError(
            f"{name}: not a price book (schemas/json/price-book.v1.schema.json):\n{chr(10).join(lines)}"
        ) from error
    actual = rows_sha256(book.rows)
    if actual != book.sha256:
        raise PriceBookError(
            f"{name}: the rows have the hash {actual}, but the file says {book.sha256}: they were changed after the "
            "book was made. Take the file again from where it is from; for a price of your own, add an override."
        )
    return book


def load(path: Path) -> PriceBookFile:
    """Return the price book in a file. Raises `PriceBookError`, also for a file that cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise PriceBookError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse(data, name=str(path))


def shipped() -> PriceBookFile:
    """Return the newest price book that ships with spendfuse: in the wheel, or in the repository it runs from."""
    newest = shipped_file()
    return parse(newest.read_bytes(), name=newest.name)


def shipped_file() -> Traversable:
    """Return where the newest price book ships; books are named by date, so the last name is the newest."""
    repository = Path(__file__).resolve().parents[3]
    for folder in (files("spendfuse").joinpath(_IN_WHEEL), repository / _IN_REPOSITORY):
        if folder.is_dir():
            books = sorted(
                (file for file in folder.iterdir() if _BOOK_NAME.match(file.name)), key=lambda file: file.name
            )
            if books:
                return books[-1]
    raise PriceBookError(
        "no price book ships with this spendfuse: install it again, or set SPENDFUSE_PRICE_BOOK_FILE to a file"
    )
