"""`spendfuse guard check SCOPE`, from the mirror file, in milliseconds: the standard library alone, and little of it.

Exit codes: 0 go on, 1 halted, 2 wrong usage, 69 nothing to be relied on (no mirror, unreadable, or its time is over).
"""

import os
import sys
import time

TYPE_CHECKING = False  # typing would cost as much as the answer
if TYPE_CHECKING:
    from typing import Any

EXIT_GO = 0
EXIT_HALTED = 1
EXIT_USAGE = 2
EXIT_UNKNOWN = 69
MIRROR_ENV = "SPENDFUSE_MIRROR_FILE"
MIRROR_DEFAULT = "~/.local/state/spendfuse/mirror.json"
BYTES_MAX = 16_777_216
VERSION = 1
USAGE = "usage: spendfuse guard check SCOPE [--run WORKSPACE/RUN] [--mirror FILE] [--quiet]"
KINDS = {"workspace": 1, "team": 2, "agent": 3, "run": 2}


def main(arguments: list[str]) -> int:
    """Answer for a scope; return the exit code."""
    try:
        scopes, path, quiet = _parse(arguments)
    except ValueError as error:
        return _say(EXIT_USAGE, f"{error}\n{USAGE}", quiet=False)
    code, message = answer(scopes, path, time.time_ns() // 1_000_000)
    return _say(code, message, quiet=quiet)


def answer(scopes: list[str], path: str, now_ms: int) -> tuple[int, str]:
    """Return the exit code and the sentence for some scopes (an agent and all above it) at a wall time."""
    try:
        mirror = _read(path)
        halts = [(scopes.index(halt["scope"]), halt["message"]) for halt in mirror["halts"] if halt["scope"] in scopes]
        closes_ms = mirror["closes_ms"]
        if halts:
            return EXIT_HALTED, f"{scopes[0]} is halted: {min(halts)[1]}"
        if closes_ms is not None and now_ms >= closes_ms:
            age_s = (now_ms - mirror["written_ms"]) / 1_000
            return EXIT_UNKNOWN, (
                f"{scopes[0]} must stop: {path} was written {age_s:.0f} s ago and may no longer be relied on "
                f"(no sign of life from a worker). Is `spendfuse guard mirror` running, and a worker?"
            )
    except FileNotFoundError:
        return EXIT_UNKNOWN, f"{scopes[0]} must stop: there is no {path}. Start `spendfuse guard mirror`"
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        return EXIT_UNKNOWN, f"{scopes[0]} must stop: {path} cannot be read: {error}"
    return EXIT_GO, ""


def scopes_of(scope: str, run: str | None) -> list[str]:
    """Return a scope and all above it; ValueError for what is no scope."""
    kind, _, path = scope.partition(":")
    parts = path.split("/", 1) if kind == "run" else path.split("/")
    if KINDS.get(kind) != len(parts) or not all(parts):
        raise ValueError(f"{scope[:100]!r} is no scope: agent:WORKSPACE/TEAM/AGENT, team:..., workspace:... or run:...")
    found = [scope]
    if kind == "agent":
        found.append(f"team:{parts[0]}/{parts[1]}")
    if kind != "workspace":
        found.append(f"workspace:{parts[0]}")
    if run:
        found.append(f"run:{parts[0]}/{run.removeprefix('run:').removeprefix(parts[0] + '/')}")
    return found


def _read(path: str) -> "dict[str, Any]":
    with open(path, "rb") as file:  # noqa: PTH123 - pathlib costs more than the rest
        data = file.read(BYTES_MAX + 1)
    if len(data) > BYTES_MAX:
        raise ValueError(f"it is larger than {BYTES_MAX} bytes")
    import json

    mirror = json.loads(data)
    if mirror["v"] != VERSION:
        raise ValueError(f"it is of version {mirror['v']}, and this spendfuse reads {VERSION}")
    return mirror  # type: ignore[no-any-return]  # what is missing in it is a KeyError or TypeError to the caller


def _parse(arguments: list[str]) -> tuple[list[str], str, bool]:
    run: str | None = os.environ.get("SPENDFUSE_ROOT_RUN") or os.environ.get("SPENDFUSE_RUN") or None
    path = os.environ.get(MIRROR_ENV) or MIRROR_DEFAULT
    scopes: list[str] = []
    quiet = False
    left = list(arguments)
    while left:
        word = left.pop(0)
        name, equals, value = word.partition("=")
        if name in {"--run", "--mirror"}:
            if not equals and not left:
                raise ValueError(f"{name} needs a value")
            value = value if equals else left.pop(0)
            run, path = (value, path) if name == "--run" else (run, value)
        elif word in {"--quiet", "-q"}:
            quiet = True
        elif word.startswith("-"):
            raise ValueError(f"there is no option {word[:40]}")
        else:
            scopes.append(word)
    if len(scopes) != 1:
        raise ValueError(f"one scope is needed, not {len(scopes)}")
    return scopes_of(scopes[0], run), os.path.expanduser(path), quiet  # noqa: PTH111 - as above


def _say(code: int, message: str, *, quiet: bool) -> int:
    if message and not quiet:
        text = "".join(char if char.isprintable() or char == "\n" else "?" for char in message)
        sys.stderr.write(f"spendfuse: {text}\n")
    return code
