"""The command line: `spendfuse --help`. Each command imports what it needs when it runs."""

import sys
from typing import Final

EXIT_SETTINGS: Final = 64


def main() -> None:
    """Run the command line and end the process with its exit code."""
    try:
        from spendfuse.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"typer", "rich"}:
            raise
        sys.stderr.write(f"spendfuse: {error.name} is not installed: pip install 'spendfuse[cli]'\n")
        sys.exit(EXIT_SETTINGS)
    app(prog_name="spendfuse")


__all__ = ["main"]
