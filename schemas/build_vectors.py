"""Writes `vectors/`: signatures and streams of commands, with what every guard in every language must make of them.

    python schemas/build_vectors.py [--check]

The verdicts are written here by hand; no guard's code has a part in them. Ed25519 is deterministic, so a vector changes
only on purpose. The keys are test keys: their private halves are known to everybody.
"""

import argparse
import base64
import json
import sys
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

HERE = Path(__file__).resolve().parent
TOPIC = "spendfuse.commands.v1"
ACKS_TOPIC = "spendfuse.acks.v1"
USAGE = "spendfuse.usage.v1"
AGENT, TEAM, WORKSPACE, RUN = "agent:acme/research/planner", "team:acme/research", "workspace:acme", "run:acme/root-1"
SCOPES = [AGENT, TEAM, WORKSPACE, RUN]
END = "2026-11-23T12:00:00Z"


def private(seed: int) -> Ed25519PrivateKey:
    """Return the test key of a seed: bytes seed, seed + 1, ..."""
    return Ed25519PrivateKey.from_private_bytes(bytes((seed + nth) % 256 for nth in range(32)))


KEYS = {"sf-2026-11": private(0), "ops": private(40), "retired": private(80)}
STRANGER = private(120)


def public_keys() -> str:
    """Return the guard's setting: two keys without an end, and one that ends at END."""
    texts = {kid: base64.b64encode(key.public_key().public_bytes_raw()).decode() for kid, key in KEYS.items()}
    return ",".join(f"{kid}={text}" + (f";until={END}" if kid == "retired" else "") for kid, text in texts.items())


def header(kid: str, key: bytes, value: bytes, topic: str = TOPIC, by: Ed25519PrivateKey | None = None) -> str:
    """Return the signature header of a record."""
    text = b"spendfuse-sig-v1\n" + topic.encode() + b"\n" + key + b"\n" + value
    return f"ed25519;kid={kid};{base64.b64encode((by or KEYS[kid]).sign(text)).decode()}"


def signatures() -> dict[str, Any]:
    """Return the vectors of one signature each; `verdict` is the key's id, or why it proves nothing."""
    key, value = f"{AGENT}|b|day".encode(), b'{"v":1}'
    good = header("sf-2026-11", key, value)
    signature = good.rpartition(";")[2]
    fixed, fix = AGENT.removeprefix("agent:").encode(), b'{"v":1,"type":"correction"}'
    morning, evening = "2026-11-23T11:59:59.999999Z", END
    rows: list[tuple[str, str, bytes, bytes, str | None, str, str]] = [
        ("right", TOPIC, key, value, good, morning, "sf-2026-11"),
        ("right, of a second key", TOPIC, key, value, header("ops", key, value), evening, "ops"),
        ("of a retiring key, before its end", TOPIC, key, value, header("retired", key, value), morning, "retired"),
        ("of a retired key, at its end", TOPIC, key, value, header("retired", key, value), evening, "key retired"),
        ("a correction among the usage", USAGE, fixed, fix, header("ops", fixed, fix, USAGE), evening, "ops"),
        ("a correction, signed for the commands", USAGE, fixed, fix, header("ops", fixed, fix), evening, "wrong"),
        ("none", TOPIC, key, value, None, morning, "unsigned"),
        ("value changed", TOPIC, key, value + b" ", good, morning, "wrong"),
        ("key changed", TOPIC, key + b"2", value, good, morning, "wrong"),
        ("topic changed", "spendfuse.commands.v2", key, value, good, morning, "wrong"),
        ("another's key under our id", TOPIC, key, value, header("ops", key, value, by=STRANGER), morning, "wrong"),
        ("unknown id", TOPIC, key, value, header("nobody", key, value, by=STRANGER), morning, "key unknown"),
        ("our signature under another id", TOPIC, key, value, f"ed25519;kid=ops;{signature}", morning, "wrong"),
        ("other algorithm", TOPIC, key, value, good.replace("ed25519", "none"), morning, "malformed"),
        ("upper case", TOPIC, key, value, good.replace("ed25519", "ED25519"), morning, "malformed"),
        ("without padding", TOPIC, key, value, good.rstrip("="), morning, "malformed"),
        ("with a space", TOPIC, key, value, good + " ", morning, "malformed"),
        ("with a newline behind", TOPIC, key, value, good + "\n", morning, "malformed"),
        ("empty", TOPIC, key, value, "", morning, "malformed"),
        ("all zero", TOPIC, key, value, f"ed25519;kid=ops;{base64.b64encode(bytes(64)).decode()}", morning, "wrong"),
        ("id of 65 characters", TOPIC, key, value, f"ed25519;kid={'k' * 65};{signature}", morning, "malformed"),
        ("very long", TOPIC, key, value, good + "=" * 1_000, morning, "malformed"),
        (
            "newline in the key: the bytes signed are those of key `a`, value `b\\nv`",
            TOPIC, b"a\nb", b"v", header("ops", b"a", b"b\nv"), morning, "newline",
        ),
        ("a value that is not UTF-8", TOPIC, key, b"\xff\xfe", header("ops", key, b"\xff\xfe"), morning, "ops"),
    ]  # fmt: skip
    return {
        "what": "Ed25519 over `spendfuse-sig-v1` newline topic newline key newline value; `at` is the guard's time",
        "public_keys": public_keys(),
        "vectors": [
            {
                "name": name, "topic": topic, "key_base64": base64.b64encode(record_key).decode(),
                "value_base64": base64.b64encode(record_value).decode(), "header": said, "at": at, "verdict": verdict,
            }
            for name, topic, record_key, record_value, said, at, verdict in rows
        ],
    }  # fmt: skip


