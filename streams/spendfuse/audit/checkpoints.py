"""Checkpoints: signed notes that say where the chains stand, to be kept where the database's keepers cannot reach.

The form is a signed note (C2SP signed-note.md), and the first three lines of its body are those of a checkpoint
(tlog-checkpoint.md): origin, size, root. Then come the time and one line for each ledger partition. size is the number
of batches, root the Merkle root over the lines of the heads.
"""

import base64
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from spendfuse.audit.seal import merkle_root
from spendfuse.client.keys import generate, parse_keys
from spendfuse.wire.base import rfc3339

NOTES_BYTES_MAX: Final = 268_435_456
"""Most bytes of a file of checkpoints that is read."""
NOTES_FILE: Final = "checkpoints.notes"
KEY_FILE: Final = "audit.key"
PUBLIC_KEY_FILE: Final = "audit.pub"
KEY_NAME: Final = "spendfuse-audit"
_ED25519: Final = b"\x01"
_DASH: Final = "\N{EM DASH} "
_HEAD_WORDS: Final = 4
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,18}")
_BODY_LINES_MIN: Final = 4
_KEY_ID_BYTES: Final = 4


class CheckpointError(ValueError):
    """A checkpoint that is none, or that no known key signed; the message says which and why."""


class Head(NamedTuple):
    """The last batch of a ledger partition, and the hash that the batch after it will hold."""

    partition: int
    seq: int
    header_hash: str

    @property
    def line(self) -> str:
        """Return the head's line of a checkpoint."""
        return f"head {self.partition} {self.seq} {self.header_hash}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The body of a note: whose trail, when, and where its chains stood."""

    origin: str
    at: datetime
    heads: tuple[Head, ...]

    @property
    def body(self) -> str:
        """Return the text that is signed; it ends with a newline."""
        size = sum(head.seq for head in self.heads)
        lines = [self.origin, str(size), _root(self.heads), f"time {rfc3339(self.at)}"]
        return "\n".join([*lines, *(head.line for head in self.heads)]) + "\n"

    @classmethod
    def parse(cls, body: str) -> Self:
        """Return the checkpoint of a note's body; raises CheckpointError for any other text."""
        lines = body.split("\n")
        if len(lines) <= _BODY_LINES_MIN or lines[-1] or not lines[3].startswith("time ") or not lines[0]:
            raise CheckpointError("a checkpoint is origin, size, root, time and heads, a line each")
        try:
            at = datetime.fromisoformat(lines[3].removeprefix("time "))
            checkpoint = cls(lines[0], at, tuple(_head(line) for line in lines[4:-1]))
            same = at.tzinfo is not None and checkpoint.body == body
        except ValueError as error:
            raise CheckpointError(f"a checkpoint of {lines[0][:80]!r} cannot be read: {error}") from error
        if not same:
            raise CheckpointError(f"a checkpoint of {lines[0][:80]!r} contradicts itself: its size, root or time")
        return checkpoint


def _head(line: str) -> Head:
    words = line.split(" ")
    if len(words) != _HEAD_WORDS or words[0] != "head" or not _HASH.fullmatch(words[3]):
        raise ValueError(f"{line[:80]!r} is no head")
    if not all(_NUMBER.fullmatch(word) for word in words[1:3]):
        raise ValueError(f"{line[:80]!r} has a number that is none")
    return Head(int(words[1]), int(words[2]), words[3])


def _root(heads: Sequence[Head]) -> str:
    leaves = [hashlib.sha256(b"\0" + head.line.encode()).digest() for head in heads]
    return base64.b64encode(merkle_root(leaves)).decode()


