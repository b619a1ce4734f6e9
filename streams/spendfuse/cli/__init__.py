"""The command line: `spendfuse --help`. Each command imports what it needs when it runs."""

import sys

EXIT_SETTINGS = 64  # typing alone costs as much as `guard check`


def main() -> None:
    """Run the command line and end the process with its exit code."""
    if sys.argv[1:3] == ["guard", "check"] and not {"-h", "--help"} & set(sys.argv):
        from spendfuse.cli.guard_check import main as check

        sys.exit(check(sys.argv[3:]))  # hooks ask before every step: typer alone would cost ten times the answer
    try:
        from spendfuse.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"typer", "rich"}:
            raise
        sys.stderr.write(f"spendfuse: {error.name} is not installed: pip install 'spendfuse[cli]'\n")
        sys.exit(EXIT_SETTINGS)
    app(prog_name="spendfuse")


__all__ = ["main"]
