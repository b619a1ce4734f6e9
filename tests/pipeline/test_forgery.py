"""Somebody else may write to the control topic: nothing of it passes for a command, and all of it is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.samples import INPUT_NANOS, budget, call, cap
from spendfuse.client.accept import Refused, accept
from spendfuse.client.follow import Record
from spendfuse.client.keys import Signer, Verifier, generate
from spendfuse.client.obey import Obedience
from spendfuse.testing import PipelineDriver
from spendfuse.wire import Command, encode
from spendfuse.wire.base import from_us
from spendfuse.wire.control import MANUAL_BUDGET, MANUAL_CAP
from spendfuse.wire.signing import SIGNATURE_HEADER, bytes_to_sign
from spendfuse.wire.topics import COMMANDS, DEAD_LETTERS

WORKER, WORKER_PUBLIC = generate("worker")
OPERATOR, OPERATOR_PUBLIC = generate("operator")
STRANGER, _ = generate("stranger")
IMPOSTOR, _ = generate("worker")
AGENT = "agent:acme/research/planner"


def driver(*budgets: Any) -> PipelineDriver:
    return PipelineDriver(budgets=budgets, signing_key=WORKER, public_keys=OPERATOR_PUBLIC)


def tripped() -> PipelineDriver:
    """A driver in which the agent's day cap has tripped, once."""
    pipeline = driver(budget("agent:acme/*/*", cap(INPUT_NANOS)))
    pipeline.emit(call(pipeline, input=1))
    assert [command.action for command in pipeline.commands()] == ["halt"]
    return pipeline


def order(pipeline: PipelineDriver, action: str = "resume", seq: int = 2**52, **more: Any) -> Command:
    values = {
        "id": f"{seq:032x}", "seq": seq, "action": action, "scope": AGENT, "budget": MANUAL_BUDGET, "cap": MANUAL_CAP,
        "issued_at": pipeline.now, "by": "mallory",
    }  # fmt: skip
    return Command.model_validate(values | more)


def put(pipeline: PipelineDriver, command: Command, key: str | None, **more: Any) -> None:
    """Write a command, signed with a key or not at all, under its own key unless another is given."""
    record_key = more.pop("record_key", command.key.encode())
    value = more.pop("value", encode(command))
    headers = [] if key is None else [(SIGNATURE_HEADER, Signer.parse(key).sign(COMMANDS.name, record_key, value))]
    pipeline.put(COMMANDS.name, value, key=record_key, headers=more.pop("headers", headers), **more)


def recorded(pipeline: PipelineDriver) -> set[str]:
    """Who gave the commands that the ledger calls commands."""
    return {entry.command.by for entry in pipeline.ledger() if entry.kind == "command" and entry.command is not None}


def told(pipeline: PipelineDriver) -> list[tuple[str, str, str]]:
    return [(alert.severity, alert.scope, alert.message) for alert in pipeline.alerts() if alert.kind == "forged"]


def halted(pipeline: PipelineDriver, *, compacted: bool = False) -> bool:
    """What a guard that starts now makes of the topic: of all of it, or of what compaction leaves."""
    verifier = Verifier.parse(f"{WORKER_PUBLIC},{OPERATOR_PUBLIC}")
    obedience = Obedience([AGENT, "team:acme/research", "workspace:acme"])
    records = pipeline.records(COMMANDS.name)
    for record in {each.key: each for each in records}.values() if compacted else records:
        try:
            obedience.apply(accept(Record(*record[:6], tuple(record.headers)), verifier, unsigned=False))
        except Refused:
            continue
    return obedience.strictest(pipeline.now_us).halt is not None


def halted_by_key_of_worker_alone(pipeline: PipelineDriver) -> bool:
    """What a guard makes of the topic that knows the worker's key and no other."""
    obedience, verifier = Obedience([AGENT]), Verifier.parse(WORKER_PUBLIC)
    for record in pipeline.records(COMMANDS.name):
        try:
            obedience.apply(accept(Record(*record[:6], tuple(record.headers)), verifier, unsigned=False))
        except Refused:
            continue
    return obedience.strictest(pipeline.now_us).halt is not None


def signed_by_a_copied_header(pipeline: PipelineDriver) -> dict[str, Any]:
    (genuine,) = pipeline.records(COMMANDS.name)
    return {"headers": list(genuine.headers)}