class NoteSigner:
    """The audit's Ed25519 key, under a name that notes carry."""

    def __init__(self, name: str, private: Ed25519PrivateKey) -> None:
        """Take a key and its name."""
        self.name = name
        self._private = private

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the signer of `name=<base64 of the private key>`; ValueError (without the text) if it is none."""
        keys = parse_keys(text)
        if len(keys) != 1:
            raise ValueError(f"the audit's key is one name=base64, not {len(keys)}")
        ((name, raw),) = keys.items()
        return cls(name, Ed25519PrivateKey.from_private_bytes(raw))

    @property
    def public(self) -> dict[str, bytes]:
        """Return name -> public key."""
        return {self.name: self._private.public_key().public_bytes_raw()}

    def sign(self, checkpoint: Checkpoint) -> str:
        """Return the signed note."""
        body = checkpoint.body
        ((name, raw),) = self.public.items()
        signature = _key_id(name, raw) + self._private.sign(body.encode())
        return f"{body}\n{_DASH}{name} {base64.b64encode(signature).decode()}\n"


def open_note(note: str, keys: Mapping[str, bytes]) -> Checkpoint:
    """Return the checkpoint of a note that one of these public keys signed; raises CheckpointError.

    As the note's form has it, signatures of unknown keys (of witnesses, say) are passed over; a wrong one of a known
    key is not.
    """
    body, separator, signatures = note.rpartition("\n\n")
    if not separator:
        raise CheckpointError("a note ends with an empty line and its signatures")
    body += "\n"
    checkpoint = Checkpoint.parse(body)
    signed = False
    for line in signatures.rstrip("\n").split("\n"):
        name, _, encoded = line.removeprefix(_DASH).partition(" ")
        if not line.startswith(_DASH) or not name:
            raise CheckpointError(f"{line[:80]!r} is no signature line")
        signed = _is_signed(name, encoded, keys, body) or signed
    if not signed:
        known = ", ".join(keys) or "none is"
        raise CheckpointError(f"the checkpoint of {rfc3339(checkpoint.at)} is signed by no key that is known ({known})")
    return checkpoint


def _is_signed(name: str, encoded: str, keys: Mapping[str, bytes], body: str) -> bool:
    try:
        raw = base64.b64decode(encoded, validate=True)
    except ValueError:
        raw = b""
    if base64.b64encode(raw).decode() != encoded:  # one signature has one spelling
        raise CheckpointError(f"the signature of {name[:80]!r} is not base64")
    public = keys.get(name)
    if public is None or raw[:_KEY_ID_BYTES] != _key_id(name, public):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(raw[_KEY_ID_BYTES:], body.encode())
    except InvalidSignature:
        raise CheckpointError(f"the signature of {name} is wrong: the checkpoint was changed") from None
    return True


def _key_id(name: str, public: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + _ED25519 + public).digest()[:_KEY_ID_BYTES]


def split_notes(text: str) -> Iterator[str]:
    """Yield the notes of a file that holds one behind the other, as `append_note` writes it."""
    lines: list[str] = []
    signed = False
    for line in text.splitlines(keepends=True):
        if signed and not line.startswith(_DASH):
            yield "".join(lines)
            lines, signed = [], False
        if lines or line.strip():
            lines.append(line)
        signed = line.startswith(_DASH)
    if lines:
        yield "".join(lines)


def read_notes(path: Path, keys: Mapping[str, bytes]) -> list[Checkpoint]:
    """Return the checkpoints of a file, each of them signed; raises CheckpointError, OSError."""
    with path.open("rb") as file:
        raw = file.read(NOTES_BYTES_MAX + 1)
    if len(raw) > NOTES_BYTES_MAX:
        raise CheckpointError(f"{path} is larger than {NOTES_BYTES_MAX:,} bytes: give the part that matters")
    try:
        notes = list(split_notes(raw.decode()))
        checkpoints = [open_note(note, keys) for note in notes]
    except (UnicodeDecodeError, CheckpointError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not checkpoints:
        raise CheckpointError(f"{path} holds no checkpoint")
    return checkpoints


def append_note(path: Path, note: str) -> None:
    """Append a note to a file, whole or not at all, and return when it is on the disk. Raises OSError with the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644), "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        data = memoryview(f"{note}\n".encode())
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(before)  # half a note would spoil the one that follows it
            raise OSError(error.errno, error.strerror, str(path)) from error


def make_checkpoint(origin: str, at: datetime, heads: Iterable[Head]) -> Checkpoint:
    """Return the checkpoint of some heads, in the order of their partitions."""
    return Checkpoint(origin, at, tuple(sorted(heads)))


def own_key(directory: Path) -> str:
    """Return the key that an embedded audit made for itself, made now if there is none, `name=<base64>`.

    The private key (0600) lies beside the database: it shows changes made later by others than this machine's keeper.
    """
    path = directory / KEY_FILE
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        private, public = generate(KEY_NAME)
        (directory / PUBLIC_KEY_FILE).write_text(public + "\n", encoding="utf-8")
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(private + "\n")
        partial.replace(path)
    return path.read_text(encoding="utf-8").strip()
