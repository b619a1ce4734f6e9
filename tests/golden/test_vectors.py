"""The vectors of the contract, `schemas/vectors/`: the Python guard and the Node guard make the same of them."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spendfuse.client.accept import Refused, accept
from spendfuse.client.follow import Record
from spendfuse.client.keys import BadSignature, Signer, Verifier
from spendfuse.client.lease import Lease
from spendfuse.client.obey import Obedience
from spendfuse.client.silence import Silence
from spendfuse.pipeline.proofs import GuardKeys
from spendfuse.pipeline.records import SourceRecord
from spendfuse.settings import GuardSettings
from spendfuse.wire.base import to_us
from spendfuse.wire.control import Ack
from spendfuse.wire.signing import SIGNATURE_HEADER

ROOT: Final = Path(__file__).parents[2]
VECTORS: Final = ROOT / "schemas" / "vectors"
SIGNATURES: Final = json.loads((VECTORS / "signatures.json").read_text())
OBEDIENCE: Final = json.loads((VECTORS / "obedience.json").read_text())
ACKS_SIGNED: Final = json.loads((VECTORS / "acks.json").read_text())
SILENCE: Final = json.loads((VECTORS / "silence.json").read_text())
REASONS: Final = {
    "unsigned": "unsigned",
    "malformed": "malformed",
    "unknown key id": "key unknown",
    "was retired at": "key retired",
    "wrong signature": "wrong",
    "newline": "newline",
}


def at_us(text: str) -> int:
    return to_us(datetime.fromisoformat(text))


def test_the_vectors_are_what_their_builder_writes() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "schemas" / "build_vectors.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("vector", SIGNATURES["vectors"], ids=lambda vector: vector["name"])
def test_a_signature_proves_what_the_vector_says(vector: dict[str, Any]) -> None:
    verifier = Verifier.parse(SIGNATURES["public_keys"], lambda: at_us(vector["at"]))
    header = None if vector["header"] is None else vector["header"].encode()
    key, value = (base64.b64decode(vector[name]) for name in ("key_base64", "value_base64"))
    try:
        verdict = verifier.verify(vector["topic"], key, value, header)
    except BadSignature as error:
        (verdict,) = (short for said, short in REASONS.items() if said in str(error))
    assert verdict == vector["verdict"]


def taken_in(records: list[dict[str, Any]]) -> tuple[Obedience, Counter[str]]:
    verifier = Verifier.parse(OBEDIENCE["public_keys"], lambda: at_us(OBEDIENCE["read_at"]))
    obedience, refused = Obedience(OBEDIENCE["scopes"]), Counter[str]()
    for offset, given_record in enumerate(records):
        key, value, header = (each.encode() if each is not None else None for each in given_record.values())
        headers = ((SIGNATURE_HEADER, header),) if header is not None else ()
        try:
            command = accept(Record(OBEDIENCE["topic"], 0, offset, 0, key, value, headers), verifier, unsigned=False)
        except Refused as refusal:
            refused[refusal.reason] += 1
            continue
        if obedience.apply(command) == "old":
            refused["old"] += 1
    return obedience, refused


def answers(obedience: Obedience, asks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for ask in asks:
        verdict = obedience.strictest(at_us(ask["at"]))
        command = verdict.halt or next(iter(verdict.degrades), None)
        found.append(ask | {"action": verdict.action, "seq": command.seq if command is not None else None})
        if "models" in ask:
            found[-1]["models"] = {name: verdict.model(name) for name in ask["models"]}
        if "max_output_tokens" in ask:
            found[-1]["max_output_tokens"] = verdict.max_output_tokens
    return found


@pytest.mark.parametrize("scenario", OBEDIENCE["scenarios"], ids=lambda scenario: scenario["name"])
def test_a_stream_of_commands_leads_to_what_the_vector_says(scenario: dict[str, Any]) -> None:
    obedience, refused = taken_in(scenario["records"])
    assert answers(obedience, scenario["asks"]) == scenario["asks"]
    assert dict(refused) == scenario["refused"]


@settings(deadline=None)
@given(st.sampled_from(OBEDIENCE["scenarios"]), st.data())
def test_what_holds_depends_on_the_set_of_commands_not_on_their_order_or_number(
    scenario: dict[str, Any], data: st.DataObject
) -> None:
    records = scenario["records"]
    again = data.draw(st.lists(st.sampled_from(records), max_size=5)) if records else []
    obedience, _ = taken_in(data.draw(st.permutations([*records, *again])))
    assert answers(obedience, scenario["asks"]) == scenario["asks"]


@pytest.mark.parametrize("vector", ACKS_SIGNED["vectors"], ids=lambda vector: vector["name"])
def test_a_guard_signs_its_acks_as_the_vector_says(vector: dict[str, Any]) -> None:
    key, value, header = (vector[name].encode() for name in ("key", "value", "header"))
    signer = Signer.parse(vector["private_key"])
    assert signer.sign(ACKS_SIGNED["topic"], key, value) == header
    record = SourceRecord(ACKS_SIGNED["topic"], 0, 0, 0, key, value, headers=((SIGNATURE_HEADER, header),))
    proof = GuardKeys.parse(vector["public_key"]).proof(record, Ack.model_validate_json(value))
    assert proof is not None
    assert (proof["kid"], proof["agent"]) == (signer.kid, json.loads(value)["agent"])


@pytest.mark.parametrize("scenario", SILENCE["scenarios"], ids=lambda scenario: scenario["name"])
def test_silence_is_borne_as_the_vector_says(scenario: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    now, tokens = 0.0, 0
    monkeypatch.setattr("spendfuse.client.silence.monotonic", lambda: 1_000.0 + now)
    names = ("stale_after_s", "blind_after_s", "grace_s", "grace_tokens")
    given_settings = {name: SILENCE[name] for name in names} | {"fail_mode": scenario["fail_mode"]}
    one = Silence("agent:a/b/c", "nowhere", GuardSettings.model_validate(given_settings))
    for step in scenario["steps"]:
        now = step["at_s"]
        if step["do"] == "commands":
            one.commands_read = True
        elif step["do"] == "sign":
            one.heard(0.0)
        elif step["do"] == "used":
            tokens += step["tokens"]
        else:
            halted, _ = one.judge(Lease([]), tokens, 0)
            assert (str(one.state), halted is None) == (step["state"], step["go"]), step


def test_the_node_guard_makes_the_same_of_them() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not on the PATH")
    done = subprocess.run(
        [node, "--test", "--test-reporter=tap", "test/"],
        cwd=ROOT / "deploy" / "guards" / "node", capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    vectors = len(SIGNATURES["vectors"]) + len(OBEDIENCE["scenarios"])
    vectors += len(ACKS_SIGNED["vectors"]) + len(SILENCE["scenarios"])
    passed = next(int(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("# pass"))
    assert passed >= vectors
