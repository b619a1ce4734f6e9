"""Write the README's tables of commands and settings from the code, or check that they are current.

python docs/tables.py [--check]
"""

import argparse
import difflib
import re
import sys
from pathlib import Path

import typer.main

from spendfuse import settings
from spendfuse.cli.app import app

README = Path(__file__).resolve().parents[1] / "README.md"
GROUPS = (
    settings.BrokerSettings,
    settings.IdentitySettings,
    settings.MeterSettings,
    settings.SubjectSettings,
    settings.GuardSettings,
    settings.WorkerSettings,
    settings.AuditSettings,
    settings.ClockSettings,
)


def commands() -> str:
    """Return the table of commands, with the first sentence of each one's help."""
    lines = ["| command | what it does |", "|---|---|"]
    root = typer.main.get_command(app)
    for name, command in root.commands.items():  # type: ignore[attr-defined]  # the root is a group
        found = getattr(command, "commands", None)
        for path, each in [(f"{name} {sub}", inner) for sub, inner in found.items()] if found else [(name, command)]:
            words = " ".join((each.help or "").split("\n\n")[0].split())
            lines.append(f"| `spendfuse {path}` | {words} |")
    return "\n".join(lines)


def environment() -> str:
    """Return the table of settings."""
    lines = ["| variable | default | what it is |", "|---|---|---|"]
    for group in GROUPS:
        for name, default, what in group.table():
            shown = "required" if default == "required" else f"`{default}`" if default else "empty"
            lines.append(f"| `{name}` | {shown} | {what} |")
    return "\n".join(lines)


def current(text: str) -> str:
    """Return the README with both tables as they should be."""
    for name, table in (("commands", commands()), ("settings", environment())):
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no place for the table of {name}: <!-- {name} --> ... <!-- /{name} -->")
        text = pattern.sub(lambda match, table=table: match[1] + table + "\n" + match[2], text)
    return text


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is not current")
    given = parser.parse_args()
    was = README.read_text(encoding="utf-8")
    now = current(was)
    if given.check and was != now:
        sys.stderr.writelines(
            difflib.unified_diff(was.splitlines(True), now.splitlines(True), "README.md", "as it should be")
        )
        sys.stderr.write("run: make generate\n")
        return 1
    if not given.check:
        README.write_text(now, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
