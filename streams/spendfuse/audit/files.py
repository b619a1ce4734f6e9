"""Where the SQL lies: `sql/` at the top of the repository, `spendfuse/data/sql` in an installed wheel."""

import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final

_PARENTS_TO_ROOT: Final = 3
_QUERY_NAME: Final = re.compile(r"(?:[a-z][a-z0-9_]{0,63}/)?[a-z][a-z0-9_]{0,63}")


class SqlMissingError(Exception):
    """The SQL files, or one of them, are not where they belong."""


def sql_directory() -> Traversable:
    """Return the directory that holds `migrations/` and `queries/`; raises SqlMissingError."""
    installed = files("spendfuse") / "data" / "sql"
    if (installed / "migrations").is_dir():
        return installed
    checkout = Path(__file__).resolve().parents[_PARENTS_TO_ROOT] / "sql"
    if (checkout / "migrations").is_dir():
        return checkout
    raise SqlMissingError("the SQL files are neither in the installed package nor in a checkout: reinstall spendfuse")


def query_text(name: str) -> str:
    """Return the text of `queries/<name>.sql` (or `folder/name`); raises SqlMissingError, naming those there are."""
    *folder, file = name.split("/")
    directory = (sql_directory() / "queries").joinpath(*folder) if _QUERY_NAME.fullmatch(name) else sql_directory()
    path = directory / f"{file}.sql"
    if not _QUERY_NAME.fullmatch(name) or not path.is_file():
        raise SqlMissingError(f"there is no query {name[:100]!r}: there are {', '.join(_query_names())}")
    return path.read_text(encoding="utf-8")


def _query_names() -> list[str]:
    names = []
    for entry in (sql_directory() / "queries").iterdir():
        inside = [(f"{entry.name}/", each) for each in entry.iterdir()] if entry.is_dir() else [("", entry)]
        names += [folder + each.name.removesuffix(".sql") for folder, each in inside if each.name.endswith(".sql")]
    return sorted(names)
