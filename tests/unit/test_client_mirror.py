"""The mirror file says only what a genuine worker is known to stand behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spendfuse.client.clock import wall_clock
from spendfuse.client.follow import Record
from spendfuse.client.keys import Signer, Verifier, generate
from spendfuse.client.mirror import Mirror
from spendfuse.settings import BrokerSettings, GuardSettings
from spendfuse.wire.base import encode, from_us
from spendfuse.wire.control import Heartbeat
from spendfuse.wire.signing import SIGNATURE_HEADER
from spendfuse.wire.topics import HEARTBEATS

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

PRIVATE, PUBLIC = generate("worker")
FORGER, _ = generate("worker")


def beat(private: str | None, after_us: int = 0) -> Record:
    value = encode(Heartbeat(emitter="w", ts=from_us(wall_clock() + after_us), ready=True, version="0"))
    signed = () if private is None else ((SIGNATURE_HEADER, Signer.parse(private).sign(HEARTBEATS.name, b"w", value)),)
    return Record(HEARTBEATS.name, 0, 0, 0, b"w", value, signed)


def test_a_forged_unsigned_or_recorded_heartbeat_keeps_no_mirror_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_000.0
    monkeypatch.setattr("spendfuse.client.mirror.monotonic", lambda: now)
    settings = GuardSettings(public_keys=PUBLIC, fail_mode="closed", blind_after_s=10)
    mirror = Mirror(tmp_path / "m", BrokerSettings(), settings, Verifier.parse(PUBLIC))
    mirror._on_heartbeats_read()
    genuine = beat(PRIVATE)
    mirror._on_heartbeat(genuine)
    now += 8
    for record in (beat(None, 1_000_000), beat(FORGER, 1_000_000), genuine):
        mirror._on_heartbeat(record)
        assert mirror.content()["silence_s"] == 8
    mirror._on_heartbeat(beat(PRIVATE, 1_000_000))
    assert mirror.content()["silence_s"] == 0
