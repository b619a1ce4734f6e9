"""From the environment to identities, clients and connections; and what a person is told when it cannot be."""

from __future__ import annotations

import logging
import pickle
from typing import Any

import pytest

import spendfuse.client
from spendfuse.client import Guard, Halted, Meter
from spendfuse.client.connection import consumer_options, producer_options
from spendfuse.client.identity import Identity
from spendfuse.settings import BrokerSettings, IdentitySettings, SettingsError

WHO = {"workspace": "acme", "team": "research", "agent": "planner-7"}


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("SPENDFUSE_"):
            monkeypatch.delenv(name)


def identity(**more: str) -> Identity:
    return Identity.of(IdentitySettings.from_env({}, **WHO, **more))


def test_a_run_of_its_own_is_its_own_root() -> None:
    assert identity(run="r1").scopes == (
        "agent:acme/research/planner-7",
        "team:acme/research",
        "workspace:acme",
        "run:acme/r1",
    )
    assert identity(run="r1", root_run="r1").root_run is None


def test_a_subagent_is_halted_by_its_root_run() -> None:
    assert identity(run="r2", root_run="r1", parent_run="r1").scopes[-1] == "run:acme/r1"


def test_meter_and_guard_of_one_process_share_its_run() -> None:
    assert identity().run == identity().run


def test_every_name_at_fault_is_reported_at_once() -> None:
    settings = IdentitySettings.from_env({}, workspace="a/b", team="t@example.org", agent="ok", run="has space")
    with pytest.raises(SettingsError) as caught:
        Identity.of(settings)
    text = str(caught.value)
    assert all(name in text for name in ("SPENDFUSE_WORKSPACE", "SPENDFUSE_TEAM", "SPENDFUSE_RUN"))
    assert "SPENDFUSE_AGENT" not in text


def test_a_guard_without_keys_says_which_variable_to_set() -> None:
    with pytest.raises(SettingsError, match="SPENDFUSE_PUBLIC_KEYS"):
        Guard.from_env(**WHO)
    with pytest.raises(SettingsError, match="SPENDFUSE_PUBLIC_KEYS: key k has 6 bytes"):
        Guard.from_env(**WHO, public_keys="k=c2VjcmV0")


def test_a_setting_that_does_not_exist_is_named() -> None:
    with pytest.raises(SettingsError, match="no such settings: meter_bufer_max"):
        Meter.from_env(**WHO, meter_bufer_max=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": ""},
        {"provider": "Open AI"},
        {"input": -1},
        {"input": 1.5},
        {"output": 1, "reasoning": 2},
        {"id": "two words"},
        {"tags": {"k": "a\nb"}},
        {"tokens": spendfuse.client.Tokens(input=1), "output": 1},
    ],
)
def test_an_invalid_usage_is_a_value_error_and_nothing_is_emitted(wrong: dict[str, Any]) -> None:
    meter = Meter.from_env(**WHO)
    with pytest.raises(ValueError, match=r".+"):
        meter.record(**{"provider": "openai", "model": "gpt-5", **wrong})
    assert meter.stats.emitted == 0
    assert meter.close()


def test_a_usage_after_the_end_is_dropped_counted_and_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    meter = Meter.from_env(**WHO)
    assert meter.close()
    with caplog.at_level(logging.WARNING, "spendfuse"):
        meter.record(provider="openai", model="gpt-5", input=1)
    assert meter.stats[:4] == (1, 0, 1, 0)
    assert "after the meter was closed" in caplog.text


def test_a_halt_survives_the_way_between_processes() -> None:
    again = pickle.loads(pickle.dumps(Halted("agent a is halted")))  # noqa: S301 - our own bytes
    assert (str(again), again.command) == ("agent a is halted", None)


def test_security_settings_reach_the_clients_and_no_repr() -> None:
    broker = BrokerSettings.from_env(
        {},
        security_protocol="SASL_SSL",
        sasl_username="u",
        sasl_password="hush",
        producer_max_batch_size=1,
        fetch_max_wait_ms=20,
    )
    produced, consumed = producer_options(broker, "me"), consumer_options(broker, "me")
    for options in (produced, consumed):
        assert options["sasl_plain_username"] == "u"
        assert options["sasl_plain_password"] == "hush"
        assert options["sasl_mechanism"] == "SCRAM-SHA-512"
        assert options["ssl_context"].check_hostname
    assert (produced["acks"], produced["linger_ms"], produced["max_batch_size"]) == ("all", 0, 1)
    assert consumed["fetch_max_wait_ms"] == 20
    assert not consumed["enable_auto_commit"]
    assert "hush" not in repr(broker)


def test_plaintext_needs_neither() -> None:
    options = producer_options(BrokerSettings.from_env({}), "me")
    assert "ssl_context" not in options
    assert not [name for name in options if name.startswith("sasl")]


def test_the_example_in_the_docstring_runs(caplog: pytest.LogCaptureFixture) -> None:
    import doctest

    results = doctest.testmod(spendfuse.client, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted >= 6
    assert results.failed == 0
