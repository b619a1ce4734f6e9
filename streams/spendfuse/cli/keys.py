"""`spendfuse keys`: who may command."""

import os
from pathlib import Path
from typing import Annotated, Final

import typer

from spendfuse.cli.options import Json, command, examples

keys = typer.Typer(
    help="The keys that sign commands.", no_args_is_help=True, epilog=examples("spendfuse keys new --out keys")
)
SIGNING_FILE: Final = "signing.key"
PUBLIC_FILE: Final = "public.key"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(keys, new, "spendfuse keys new --out keys", "spendfuse keys new --out keys --kid 2026-11")
    app.add_typer(keys, name="keys")


def new(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory for the two files, each readable by you alone.")],
    kid: Annotated[str | None, typer.Option(help="Id of the key; made of the date by default.")] = None,
    as_json: Json = False,
) -> None:
    """Make a pair of Ed25519 keys: the worker's secret, and what guards check with.

    The private key is written to a file (0600) and never shown. Files that exist are never overwritten.
    """
    from datetime import UTC, datetime

    from spendfuse.cli import console
    from spendfuse.cli.faults import EXIT_SETTINGS, CliError, usage_error
    from spendfuse.client.keys import generate

    name = kid or f"key-{datetime.now(UTC):%Y-%m-%d}"
    try:
        private, public = generate(name)
    except ValueError as error:
        raise usage_error(str(error)) from error
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    signing_file, public_file = out / SIGNING_FILE, out / PUBLIC_FILE
    for path in (signing_file, public_file):
        if path.exists():
            raise CliError(
                f"{path} exists and is not overwritten: choose another --out, or move it away", EXIT_SETTINGS
            )
    _write(signing_file, private)
    _write(public_file, public)
    if as_json:
        console.data(
            {
                "kid": name,
                "signing_key_file": str(signing_file),
                "public_key_file": str(public_file),
                "public_keys": public,
            }
        )
        return
    console.line(f"{signing_file}  the worker's secret, and an operator's: never give it to an agent")
    console.line(f"{public_file}  for every guard")
    console.line("")
    console.line(f"export SPENDFUSE_SIGNING_KEY_FILE={signing_file}")
    console.line(f"export SPENDFUSE_PUBLIC_KEYS={public}")


def _write(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text + "\n")
