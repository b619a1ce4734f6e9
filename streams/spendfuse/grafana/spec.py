"""What a dashboard is made of: rows, panels, variables, annotations; no word here of how Grafana writes them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from spendfuse.grafana.files import load

TIME_SERIES: Final = 0
TABLE: Final = 1
"""The two result formats of the ClickHouse plugin that are used; they are numbers in its queries."""

Viz = Literal["stat", "timeseries", "bargauge", "table"]


@dataclass(frozen=True, slots=True)
class Row:
    """The title of a row: the question its panels answer."""

    id: int
    title: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel: its query, how it is drawn, and how large (of 24 columns; a height unit is 30 pixels)."""

    id: int
    title: str
    query: str
    viz: Viz
    format: Literal[0, 1]
    width: int
    height: int
    unit: str
    calc: str = "lastNotNull"
    least_interval: str = ""
    thresholds: tuple[tuple[float | None, str], ...] = ((None, "blue"),)
    options: Mapping[str, Any] = field(default_factory=dict)
    field_config: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Field properties of single columns, by name."""

    @property
    def sql(self) -> str:
        """Return the statement, as it stands in its file."""
        return load(self.query).statement

    @property
    def description(self) -> str:
        """Return what the panel says, in words: the comment at the top of its file."""
        return load(self.query).description


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable that ClickHouse fills; one value, or several and All."""

    name: str
    label: str
    query: str
    several: bool

    @property
    def sql(self) -> str:
        """Return the statement, as it stands in its file."""
        return load(self.query).statement


@dataclass(frozen=True, slots=True)
class Annotation:
    """Marks on every graph."""

    name: str
    query: str
    color: str

    @property
    def sql(self) -> str:
        """Return the statement, as it stands in its file."""
        return load(self.query).statement
