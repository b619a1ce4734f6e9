"""Guards prove that they stopped: signed acks are proved, others only claimed, and none of them hides a violation."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from pipeline.samples import BOOK, INPUT_NANOS, budget, call, cap
from spendfuse.client.keys import Signer, generate
from spendfuse.pipeline.proofs import GuardKeys
from spendfuse.testing import PipelineDriver
from spendfuse.wire import Ack, Command, encode
from spendfuse.wire.signing import SIGNATURE_HEADER
from spendfuse.wire.topics import ACKS

GUARD, GUARD_PUBLIC = generate("guard-research")
OTHER, OTHER_PUBLIC = generate("guard-support")
IMPOSTOR, _ = generate("guard-research")
STRANGER, _ = generate("stranger")
ENROLLED = f"{GUARD_PUBLIC};scope=team:acme/research,{OTHER_PUBLIC};scope=team:acme/support"
AGENT = "agent:acme/research/planner"


def tripped(guard_keys: str = ENROLLED) -> tuple[PipelineDriver, Command]:
    pipeline = PipelineDriver(
        budgets=[budget("agent:acme/*/*", cap(INPUT_NANOS))], price_book=BOOK, guard_keys=guard_keys
    )
    pipeline.emit(call(pipeline, input=1))
    (halt,) = pipeline.commands()
    return pipeline, halt


def say(pipeline: PipelineDriver, halt: Command, key: str | None, **more: Any) -> bytes:
    """Acknowledge a halt as enforced, signed with a key or not at all; return the ack's bytes."""
    record_key = more.pop("record_key", halt.scope.encode())
    changed = more.pop("changed", False)
    values: dict[str, Any] = {
        "command_id": halt.id, "seq": halt.seq, "scope": halt.scope, "budget": halt.budget, "cap": halt.cap,
        "agent": AGENT, "guard": "guard-1", "state": "enforced", "at": pipeline.now,
    }  # fmt: skip
    value = encode(Ack.model_validate(values | more))
    headers = [] if key is None else [(SIGNATURE_HEADER, Signer.parse(key).sign(ACKS.name, record_key, value))]
    pipeline.put(ACKS.name, value + (b" " if changed else b""), key=record_key, headers=headers)
    return value


def kinds(pipeline: PipelineDriver) -> list[str]:
    """What the ledger has of acks.v1."""
    return [entry.kind for entry in pipeline.ledger() if entry.topic == ACKS.name]


def test_an_ack_that_an_enrolled_key_signed_is_in_the_ledger_with_its_proof() -> None:
    pipeline, halt = tripped()
    said = say(pipeline, halt, GUARD)
    ack, proof = (entry for entry in pipeline.ledger() if entry.topic == ACKS.name)
    assert (ack.kind, proof.kind, ack.offset, proof.offset, ack.index, proof.index) == ("ack", "proof", 0, 0, 0, 1)
    data = proof.data
    assert data is not None
    assert (data["kid"], data["agent"], data["state"]) == ("guard-research", AGENT, "enforced")
    # Whoever has the public key can check it again, without us: by the text of the contract.
    assert base64.b64decode(data["value_base64"]) == said
    key = Ed25519PublicKey.from_public_bytes(base64.b64decode(GUARD_PUBLIC.partition("=")[2]))
    signature = base64.b64decode(data["signature"].rpartition(";")[2])
    prefix = b"spendfuse-sig-v1\nspendfuse.acks.v1\n"
    key.verify(signature, prefix + halt.scope.encode() + b"\n" + said)
    with pytest.raises(InvalidSignature):
        key.verify(signature, prefix + b"agent:acme/research/another\n" + said)


@pytest.mark.parametrize(
    ("key", "enrolled"),
    [(None, ENROLLED), (STRANGER, ENROLLED), (GUARD, ""), (GUARD, f"{GUARD_PUBLIC};until=2020-01-01T00:00:00Z")],
    ids=["unsigned", "by a key nobody enrolled", "where no key is enrolled", "by a key that has ended"],
)
def test_an_ack_is_only_claimed(key: str | None, enrolled: str) -> None:
    pipeline, halt = tripped(enrolled)
    say(pipeline, halt, key)
    assert kinds(pipeline) == ["ack"]
    assert pipeline.dead_letters() == []


def test_what_an_ack_says_of_calls_in_flight_and_tokens_since_is_in_the_ledger_proved_or_claimed() -> None:
    for key, kind in ((None, "claim"), (GUARD, "proof")):
        pipeline, halt = tripped()
        say(pipeline, halt, key, calls_in_flight=3, tokens_since=1_200)
        assert kinds(pipeline) == ["ack", kind]
        data = next(entry.data for entry in pipeline.ledger() if entry.kind == kind) or {}
        assert (data["calls_in_flight"], data["tokens_since"], data["agent"]) == (3, 1_200, AGENT)
        assert data.get("kid") == (None if key is None else "guard-research")


@pytest.mark.parametrize(
    ("key", "more", "why"),
    [
        (IMPOSTOR, {}, "wrong signature of key id guard-research"),
        (GUARD, {"changed": True}, "wrong signature of key id guard-research"),
        (OTHER, {}, "guard key guard-support speaks for team:acme/support alone"),
        (GUARD, {"agent": "agent:acme/research2/planner"}, "speaks for team:acme/research alone"),
        (GUARD, {"record_key": b"agent:acme/research/another"}, "its key is not its scope"),
    ],
    ids=[
        "under another guard's name", "changed after it was signed", "by a stolen guard of another team",
        "for an agent of a team whose name begins alike", "under another key than its scope",
    ],
)  # fmt: skip
def test_an_ack_that_pretends_to_be_proved_is_refused_and_told(key: str, more: dict[str, Any], why: str) -> None:
    pipeline, halt = tripped()
    say(pipeline, halt, key, **more)
    (letter,) = pipeline.dead_letters()
    assert why in letter.reason
    assert kinds(pipeline) == []
    rejected = [entry.data for entry in pipeline.ledger() if entry.kind == "rejected"]
    assert [why in str(data) for data in rejected] == [True]


@pytest.mark.parametrize("key", [None, GUARD, IMPOSTOR], ids=["claimed", "proved by a stolen key", "forged"])
def test_no_ack_hides_who_spends_after_a_halt(key: str | None) -> None:
    pipeline, halt = tripped()
    for nth in range(3):
        say(pipeline, halt, key, guard=f"guard-{nth}")
    pipeline.advance(minutes=5)
    pipeline.emit(call(pipeline, input=2, output=0))
    violations = [alert for alert in pipeline.alerts() if alert.kind == "violation"]
    assert [(alert.scope, alert.severity) for alert in violations] == [(AGENT, "critical")]
    assert violations[0].measure is not None
    assert violations[0].measure.spend == 2 * INPUT_NANOS


def test_what_a_key_is_enrolled_for_is_checked() -> None:
    for text in ("k", f"{GUARD_PUBLIC};scope=run:acme/1", f"{GUARD_PUBLIC};scope=nonsense", f"{GUARD_PUBLIC};scop=a"):
        with pytest.raises(ValueError, match=r"key|bound"):
            GuardKeys.parse(text)


def test_the_proof_says_nothing_that_is_secret() -> None:
    pipeline, halt = tripped()
    say(pipeline, halt, GUARD)
    private = GUARD.partition("=")[2]
    assert private not in json.dumps([entry.model_dump(mode="json") for entry in pipeline.ledger()])
