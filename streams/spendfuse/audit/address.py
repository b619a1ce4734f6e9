"""Where the embedded ClickHouse's endpoint is: written by the audit process, read by everyone else on the machine."""

import json
import os
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError

ADDRESS_FILE: Final = "endpoint.json"
TOKEN_FILE: Final = "endpoint.token"  # noqa: S105 - a file's name
FILE_BYTES_MAX: Final = 4_096
READER: Final = "reader"


class AuditNotRunningError(Exception):
    """No audit process has said where its endpoint is."""


class Address(BaseModel):
    """A loopback URL, the user and database to ask for, and the token (in a file of its own, mode 0600)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    user: str
    database: str
    token: SecretStr

    def write(self, directory: Path) -> None:
        """Write both files, the token first, each as a whole."""
        _replace(directory / TOKEN_FILE, self.token.get_secret_value())
        _replace(directory / ADDRESS_FILE, json.dumps(self.model_dump(exclude={"token"}), indent=1) + "\n")


def read_address(directory: Path) -> Address:
    """Return the address the audit process wrote; raises AuditNotRunningError."""
    try:
        values = json.loads(_read(directory / ADDRESS_FILE))
        return Address.model_validate({**values, "token": _read(directory / TOKEN_FILE)})
    except FileNotFoundError as error:
        raise AuditNotRunningError(
            f"no audit process has its endpoint in {directory}: start one (python -m spendfuse.audit), "
            "or name its directory in SPENDFUSE_CHDB_DIR"
        ) from error
    except (OSError, ValueError, TypeError, ValidationError) as error:
        raise AuditNotRunningError(
            f"{directory / ADDRESS_FILE} cannot be used ({type(error).__name__}): restart the audit process"
        ) from error


def remove_address(directory: Path) -> None:
    """Remove both files."""
    for name in (ADDRESS_FILE, TOKEN_FILE):
        (directory / name).unlink(missing_ok=True)


def _read(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.read(FILE_BYTES_MAX)


def _replace(path: Path, text: str) -> None:
    # Created as 0600, not made so afterwards: between the two anybody could read it.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    partial.replace(path)