ATTACKS: dict[str, tuple[str, Any]] = {
    "unsigned": ("unsigned", lambda p: put(p, order(p), None)),
    "with a key nobody knows": ("unknown key id stranger", lambda p: put(p, order(p), STRANGER)),
    "under the name of the worker's key": ("wrong signature of key id worker", lambda p: put(p, order(p), IMPOSTOR)),
    "with the signature of another command": (
        "wrong signature of key id worker",
        lambda p: put(p, order(p), None, **signed_by_a_copied_header(p)),
    ),
    "changed after it was signed": (
        "wrong signature of key id worker",
        lambda p: put(
            p, p.commands()[0], None, **signed_by_a_copied_header(p),
            value=encode(p.commands()[0].model_copy(update={"action": "resume", "seq": 2**52})),
        ),
    ),
    "of one scope under the key of another": (
        "key: ",
        lambda p: put(p, order(p, scope="agent:acme/other/one"), OPERATOR, record_key=p.commands()[0].key.encode()),
    ),
    "signed for another topic": (
        "wrong signature of key id operator",
        lambda p: put(
            p, order(p), None, headers=[(
                SIGNATURE_HEADER,
                Signer.parse(OPERATOR).sign("spendfuse.budgets.v1", order(p).key.encode(), encode(order(p))),
            )],
        ),
    ),
    "with a newline in its key": (
        "a newline cannot be signed",
        lambda p: put(
            p, order(p), None, record_key=order(p).key.encode() + b"\n" + encode(order(p)), value=b"",
            headers=[(SIGNATURE_HEADER, Signer.parse(OPERATOR).sign(COMMANDS.name, b"k", b"v"))],
        ),
    ),
    "of 900,000 bytes": ("unsigned", lambda p: put(p, order(p), None, value=b"{" * 900_000)),
    "with a signature of 100,000 bytes": (
        "malformed signature header", lambda p: put(p, order(p), None, headers=[(SIGNATURE_HEADER, b"e" * 100_000)]),
    ),
    "as a tombstone": ("tombstone", lambda p: p.put(COMMANDS.name, None, key=p.commands()[0].key.encode())),
    "without a key": ("unsigned", lambda p: p.put(COMMANDS.name, encode(order(p)))),
    "signed, and no command": ("invalid", lambda p: put(p, order(p), OPERATOR, value=b'{"v":1}')),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_a_record_is_no_command(name: str) -> None:
    """... that an attacker with the right to produce wrote: refused with its reason, recorded as rejected, and told."""
    reason, attack = ATTACKS[name]
    pipeline = tripped()
    attack(pipeline)
    assert recorded(pipeline) == {"spendfuse"}
    (dead,) = pipeline.dead_letters()
    assert (dead.topic, reason in dead.reason) == (COMMANDS.name, True), dead.reason
    (rejected,) = (entry.data for entry in pipeline.ledger() if entry.kind == "rejected")
    assert rejected is not None
    assert (rejected["topic"], rejected["reason"]) == (COMMANDS.name, dead.reason)
    ((severity, _, message),) = told(pipeline)
    assert (severity, reason in message) == ("critical", True)
    assert halted(pipeline)
    assert halted(pipeline, compacted=True)


def test_the_newline_attack_would_work_without_its_rule() -> None:
    """The bytes of key `a`, value `b\\nv` and of key `a\\nb`, value `v` would be the same."""
    with pytest.raises(ValueError, match="newline"):
        bytes_to_sign(COMMANDS.name, b"a\nb", b"v")
    assert bytes_to_sign(COMMANDS.name, b"a", b"b\nv").endswith(b"a\nb\nv")


def test_an_operators_key_commands_and_a_guards_public_keys_sign_nothing() -> None:
    pipeline = tripped()
    put(pipeline, order(pipeline, by="ada", action="halt", scope="workspace:acme"), OPERATOR)
    assert recorded(pipeline) == {"spendfuse", "ada"}
    assert told(pipeline) == []
    stolen = Verifier.parse(f"{WORKER_PUBLIC},{OPERATOR_PUBLIC}")
    assert not [name for name in dir(stolen) if "sign" in name.lower()]
    raw = OPERATOR_PUBLIC.partition("=")[2]
    put(pipeline, order(pipeline, action="resume", scope="workspace:acme"), f"operator={raw}")  # used as if private
    assert recorded(pipeline) == {"spendfuse", "ada"}
    assert "wrong signature of key id operator" in told(pipeline)[0][2]


def test_a_flood_of_forgeries_is_one_alert_for_each_reason_and_read() -> None:
    pipeline = tripped()
    pipeline.advance(seconds=1)
    key = pipeline.commands()[0].key.encode()
    flood = [(key, None), (key, b"{}")] * 200
    topics = pipeline._topics
    for record_key, value in flood:  # all of it before the worker reads again
        topics.append(COMMANDS.name, 0, key=record_key, value=value, headers=(), timestamp_ms=1)
    pipeline.flush()
    assert len(pipeline.dead_letters()) == 400
    assert sorted(message.split(";")[1].split(" such")[0] for _, _, message in told(pipeline)) == [" 200", " 200"]
    restored = [
        record
        for record in pipeline.records(COMMANDS.name)
        if record.value and SIGNATURE_HEADER in dict(record.headers)
    ]
    assert len(restored) == 2  # the genuine one, and once more after the flood
    assert halted(pipeline, compacted=True)


def test_an_old_topic_replayed_changes_no_guard_and_is_told() -> None:
    pipeline = tripped()
    for seq, action in ((1, "halt"), (2, "resume"), (3, "halt")):
        put(pipeline, order(pipeline, action, seq, by="ada", scope="team:acme/research"), OPERATOR)
    everything = pipeline.records(COMMANDS.name)
    assert told(pipeline) == []
    pipeline.advance(hours=1)
    for record in everything:
        pipeline.put(COMMANDS.name, record.value, key=record.key, headers=record.headers)
    assert {severity for severity, _, _ in told(pipeline)} == {"warning"}
    assert len(told(pipeline)) == 2  # of the halt and the resume that were replaced; the others say what holds anyway
    by_scope = {command.scope: command for command in pipeline.commands()}  # what compaction leaves
    assert by_scope["team:acme/research"].seq == 3
    assert halted(pipeline, compacted=True)


def test_a_resend_after_a_crash_is_no_replay() -> None:
    pipeline = PipelineDriver(budgets=[budget("agent:acme/*/*", cap(INPUT_NANOS))], signing_key=WORKER, autoflush=False)
    pipeline.emit(call(pipeline, input=1))
    pipeline.crash()
    pipeline.flush()
    pipeline.crash()
    pipeline.flush()
    assert told(pipeline) == []
    assert pipeline.dead_letters() == []


def test_a_retired_key_commands_until_its_end_and_not_after() -> None:
    probe = PipelineDriver()
    end = from_us(probe.now_us + 3_600_000_000).isoformat()
    pipeline = PipelineDriver(signing_key=WORKER, public_keys=f"{OPERATOR_PUBLIC};until={end}")
    put(pipeline, order(pipeline, by="ada", action="halt", seq=1), OPERATOR)
    pipeline.advance(minutes=61)
    put(pipeline, order(pipeline, by="thief", action="resume", seq=2), OPERATOR)
    assert recorded(pipeline) == {"ada"}
    assert "key id operator was retired at" in told(pipeline)[0][2]
    signers = [record.headers[-1][1].split(b";")[1] for record in pipeline.records(COMMANDS.name)]
    # The worker put its own name to the operator's halt at once, and once more after the thief: guards forget nothing.
    assert signers == [b"kid=operator", b"kid=worker", b"kid=operator", b"kid=worker"]
    assert halted_by_key_of_worker_alone(pipeline)


def test_what_is_refused_is_counted_and_kept_even_when_the_worker_dies_amid_it() -> None:
    pipeline = tripped()
    pipeline.crash(after_records=1)
    put(pipeline, order(pipeline), STRANGER)
    pipeline.flush()
    reasons = {json.dumps(entry.data, sort_keys=True) for entry in pipeline.ledger() if entry.kind == "rejected"}
    assert any("unknown key id stranger" in text for text in reasons)
    assert {alert.id for alert in pipeline.alerts() if alert.kind == "forged"}
    assert len({alert.id for alert in pipeline.alerts() if alert.kind == "forged"}) == 1
    assert pipeline.records(DEAD_LETTERS.name)
