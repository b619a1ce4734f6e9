"""Which deployment a command speaks to: the options, else the environment, else a running `spendfuse up`."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import Field, SecretStr

from spendfuse.cli.faults import EXIT_SETTINGS, CliError
from spendfuse.cli.state_dir import UpState, running
from spendfuse.client.clock import Clock, parse_clock
from spendfuse.client.keys import Signer, Verifier
from spendfuse.settings import FILE_SUFFIX, PREFIX, BrokerSettings, ClockSettings, Settings, SettingsError

SERVERS_ENV: Final = "SPENDFUSE_BOOTSTRAP_SERVERS"
SIGNING_KEY_FILE_ENV: Final = "SPENDFUSE_SIGNING_KEY_FILE"


class OperatorSettings(Settings):
    """What a person's commands need: the key that signs them, and the keys that guards know."""

    app_id: str = Field("spendfuse", description="consumer group and prefix of changelog topics")
    partitions: int | None = Field(None, ge=1, le=1_000, description="partitions the deployment wants")
    signing_key: SecretStr = Field(SecretStr(""), description="kid=base64 of the private key")
    public_keys: str = Field("", description="kid=base64 of each public key")
    unsigned_commands: bool = Field(False, description="development only")


@dataclass(frozen=True, slots=True)
class Target:
    """A deployment: how to reach it, whence that is known, and its settings as an environment."""

    broker: BrokerSettings
    known_by: str
    env: Mapping[str, str]
    up: UpState | None

    @property
    def servers(self) -> str:
        """Return the bootstrap servers, for messages."""
        return self.broker.bootstrap_servers

    @property
    def clock(self) -> Clock:
        """Return the deployment's clock."""
        return parse_clock(ClockSettings.from_env(self.env).clock)

    @property
    def operator(self) -> OperatorSettings:
        """Return the settings of a person's commands."""
        return OperatorSettings.from_env(self.env)

    def verifier(self) -> Verifier | None:
        """Return what checks commands, None without public keys; raises SettingsError for keys that are none."""
        keys = self.operator.public_keys
        if not keys:
            return None
        try:
            return Verifier.parse(keys)
        except ValueError as error:
            raise SettingsError(f"SPENDFUSE_PUBLIC_KEYS cannot be used: {error}") from error

    def signer(self) -> Signer | None:
        """Return what signs commands, None where they may go unsigned; raises CliError or SettingsError."""
        operator = self.operator
        key = operator.signing_key.get_secret_value()
        if key:
            try:
                return Signer.parse(key)
            except ValueError as error:
                raise SettingsError(f"SPENDFUSE_SIGNING_KEY cannot be used: {error}") from error
        if operator.unsigned_commands:
            return None
        raise CliError(
            "there is no key to sign with, and guards obey signed commands only: set SPENDFUSE_SIGNING_KEY_FILE to the "
            "file of the private key (make a pair with `spendfuse keys new`), or run where `spendfuse up` runs",
            EXIT_SETTINGS,
        )


def find(servers: str | None, state_dir: Path, *, ours: bool = False) -> Target:
    """Return the deployment to speak to; `ours` means a running `spendfuse up` in any case. Raises SettingsError.

    A running `spendfuse up` is meant when no servers are named, or its own: then its timings and keys are used where
    the environment says nothing else.
    """
    named = servers or os.environ.get(SERVERS_ENV)
    up = running(state_dir)
    if ours and up is not None:
        return Target(BrokerSettings.from_env(up.env), f"spendfuse up in {state_dir}", up.env, up)
    if up is not None and named in (None, "", up.env.get(SERVERS_ENV)):
        env = _beneath(
            {**up.env, SIGNING_KEY_FILE_ENV: up.signing_key_file, "SPENDFUSE_PARTITIONS": str(up.partitions)}
        )
        known_by = f"spendfuse up (pid {up.pid}) in {state_dir}"
    else:
        up, env = None, dict(os.environ)
        known_by = "the default" if not named else "--bootstrap-servers" if servers else SERVERS_ENV
    if servers:
        env[SERVERS_ENV] = servers
    return Target(BrokerSettings.from_env(env), known_by, env, up)


def _beneath(defaults: Mapping[str, str]) -> dict[str, str]:
    """Return the environment over some defaults; a variable replaces its `..._FILE` twin too, and the other way."""
    env = dict(os.environ)
    for name, value in defaults.items():
        plain = name.removesuffix(FILE_SUFFIX)
        if not (env.get(plain) or env.get(plain + FILE_SUFFIX)):
            env[name] = value
    return env


def wall_ms() -> int:
    """Return the machine's time in milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


__all__ = ["PREFIX", "OperatorSettings", "Target", "find", "wall_ms"]
