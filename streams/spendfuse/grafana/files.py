"""The SQL of the panels: `sql/queries/grafana`, in a checkout or in an installed wheel."""

import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final, NamedTuple

_PARENTS_TO_ROOT: Final = 3
_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
_FOLDER: Final = ("queries", "grafana")


class PanelSqlError(Exception):
    """A panel's SQL file is missing or has no description."""


class PanelSql(NamedTuple):
    """A file's leading comment as one paragraph, and the statement under it as it stands."""

    description: str
    statement: str


def queries_directory() -> Traversable:
    """Return the directory of the panels' SQL; raises PanelSqlError."""
    for root in (files("spendfuse") / "data" / "sql", Path(__file__).resolve().parents[_PARENTS_TO_ROOT] / "sql"):
        directory = root.joinpath(*_FOLDER)
        if directory.is_dir():
            return directory
    raise PanelSqlError("the SQL of the panels is neither in the installed package nor in a checkout: reinstall")


def load(name: str) -> PanelSql:
    """Return the description and the statement of `<name>.sql`; raises PanelSqlError."""
    path = queries_directory() / f"{name}.sql"
    if not _NAME.fullmatch(name) or not path.is_file():
        raise PanelSqlError(f"there is no sql/queries/grafana/{name}.sql")
    lines = path.read_text(encoding="utf-8").splitlines()
    head = next((i for i, line in enumerate(lines) if not line.startswith("--")), len(lines))
    description = " ".join(line.removeprefix("--").strip() for line in lines[:head])
    statement = "\n".join(lines[head:]).strip()
    if not description or not statement:
        raise PanelSqlError(f"sql/queries/grafana/{name}.sql needs a comment at its top and a statement under it")
    return PanelSql(description, statement)