def command(action: str, seq: int, *, scope: str = AGENT, cap: str = "day", **more: Any) -> dict[str, Any]:
    """Return a signed record with a command; its id is its seq."""
    kid, change = more.pop("kid", "sf-2026-11"), more.pop("change", {})
    body = {
        "v": 1, "id": f"{seq:032x}", "seq": seq, "action": action, "scope": scope, "budget": "b", "cap": cap,
        "issued_at": "2026-11-23T10:00:00Z", **more,
    }  # fmt: skip
    key = f"{scope}|b|{cap}"
    value = json.dumps(body | change, separators=(",", ":"))
    return {"key": key, "value": value, "header": header(kid, key.encode(), value.encode())}


def record(of: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a record with something of it changed after it was signed."""
    return of | changes


def ask(at: str, action: str, seq: int | None = None, **more: Any) -> dict[str, Any]:
    """Return a question: at that time of 2026-11-23, what holds, and by which command (its seq)."""
    return {"at": f"2026-11-23T{at}Z", "action": action, "seq": seq, **more}


def scenarios() -> dict[str, Any]:
    """Return streams of records, read in order, and what holds at some times; `refused` counts by reason."""
    until, body = "2026-11-23T11:00:00Z", {"models": {"gpt-5": "gpt-5-mini", "gpt-*": "gpt-5-nano", "*": "small"}}
    halt = command("halt", 5)
    rows: list[tuple[str, list[dict[str, Any]], list[dict[str, Any]], dict[str, int]]] = [
        ("nothing said", [], [ask("10:00:00", "go")], {}),
        ("a halt holds until something is said", [halt], [ask("10:00:00", "halt", 5), ask("23:59:59", "halt", 5)], {}),
        (
            "a halt lapses at its end, to the microsecond",
            [command("halt", 5, expires_at="2026-11-23T11:00:00.000001Z")],
            [ask("11:00:00.000000", "halt", 5), ask("11:00:00.000001", "go")], {},
        ),
        ("a resume of its cap lifts it", [halt, command("resume", 6)], [ask("10:00:00", "go")], {}),
        ("in whatever order they come", [command("resume", 6), halt], [ask("10:00:00", "go")], {"old": 1}),
        ("an older resume lifts nothing", [halt, command("resume", 4)], [ask("10:00:00", "halt", 5)], {"old": 1}),
        ("a resume of its seq lifts nothing", [halt, command("resume", 5)], [ask("10:00:00", "halt", 5)], {"old": 1}),
        ("a halt of the same seq as a resume holds", [command("resume", 5), halt], [ask("10:00:00", "halt", 5)], {}),
        ("a replay changes nothing", [halt, command("resume", 6), halt, halt], [ask("10:00:00", "go")], {"old": 2}),
        (
            "a resume of another cap lifts nothing", [halt, command("resume", 6, cap="month")],
            [ask("10:00:00", "halt", 5)], {},
        ),
        ("a warning lowers nothing", [halt, command("warn", 6)], [ask("10:00:00", "halt", 5)], {}),
        ("a warning halts nothing", [command("warn", 6)], [ask("10:00:00", "go")], {}),
        (
            "a degrade in a halt's place lowers it", [halt, command("degrade", 6, degrade=body)],
            [ask("10:00:00", "degrade", 6)], {},
        ),
        (
            "an expired halt stays replaced by nothing older",
            [command("halt", 5), command("halt", 6, expires_at=until)],
            [ask("10:59:59", "halt", 6), ask("11:00:00", "go")], {},
        ),
        ("of the team", [command("halt", 5, scope=TEAM)], [ask("10:00:00", "halt", 5)], {}),
        ("of the workspace", [command("halt", 5, scope=WORKSPACE)], [ask("10:00:00", "halt", 5)], {}),
        ("of the run tree", [command("halt", 5, scope=RUN)], [ask("10:00:00", "halt", 5)], {}),
        ("of another agent", [command("halt", 5, scope="agent:acme/research/planner-2")], [ask("10:00:00", "go")], {}),
        ("of a longer team name", [command("halt", 5, scope="team:acme/research2")], [ask("10:00:00", "go")], {}),
        (
            "the nearest of several halts is named",
            [command("halt", 7, scope=WORKSPACE), command("halt", 6, scope=TEAM), command("halt", 5)],
            [ask("10:00:00", "halt", 5)], {},
        ),
        (
            "a halt before a degrade, and the degrade after the halt's end",
            [command("degrade", 6, cap="soft", degrade=body), command("halt", 5, scope=TEAM, expires_at=until)],
            [ask("10:00:00", "halt", 5), ask("11:00:00", "degrade", 6)], {},
        ),
        (
            "a degrade's models: exact, then the longest pattern, and never twice",
            [command("degrade", 6, degrade=body | {"max_output_tokens": 512})],
            [
                ask(
                    "10:00:00", "degrade", 6, max_output_tokens=512,
                    models={"gpt-5": "gpt-5-mini", "gpt-4o": "gpt-5-nano", "claude": "small", "GPT-5": "small"},
                ),
            ], {},
        ),
        (
            "of two degrades the nearest scope's models, and the least of the limits",
            [
                command("degrade", 6, degrade={"models": {"a": "b"}, "max_output_tokens": 900}),
                command("degrade", 7, scope=TEAM, degrade={"models": {"a": "z", "c": "d"}, "max_output_tokens": 100}),
            ],
            [ask("10:00:00", "degrade", 6, max_output_tokens=100, models={"a": "b", "c": "d", "e": "e"})], {},
        ),
        ("unsigned", [halt, record(command("resume", 6), header=None)], [ask("10:00:00", "halt", 5)], {"unsigned": 1}),
        (
            "a tombstone", [halt, record(halt, value=None, header=None), record(halt, value=None)],
            [ask("10:00:00", "halt", 5)], {"tombstone": 2},
        ),
        (
            "a signature of other bytes", [halt, record(command("resume", 6), header=halt["header"])],
            [ask("10:00:00", "halt", 5)], {"signature": 1},
        ),
        (
            "a command of another scope under our key",
            [halt, _misplaced("resume", 6, scope="agent:acme/other/one", key=halt["key"])],
            [ask("10:00:00", "halt", 5)], {"key": 1},
        ),
        (
            "signed, and no command",
            [
                halt, command("resume", 6, change={"action": "kill"}), command("resume", 6, change={"v": 2}),
                *(command("resume", 6, change={"seq": seq}) for seq in (-1, 2**53, 6.5, "6")),
            ],
            [ask("10:00:00", "halt", 5)], {"invalid": 6},
        ),
        (
            "the greatest seq", [halt, command("resume", 2**53 - 1), command("halt", 2**53 - 2)],
            [ask("10:00:00", "go")], {"old": 1},
        ),
        ("signed by an operator's key", [halt, command("resume", 6, kid="ops")], [ask("10:00:00", "go")], {}),
    ]  # fmt: skip
    return {
        "what": "records of commands.v1 as a guard of these scopes reads them, in order; then what holds at some times",
        "topic": TOPIC,
        "public_keys": public_keys(),
        "read_at": "2026-11-23T10:00:00Z",
        "scopes": SCOPES,
        "scenarios": [
            {"name": name, "records": records, "asks": asks, "refused": refused}
            for name, records, asks, refused in rows
        ],
    }


def _misplaced(action: str, seq: int, *, scope: str, key: str) -> dict[str, Any]:
    value = command(action, seq, scope=scope)["value"]
    return {"key": key, "value": value, "header": header("sf-2026-11", key.encode(), value.encode())}


def acks() -> dict[str, Any]:
    """Return acks that guards sign: Ed25519 is deterministic, so every language makes the same header of a key."""
    rows = []
    for name, kid, seed, scope in (
        ("of an agent's halt", "guard-1", 160, AGENT),
        ("of its team's", "guard-2", 200, TEAM),
    ):
        body = {
            "v": 1, "command_id": f"{5:032x}", "seq": 5, "scope": scope, "budget": "b", "cap": "day", "agent": AGENT,
            "guard": "guard-a", "state": "enforced", "at": "2026-11-23T10:00:01.5Z",
        }  # fmt: skip
        value = json.dumps(body, separators=(",", ":")).encode()
        key = private(seed)
        encoded = [
            base64.b64encode(raw).decode() for raw in (key.private_bytes_raw(), key.public_key().public_bytes_raw())
        ]
        rows.append(
            {
                "name": name, "private_key": f"{kid}={encoded[0]}", "public_key": f"{kid}={encoded[1]}", "key": scope,
                "value": value.decode(), "header": header(kid, scope.encode(), value, ACKS_TOPIC, by=key),
            }
        )  # fmt: skip
    return {"what": "acks as a guard with a key of its own signs them", "topic": ACKS_TOPIC, "vectors": rows}


def silence() -> dict[str, Any]:
    """Return what a guard that hears nothing is, and whether its agent may go on, at some times.

    `do`: "commands" (all are read), "sign" (a worker's sign of life), "used" (`tokens` by the agent), "ask".
    """

    def asked(at_s: float, state: str, *, go: bool) -> dict[str, Any]:
        return {"at_s": at_s, "do": "ask", "state": state, "go": go}

    begin = [{"at_s": 0, "do": "commands"}, {"at_s": 0, "do": "sign"}]
    rows: list[tuple[str, str, list[dict[str, Any]]]] = [
        (
            "bounded: stale, then blind, halted 300 s after it was first asked there, free at a sign", "bounded",
            [
                *begin, asked(0, "live", go=True), asked(15, "live", go=True), asked(15.5, "stale", go=True),
                asked(120, "stale", go=True), asked(121, "blind", go=True), asked(420.5, "blind", go=True),
                asked(421, "blind", go=False), asked(9_999, "blind", go=False), {"at_s": 10_000, "do": "sign"},
                asked(10_000, "live", go=True), asked(10_121, "blind", go=True), asked(10_421, "blind", go=False),
            ],
        ),
        (
            "bounded: the grace is also so many tokens", "bounded",
            [
                *begin, {"at_s": 1, "do": "used", "tokens": 900_000}, asked(121, "blind", go=True),
                {"at_s": 122, "do": "used", "tokens": 50_000}, asked(122, "blind", go=True),
                {"at_s": 123, "do": "used", "tokens": 1}, asked(123, "blind", go=False),
            ],
        ),
        (
            "bounded: what was not read is borne within the grace", "bounded",
            [
                asked(2, "syncing", go=True), asked(301, "syncing", go=True), asked(302, "syncing", go=False),
                {"at_s": 303, "do": "commands"}, asked(303, "blind", go=False), {"at_s": 304, "do": "sign"},
                asked(304, "live", go=True),
            ],
        ),
        (
            "closed: halted while syncing and blind, not while stale", "closed",
            [
                asked(2, "syncing", go=False), {"at_s": 3, "do": "commands"}, asked(3, "blind", go=False),
                {"at_s": 4, "do": "sign"}, asked(4, "live", go=True), asked(20, "stale", go=True),
                asked(124, "stale", go=True), asked(125, "blind", go=False),
            ],
        ),
        (
            "open: never halted by silence", "open",
            [
                asked(2, "syncing", go=True), *begin, asked(16, "stale", go=True), asked(121, "blind", go=True),
                {"at_s": 122, "do": "used", "tokens": 10_000_000}, asked(99_999, "blind", go=True),
            ],
        ),
    ]  # fmt: skip
    return {
        "what": "a guard's state, and whether its agent may go on, by what was heard; times in seconds of one clock",
        "stale_after_s": 15, "blind_after_s": 120, "grace_s": 300, "grace_tokens": 50_000,
        "scenarios": [{"name": name, "fail_mode": mode, "steps": steps} for name, mode, steps in rows],
    }  # fmt: skip


def documents() -> dict[Path, str]:
    """Return every file with its text."""
    made = {"signatures": signatures(), "obedience": scenarios(), "acks": acks(), "silence": silence()}
    return {
        HERE / "vectors" / f"{name}.json": json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        for name, value in made.items()
    }


def main() -> int:
    """Write the files, or check them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 when a file is not current")
    stale = [
        path for path, text in documents().items() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if parser.parse_args().check:
        for path in stale:
            print(f"{path.relative_to(HERE.parent)} is not current: run `python schemas/build_vectors.py`")
        return 1 if stale else 0
    for path, text in documents().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(HERE.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
