"""A person's keyed hash: the HMAC of the documented bytes, and nothing of the person in it."""

from __future__ import annotations

import base64
import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spendfuse.client.subject import TAG, Subjects
from spendfuse.settings import SettingsError
from spendfuse.wire.usage import Usage

RAW = bytes(range(32))
KEY = f"2026={base64.b64encode(RAW).decode()}"


def test_it_is_the_hmac_of_workspace_and_person() -> None:
    text = b"spendfuse-subject-v1\n" + b"\0\0\0\x04acme" + b"ada@example.org"
    assert Subjects.parse(KEY).of("acme", "ada@example.org") == f"2026:{hmac.digest(RAW, text, hashlib.sha256).hex()}"


@given(st.text(), st.text(), st.text(), st.text())
def test_two_persons_or_workspaces_never_share_a_hash(workspace: str, person: str, other: str, another: str) -> None:
    subjects = Subjects.parse(KEY)
    try:
        same = subjects.of(workspace, person) == subjects.of(other, another)
    except (UnicodeEncodeError, OverflowError):  # a lone surrogate, a name longer than four gigabytes: no id either
        return
    assert same == ((workspace, person) == (other, another))


def test_it_is_a_tag_s_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPENDFUSE_SUBJECT_KEY", KEY)
    value = Subjects.from_env().of("acme", "Ada Lovelace\n\u20ac")
    usage = Usage.model_validate_json(
        '{"id":"1","ts":"2026-11-23T14:44:46Z","workspace":"acme","team":"r","agent":"a","run":"r","provider":"openai",'
        f'"model":"m","tokens":{{"input":1}},"tags":{{"{TAG}":"{value}"}}}}'
    )
    assert usage.tags[TAG] == value
    assert "Ada" not in value


@pytest.mark.parametrize("key", ["", "2026", "2026=c2hvcnQ=", f"{KEY},2027{KEY[4:]}"])
def test_a_key_that_is_none_is_a_sentence_without_it(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPENDFUSE_SUBJECT_KEY", key)
    with pytest.raises(SettingsError, match="SPENDFUSE_SUBJECT_KEY") as raised:
        Subjects.from_env()
    assert KEY[5:] not in str(raised.value)
