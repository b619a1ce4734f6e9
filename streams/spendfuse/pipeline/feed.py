"""Budgets and prices in force, followed live from their compacted topics."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from spendfuse.adapters import price_book_file
from spendfuse.engine.policies import Policies
from spendfuse.engine.prices import PriceBook
from spendfuse.pipeline.intake import reason
from spendfuse.settings import WorkerSettings
from spendfuse.wire.budget import Budget, WorkspaceSettings
from spendfuse.wire.prices import PriceBookFile, PriceOverride

BUDGETS_MAX: Final = 100_000
OVERRIDES_MAX: Final = 10_000
WORKSPACE_KEY: Final = "workspace/"
_BUDGET_RECORD: Final[TypeAdapter[Budget | WorkspaceSettings]] = TypeAdapter(Budget | WorkspaceSettings)


def price_book_of(settings: WorkerSettings) -> PriceBookFile:
    """Return the price book of the settings, else the one that ships; raises `PriceBookError`."""
    if not settings.price_book_file:
        return price_book_file.shipped()
    return price_book_file.load(Path(settings.price_book_file))


def budget_key(record: Budget | WorkspaceSettings) -> str:
    """Return the Kafka key of a record of `budgets.v1`."""
    return record.id if isinstance(record, Budget) else WORKSPACE_KEY + record.workspace


def decode_budget(key: bytes | None, value: bytes) -> Budget | WorkspaceSettings:
    """Return a record of `budgets.v1`.

    Raises `ValueError` (a `ValidationError` is one) with what is wrong.
    """
    record = _BUDGET_RECORD.validate_json(value)
    if key is None or key.decode("utf-8", "replace") != budget_key(record):
        raise ValueError(f"the key of a budgets.v1 record must be {budget_key(record)!r}")
    return record


def decode_price(key: bytes | None, value: bytes) -> PriceOverride:
    """Return a record of `prices.v1`.

    Raises `ValueError` (a `ValidationError` is one) with what is wrong.
    """
    override = PriceOverride.model_validate_json(value)
    if key is None or key.decode("utf-8", "replace") != override.id:
        raise ValueError(f"the key of a prices.v1 record must be its id, {override.id!r}")
    return override


class PolicyFeed:
    """What the compacted topics say now: `policies` and `book` are replaced as a whole after each change.

    They are compiled when they are next asked for: reading ten thousand budgets at the start compiles them once.

    A record that cannot be read is refused and what was in force stays in force.
    """

    def __init__(self, book_file: PriceBookFile, on_change: Callable[[], None] = lambda: None) -> None:
        """Start with a price book and no budgets."""
        self.on_change = on_change
        self._policies: Policies | None = None
        self._book: PriceBook | None = None
        self._file = book_file
        self._budgets: dict[str, Budget] = {}
        self._workspaces: dict[str, WorkspaceSettings] = {}
        self._overrides: dict[str, PriceOverride] = {}

    @property
    def policies(self) -> Policies:
        """Return the budgets in force."""
        if self._policies is None:
            self._policies = Policies(self._budgets.values(), self._workspaces.values())
        return self._policies

    @property
    def book(self) -> PriceBook:
        """Return the prices in force."""
        if self._book is None:
            self._book = PriceBook.compile(self._file, list(self._overrides.values()))
        return self._book

    def budget_record(self, key: bytes | None, value: bytes | None) -> str | None:
        """Take in one record of `budgets.v1`; return why it was refused, or None."""
        name = (key or b"").decode("utf-8", "replace")
        if value is None:
            known = self._budgets.pop(name, None)
            gone = None
            if name.startswith(WORKSPACE_KEY):
                gone = self._workspaces.pop(name.removeprefix(WORKSPACE_KEY), None)
            if known is not None or gone is not None:
                self._budgets_changed()
            return None
        try:
            record = decode_budget(key, value)
        except ValueError as error:
            return _sentence(error)
        if isinstance(record, WorkspaceSettings):
            self._workspaces[record.workspace] = record
        elif foreign := sorted({cap.unit for cap in record.caps} - {"tokens", f"nano-{self._file.currency}"}):
            return f"caps in {', '.join(foreign)}: the price book is in {self._file.currency}, so use that or tokens"
        elif len(self._budgets) >= BUDGETS_MAX and record.id not in self._budgets:
            return f"more than {BUDGETS_MAX} budgets: {record.id} is not in force"
        else:
            self._budgets[record.id] = record
        self._budgets_changed()
        return None

    def price_record(self, key: bytes | None, value: bytes | None) -> str | None:
        """Take in one record of `prices.v1`; return why it was refused, or None."""
        name = (key or b"").decode("utf-8", "replace")
        if value is None:
            changed = self._overrides.pop(name, None) is not None
        else:
            try:
                override = decode_price(key, value)
            except ValueError as error:
                return _sentence(error)
            if len(self._overrides) >= OVERRIDES_MAX and name not in self._overrides:
                return f"more than {OVERRIDES_MAX} price overrides: {name} is not in force"
            changed = self._overrides.get(name) != override
            self._overrides[name] = override
        if changed:
            self._book = None
            self.on_change()
        return None

    def _budgets_changed(self) -> None:
        self._policies = None
        self.on_change()


def _sentence(error: ValueError) -> str:
    return reason(error) if isinstance(error, ValidationError) else str(error)
