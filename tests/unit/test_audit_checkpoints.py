"""Checkpoints: the note form of others, signatures that cover every byte, and files that are read back as written."""

from __future__ import annotations

import base64
import runpy
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from spendfuse.audit import checkpoints
from spendfuse.audit.checkpoints import (
    Checkpoint,
    CheckpointError,
    Head,
    NoteSigner,
    append_note,
    make_checkpoint,
    open_note,
    own_key,
    read_notes,
    split_notes,
)

VERIFIER = runpy.run_path(str(Path(__file__).parents[2] / "deploy" / "verifier" / "verify.py"))
AT = datetime(2026, 11, 23, 20, 0, 0, 123, tzinfo=UTC)
HEADS = [Head(1, 7, "b" * 64), Head(0, 12, "a" * 64)]
SIGNER = NoteSigner("audit", Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
# The example of Go's package golang.org/x/mod/sumdb/note, by whom the form was first written down.
GO_NAME, GO_KEY = "PeterNeumann", "ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
GO_TEXT = (
    "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
)  # fmt: skip
GO_SIGNATURE = "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM="


def note() -> str:
    return SIGNER.sign(make_checkpoint("spendfuse/test", AT, HEADS))


def test_the_key_id_and_the_signature_are_those_of_the_note_form() -> None:
    public = base64.b64decode(GO_KEY)[1:]
    assert checkpoints._is_signed(GO_NAME, GO_SIGNATURE, {GO_NAME: public}, GO_TEXT)
    assert VERIFIER["is_signed"](public, GO_TEXT.encode(), base64.b64decode(GO_SIGNATURE)[4:])


def test_a_note_reads_as_it_is_specified() -> None:
    lines = note().split("\n")
    assert (lines[0], lines[1], lines[3]) == ("spendfuse/test", "19", "time 2026-11-23T20:00:00.000123Z")
    assert lines[4:7] == [f"head 0 12 {'a' * 64}", f"head 1 7 {'b' * 64}", ""]
    assert lines[7].startswith("\N{EM DASH} audit ")
    assert lines[8:] == [""]


def test_a_note_is_opened_by_its_key_by_us_and_by_the_stranger() -> None:
    assert open_note(note(), SIGNER.public) == Checkpoint("spendfuse/test", AT, tuple(sorted(HEADS)))
    at, heads = VERIFIER["heads_of"](note(), SIGNER.public)
    assert (at, heads) == ("time 2026-11-23T20:00:00.000123Z", [tuple(head) for head in sorted(HEADS)])


@given(st.data())
def test_a_note_with_any_character_changed_is_refused(data: st.DataObject) -> None:
    text = note()
    at = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.characters(codec="utf-8").filter(lambda char: char != text[at]))
    changed = text[:at] + other + text[at + 1 :]
    with pytest.raises(CheckpointError):
        # The last newline alone is not part of anything.
        open_note(changed if at < len(text) - 1 else "x" + text, SIGNER.public)


@given(st.text() | st.text(alphabet="head 0123456789abcdef\n\N{EM DASH}=time-TZ"))
def test_any_other_text_is_refused_with_a_reason(text: str) -> None:
    with pytest.raises(CheckpointError):
        open_note(text, SIGNER.public)


def test_a_witness_may_sign_too_and_counts_for_nothing_alone() -> None:
    witness = NoteSigner("witness", Ed25519PrivateKey.from_private_bytes(bytes(32)))
    line = witness.sign(make_checkpoint("spendfuse/test", AT, HEADS)).split("\n")[-2]
    assert open_note(f"{note()}{line}\n", SIGNER.public).origin == "spendfuse/test"
    with pytest.raises(CheckpointError, match="signed by no key that is known"):
        open_note(witness.sign(make_checkpoint("spendfuse/test", AT, HEADS)), SIGNER.public)
    same_name = {"audit": witness.public["witness"]}
    with pytest.raises(CheckpointError, match="signed by no key that is known"):
        open_note(note(), same_name)


def test_a_file_is_read_back_note_by_note(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "checkpoints.notes"
    first, second = make_checkpoint("o", AT, HEADS[:1]), make_checkpoint("o", AT, HEADS)
    append_note(path, SIGNER.sign(first))
    append_note(path, SIGNER.sign(second))
    assert read_notes(path, SIGNER.public) == [first, second]
    assert list(split_notes(path.read_text())) == list(VERIFIER["notes_of"](path.read_text()))
    path.write_text(path.read_text()[:-20])
    with pytest.raises(CheckpointError, match=r"checkpoints\.notes"):
        read_notes(path, SIGNER.public)
    path.write_text("")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        read_notes(path, SIGNER.public)


def test_an_embedded_audit_makes_its_key_once_and_keeps_it_to_itself(tmp_path: Path) -> None:
    key = own_key(tmp_path)
    assert own_key(tmp_path) == key
    assert (tmp_path / "audit.key").stat().st_mode & 0o777 == 0o600
    public = (tmp_path / "audit.pub").read_text()
    assert base64.b64decode(public.partition("=")[2]) == NoteSigner.parse(key).public["spendfuse-audit"]


@pytest.mark.parametrize("text", ["", "a", "a=b", "a=" + base64.b64encode(b"x" * 31).decode()])
def test_a_key_that_is_none_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(ValueError, match="key") as caught:
        NoteSigner.parse(text)
    assert base64.b64encode(b"x" * 31).decode() not in str(caught.value)


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=60))
def test_the_stranger_s_ed25519_agrees_with_a_library(seed: bytes, message: bytes) -> None:
    private = Ed25519PrivateKey.from_private_bytes(seed)
    public, signature = private.public_key().public_bytes_raw(), private.sign(message)
    assert VERIFIER["is_signed"](public, message, signature)
    assert not VERIFIER["is_signed"](public, message + b"x", signature)
    assert not VERIFIER["is_signed"](public, message, bytes([signature[0] ^ 1]) + signature[1:])
    assert not VERIFIER["is_signed"](public, message, signature[:-1] + bytes([signature[-1] ^ 0x10]))
