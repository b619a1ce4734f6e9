"""The roles of `sql/roles`: as SQL for a server, and as the grants of the embedded engine's only user."""

import re
from collections.abc import Iterator
from typing import Final

from spendfuse.audit.files import SqlMissingError, sql_directory

ROLES: Final = ("migrator", "writer", "reader", "auditor", "operator")
_GRANT: Final = re.compile(r"GRANT\s+(?P<rights>.+?)\s+ON\s+(?P<what>\S+)\s+TO\s+spendfuse_\w+", re.DOTALL)
_COMMENT: Final = re.compile(r"^--[^\n]*\n", re.MULTILINE)


def statements(role: str, database: str) -> Iterator[str]:
    """Yield the statements that make a role on a server; raises SqlMissingError."""
    path = sql_directory() / "roles" / f"{role}.sql"
    if role not in ROLES or not path.is_file():
        raise SqlMissingError(f"there is no role {role!r}: there are {', '.join(ROLES)}")
    for statement in _COMMENT.sub("", path.read_text(encoding="utf-8")).split(";"):
        if statement.strip():
            yield statement.strip().replace("${DB}", database)


def grants(role: str, database: str) -> list[str]:
    """Return a role's rights as `GRANT ... ON ...`, for users.xml, which gives them to the user they stand in."""
    found = (_GRANT.fullmatch(statement) for statement in statements(role, database))
    return [f"GRANT {' '.join(match['rights'].split())} ON {match['what']}" for match in found if match]
