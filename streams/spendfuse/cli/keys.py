"""`spendfuse keys`: who may command."""

import os
import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from spendfuse.cli.operator_entry import Reason, Whoever
from spendfuse.cli.options import STATE_DIR, Json, Servers, StateDir, command, duration, examples

if TYPE_CHECKING:
    from spendfuse.client.keys import PublicKey

keys = typer.Typer(
    help="The keys that sign commands.",
    no_args_is_help=True,
    epilog=examples(
        "spendfuse keys new --out keys", "spendfuse keys list --dir keys", "spendfuse keys rotate --dir keys"
    ),
)


class Owner(StrEnum):
    """Who signs with a key."""

    WORKER = "worker"
    GUARD = "guard"


SIGNING_FILE: Final = "signing.key"
NEXT_FILE: Final = "signing.next.key"
PUBLIC_FILE: Final = "public.key"
OVERLAP_DEFAULT: Final = "7d"

Directory = Annotated[
    Path, typer.Option("--dir", metavar="DIR", help="Directory of the files of `spendfuse keys new`.")
]
Kid = Annotated[str | None, typer.Option(help="Id of the key; made of the date by default.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(
        keys,
        new,
        "spendfuse keys new --out keys",
        "spendfuse keys new --out keys --kid 2026-11",
        "spendfuse keys new --out keys --for guard --scope team:acme/research",
    )
    command(keys, list_, "spendfuse keys list --dir keys", "spendfuse keys list --json", name="list")
    command(
        keys,
        rotate,
        "spendfuse keys rotate --dir keys                  (then: public.key to every guard and worker)",
        "spendfuse keys rotate --dir keys --finish         (then: restart the workers)",
        "spendfuse keys rotate --dir keys --finish --overlap 30d",
    )
    app.add_typer(keys, name="keys")


def new(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory for the two files, each readable by you alone.")],
    kid: Kid = None,
    owner: Annotated[
        Owner, typer.Option("--for", help="Who signs: a worker its commands, or a guard its acks.")
    ] = Owner.WORKER,
    scope: Annotated[
        str | None,
        typer.Option(metavar="SCOPE", help="With --for guard: whose agents it speaks for; all of them by default."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a pair of Ed25519 keys: the worker's secret, and what guards check with; or a guard's own.

    The private key is written to a file (0600) and never shown. Files that exist are never overwritten.
    """
    from spendfuse.cli import console
    from spendfuse.cli.faults import EXIT_SETTINGS, CliError

    if owner is Owner.GUARD and kid is None:
        kid = _guard_kid()
    name, private, public = _pair(kid, taken=())
    names = (SIGNING_FILE, PUBLIC_FILE)
    if owner is Owner.GUARD:
        public, names = _enrolled(public, scope), (f"{name}.key", f"{name}.public.key")
    elif scope is not None:
        raise CliError("--scope binds a guard's key: give --for guard too, or leave it out", EXIT_SETTINGS)
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    signing_file, public_file = out / names[0], out / names[1]
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
    if owner is Owner.GUARD:
        console.line(f"{signing_file}  this guard's secret: its acks are signed with it")
        console.line(f"{public_file}  for every worker: what it signs is proved, other acks are only claimed")
        console.line("")
        console.line(f"export SPENDFUSE_GUARD_KEY_FILE={signing_file}     (beside the agent)")
        console.line(f"export SPENDFUSE_GUARD_KEYS={public}     (workers: add it to those that are there)")
        return
    console.line(f"{signing_file}  the worker's secret, and an operator's: never give it to an agent")
    console.line(f"{public_file}  for every guard")
    console.line("")
    console.line(f"export SPENDFUSE_SIGNING_KEY_FILE={signing_file}")
    console.line(f"export SPENDFUSE_PUBLIC_KEYS={public}")


def list_(
    directory: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", help="Directory of the files; else what the environment says."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the keys: which signs, which are known, and until when. No private key is shown.

    Without --dir: SPENDFUSE_SIGNING_KEY(_FILE) and SPENDFUSE_PUBLIC_KEYS(_FILE).
    """
    import time

    from spendfuse.cli import console
    from spendfuse.wire.base import from_us, rfc3339

    signer, coming, public = _known(directory)
    now_us = time.time_ns() // 1_000
    rows = []
    for kid in dict.fromkeys([kid for kid in (signer, coming) if kid] + list(public)):
        known = public.get(kid)
        ended = known is not None and known.until_us is not None and known.until_us <= now_us
        rows.append(
            {
                "kid": kid,
                "signs": "now" if kid == signer else "next" if kid == coming else "",
                "known": "no" if known is None else "retired" if ended else "yes",
                "until": rfc3339(from_us(known.until_us)) if known is not None and known.until_us is not None else None,
            }
        )
    if as_json:
        console.data(rows)
    else:
        console.table(
            ["key", "signs", "known to guards", "until"],
            [[row["kid"] or "", row["signs"] or "", row["known"] or "", row["until"] or ""] for row in rows],
        )
    unknown = [str(row["kid"]) for row in rows if row["signs"] == "now" and row["known"] != "yes"]
    if unknown:
        console.note(f"key {unknown[0]} signs, and guards with these public keys refuse it", "bold red")
        raise typer.Exit(1)


def rotate(
    directory: Directory,
    finish: Annotated[
        bool, typer.Option("--finish", help="Second step: sign with the new key, and give the old one an end.")
    ] = False,
    overlap: Annotated[
        str, typer.Option(metavar="TIME", help="With --finish: how long guards still believe the old key.")
    ] = OVERLAP_DEFAULT,
    kid: Kid = None,
    by: Whoever = "",
    reason: Reason = "",
    bootstrap_servers: Servers = None,
    state_dir: StateDir = STATE_DIR,
    as_json: Json = False,
) -> None:
    """Replace the key that signs, in two steps, so that no guard ever meets a key it does not know.

    First: a new pair; public.key then holds both. Give it to every guard and worker, and restart them.
    Then, with --finish: signing.key becomes the new key, and the old one ends after --overlap. Restart the workers;
    they sign again, with the new key, whatever still holds. The ledger gets an entry of each step, signed with the key
    that signs until then, where Kafka can be reached.
    """
    from spendfuse.cli import console, operator_entry, target
    from spendfuse.client.keys import Signer

    by = operator_entry.named(by, reason)
    before, _, _ = _known(directory)
    signing = _read(directory / SIGNING_FILE)
    lines = _finish(directory, overlap) if finish else _begin(directory, kid)

    signer, coming, public = _known(directory)
    about = {"step": "finish" if finish else "begin", "from": before, "to": signer if finish else coming}
    signs = Signer.parse(signing) if signing else None
    operator_entry.record_if_possible(
        target.find(bootstrap_servers, state_dir), "rotate keys", about, by, reason, signs
    )
    if as_json:
        console.data({"signs": signer, "next": coming, "public_keys": _format(public)})
        return
    for line in lines:
        console.line(line)


def _guard_kid() -> str:
    """Return an id that no other guard has: keys of many guards meet in one setting."""
    import secrets

    return f"guard-{secrets.token_hex(4)}"


def _enrolled(public: str, scope: str | None) -> str:
    """Return a guard's public key as workers take it; raises CliError for a scope that no guard speaks for."""
    from spendfuse.cli.faults import usage_error
    from spendfuse.pipeline.proofs import GuardKeys

    text = public if scope is None else f"{public};scope={scope}"
    try:
        GuardKeys.parse(text)
    except ValueError as error:
        raise usage_error(f"--scope: {error}") from error
    return text


def _begin(directory: Path, kid: str | None) -> list[str]:
    from spendfuse.cli.faults import EXIT_SETTINGS, CliError
    from spendfuse.client.keys import KEYS_MAX, parse_public_keys

    signer, coming, public = _known(directory)
    if coming is not None:
        raise CliError(
            f"a rotation to key {coming} has begun: once every guard knows {directory / PUBLIC_FILE}, run "
            f"`spendfuse keys rotate --dir {directory} --finish`, or give it up by deleting {directory / NEXT_FILE}",
            EXIT_SETTINGS,
        )
    known = {name: key for name, key in public.items() if not _has_ended(key)}
    if len(known) >= KEYS_MAX:
        raise CliError(
            f"{directory / PUBLIC_FILE} holds {len(known)} keys, and a guard takes {KEYS_MAX}", EXIT_SETTINGS
        )
    name, private, public_text = _pair(kid, taken=(*public, *([signer] if signer else [])))
    _replace(directory / PUBLIC_FILE, _format(known | parse_public_keys(public_text)))
    _replace(directory / NEXT_FILE, private)
    return [
        f"{directory / PUBLIC_FILE} now holds {name} beside {', '.join(known)}.",
        "Give it to every guard and worker (SPENDFUSE_PUBLIC_KEYS_FILE) and restart them; then run",
        f"spendfuse keys rotate --dir {directory} --finish",
    ]


def _finish(directory: Path, overlap: str) -> list[str]:
    import time

    from spendfuse.cli.faults import EXIT_SETTINGS, CliError
    from spendfuse.wire.base import from_us, rfc3339

    lasts_us = int(duration(overlap).total_seconds()) * 1_000_000
    signer, coming, public = _known(directory)
    if coming is None:
        raise CliError(
            f"no rotation has begun in {directory}: run `spendfuse keys rotate --dir {directory}` first", EXIT_SETTINGS
        )
    end_us = time.time_ns() // 1_000 + lasts_us
    kept = {name: key for name, key in public.items() if not _has_ended(key)}
    if signer is not None and signer in kept and signer != coming:
        kept[signer] = kept[signer]._replace(until_us=end_us)
    # In this order: a crash in between leaves a directory in which --finish can be run again.
    _replace(directory / PUBLIC_FILE, _format(kept))
    (directory / NEXT_FILE).replace(directory / SIGNING_FILE)
    return [
        f"{directory / SIGNING_FILE} is now {coming}; {signer} ends at {rfc3339(from_us(end_us))}.",
        "Restart the workers. They sign again what still holds; give public.key to the guards before the end.",
    ]


def _known(directory: Path | None) -> "tuple[str | None, str | None, dict[str, PublicKey]]":
    """Return the id of the key that signs, of the one that will, and the public keys; raises CliError."""
    from spendfuse.cli.faults import EXIT_SETTINGS, CliError
    from spendfuse.cli.target import OperatorSettings
    from spendfuse.client.keys import Signer, parse_public_keys

    if directory is None:
        operator = OperatorSettings.from_env()
        texts = [operator.signing_key.get_secret_value(), "", operator.public_keys]
        names = ["SPENDFUSE_SIGNING_KEY", "", "SPENDFUSE_PUBLIC_KEYS"]
    else:
        paths = [directory / name for name in (SIGNING_FILE, NEXT_FILE, PUBLIC_FILE)]
        texts, names = [_read(path) for path in paths], [str(path) for path in paths]
    if not any(texts):
        raise CliError(
            f"there are no keys in {directory or 'the environment'}: make a pair with `spendfuse keys new --out DIR`",
            EXIT_SETTINGS,
        )
    found: list[Any] = []
    for name, text, read in zip(names, texts, (_kid_of(Signer), _kid_of(Signer), parse_public_keys), strict=True):
        try:
            found.append(read(text) if text else None)
        except ValueError as error:
            raise CliError(f"{name} cannot be used: {error}", EXIT_SETTINGS) from error
    return found[0], found[1], found[2] or {}


def _kid_of(signer: Any) -> Any:
    return lambda text: signer.parse(text).kid


def _pair(kid: str | None, taken: tuple[str, ...]) -> tuple[str, str, str]:
    """Return the id, the private and the public text of a new pair, under an id that is not taken."""
    from datetime import UTC, datetime

    from spendfuse.cli.faults import usage_error
    from spendfuse.client.keys import generate

    name = kid or f"key-{datetime.now(UTC):%Y-%m-%d}"
    if kid is None:
        again = 2
        while name in taken:
            name, again = re.sub(r"(-\d\d-\d\d).*$", rf"\1.{again}", name), again + 1
    if name in taken:
        raise usage_error(f"key id {name} is taken: an id names one key for ever, choose another --kid")
    try:
        return name, *generate(name)
    except ValueError as error:
        raise usage_error(str(error)) from error


def _has_ended(key: "PublicKey") -> bool:
    import time

    return key.until_us is not None and key.until_us <= time.time_ns() // 1_000


def _format(public: "dict[str, PublicKey]") -> str:
    from spendfuse.client.keys import format_public_keys

    return format_public_keys(public)


def _read(path: Path) -> str:
    from spendfuse.cli.faults import EXIT_SETTINGS, CliError
    from spendfuse.settings import SECRET_FILE_BYTES_MAX

    try:
        with path.open(encoding="utf-8") as file:
            return file.read(SECRET_FILE_BYTES_MAX).strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"{path} cannot be read: {error}", EXIT_SETTINGS) from error


def _write(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text + "\n")


def _replace(path: Path, text: str) -> None:
    """Write a file as a whole, readable by its owner alone."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    _write(partial, text)
    partial.replace(path)
