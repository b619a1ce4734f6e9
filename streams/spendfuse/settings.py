"""Settings: one frozen model for each concern, read from `SPENDFUSE_...`, every error reported at once.

A secret may be given as `NAME` or as a file named by `NAME_FILE`; it never appears in a message or a repr.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

PREFIX: Final = "SPENDFUSE_"
FILE_SUFFIX: Final = "_FILE"
SECRET_FILE_BYTES_MAX: Final = 65_536
RETENTION_DAYS_FLOOR: Final = 184
"""Fewest days the audit's usage is kept: more than six months (EU AI Act, articles 19 and 26(6))."""
RETENTION_DAYS_MAX: Final = 400
"""The time to live of the tables: what is older is gone in any case."""


class SettingsError(Exception):
    """Settings that cannot be used: one line for each, with the variable to change."""


class Settings(BaseModel):
    """A group of settings that reads itself from the environment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None, **given: object) -> Self:
        """Return the settings: what is given, else the environment, else the default.

        Raises `SettingsError` with every fault at once.
        """
        source = os.environ if env is None else env
        values: dict[str, object] = {}
        faults: list[str] = []
        for field in cls.model_fields:
            name = PREFIX + field.upper()
            if source.get(name):
                values[field] = source[name]
            elif source.get(name + FILE_SUFFIX):
                try:
                    values[field] = _read_bounded(Path(source[name + FILE_SUFFIX]))
                except (OSError, ValueError) as error:
                    faults.append(f"{name}{FILE_SUFFIX}: {error}")
        values.update({key: value for key, value in given.items() if value is not None})
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            faults += [
                f"{PREFIX}{'.'.join(str(part) for part in fault['loc']).upper()}: {fault['msg']}"
                for fault in error.errors(include_input=False, include_url=False)
            ]
        if faults:
            raise SettingsError("settings cannot be used:\n" + "\n".join(f"  {fault}" for fault in faults))
        return settings

    @classmethod
    def table(cls) -> list[tuple[str, str, str]]:
        """Return (environment name, default, what it is) of each setting, for the README."""
        return [
            (
                PREFIX + name.upper(),
                "required" if field.is_required() else str(field.get_default(call_default_factory=True)),
                field.description or "",
            )
            for name, field in cls.model_fields.items()
        ]


def _read_bounded(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        text = file.read(SECRET_FILE_BYTES_MAX + 1)
    if len(text) > SECRET_FILE_BYTES_MAX:
        raise ValueError(f"{path} is larger than {SECRET_FILE_BYTES_MAX} bytes: not a secret")
    return text.strip()


class BrokerSettings(Settings):
    """How to reach Kafka. The timings suit Apache Kafka; `embedded` brokers give their own."""

    bootstrap_servers: str = Field("127.0.0.1:9092", description="Kafka bootstrap servers, host:port[,host:port]")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="Kafka security protocol"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "SCRAM-SHA-512", description="SASL mechanism, with SASL_PLAINTEXT or SASL_SSL"
    )
    sasl_username: str = Field("", description="SASL user")
    sasl_password: SecretStr = Field(SecretStr(""), description="SASL password (secret; or ..._FILE)")
    ssl_cafile: str = Field("", description="file of CA certificates, for SSL and SASL_SSL")
    fetch_max_wait_ms: Annotated[int, Field(ge=1, le=30_000)] = Field(
        500, description="longest a fetch waits at the broker; 20 on the embedded broker"
    )
    producer_max_batch_size: Annotated[int, Field(ge=1, le=1_048_576)] = Field(
        65_536, description="bytes of one produced batch; 1 on the embedded broker"
    )
    session_timeout_ms: Annotated[int, Field(ge=1_000, le=300_000)] = Field(
        6_000, description="silence after which a consumer's partitions move; Kafka takes no less than 6000 by default"
    )
    rebalance_timeout_ms: Annotated[int, Field(ge=1_000, le=300_000)] = Field(
        10_000, description="longest a rebalance waits for its members"
    )
    heartbeat_interval_ms: Annotated[int, Field(ge=100, le=60_000)] = Field(
        500, description="interval of a consumer's heartbeats: how soon the others hear of one that joins or leaves"
    )


class IdentitySettings(Settings):
    """Whose money an emitter or guard speaks of."""

    workspace: str = Field(description="workspace name")
    team: str = Field(description="team name")
    agent: str = Field(description="agent name")
    run: str = Field("", description="run id; made anew for each process when empty")
    root_run: str = Field("", description="id of the run at the root of the tree; the run itself when empty")
    parent_run: str = Field("", description="id of the run that started this one")


class SubjectSettings(Settings):
    """How a person's id is made into a keyed hash before it leaves the process."""

    subject_key: SecretStr = Field(
        SecretStr(""), description="kid=base64 of the key that hashes person ids (secret; or ..._FILE)"
    )


class ClockSettings(Settings):
    """Which clock: the machine's, or one that runs faster from a start (demos and replays)."""

    clock: Annotated[str, Field(pattern=r"^(wall|scaled:\d+:\d+:\d+)$")] = Field(
        "wall", description="wall, or scaled:<wall start us>:<event start us>:<factor>"
    )


class GuardSettings(Settings):
    """How a guard obeys."""

    public_keys: str = Field("", description="kid=base64 of each Ed25519 public key, comma-separated (or ..._FILE)")
    unsigned_commands: bool = Field(False, description="obey unsigned commands: development only")
    stale_after_s: Annotated[float, Field(gt=0)] = Field(15.0, description="no heartbeat for so long: STALE")
    blind_after_s: Annotated[float, Field(gt=0)] = Field(120.0, description="no heartbeat for so long: BLIND")
    sync_timeout_s: Annotated[float, Field(ge=0, le=60)] = Field(
        2.0, description="longest the first check waits to have read all commands"
    )
    fail_mode: Literal["bounded", "closed", "open"] = Field(
        "bounded",
        description="without a sign of life: bounded goes on within the grace and then halts, closed halts once BLIND, "
        "open obeys the last known for ever",
    )
    guard_key: SecretStr = Field(
        SecretStr(""),
        description="kid=base64 of this guard's own Ed25519 private key, which signs its acks (secret; or ..._FILE)",
    )
    grace_s: Annotated[float, Field(ge=0, le=86_400)] = Field(
        300.0, description="how long a BLIND guard lets its agent go on, with fail_mode bounded"
    )
    grace_tokens: Annotated[int, Field(ge=0)] = Field(
        50_000, description="how many tokens its agent may use meanwhile, as far as a Meter of the process emits them"
    )
    guard_dir: str = Field(
        "~/.local/state/spendfuse/guard",
        description="where a guard keeps the halts that hold, so that a restart does not forget them; off: nowhere",
    )


class MeterSettings(Settings):
    """How usage is emitted."""

    meter_buffer_max: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        10_000,
        description="usages held while the broker is away; the oldest are dropped beyond it, and counted",
    )
    meter_linger_ms: Annotated[int, Field(ge=0, le=10_000)] = Field(
        10, description="how long usages are collected into one message, behind one that was sent at once"
    )
    meter_flush_timeout_s: Annotated[float, Field(ge=0, le=600)] = Field(
        5.0, description="longest a process waits at its end for what is buffered"
    )


class WorkerSettings(Settings):
    """How a worker meters and decides."""

    app_id: str = Field("spendfuse", description="consumer group and prefix of changelog topics")
    partitions: Annotated[int, Field(ge=1, le=1_000)] = Field(
        4, description="partitions of usage, packed, rollup and ledger topics; fixed at birth"
    )
    replication: Annotated[int, Field(ge=1, le=5)] = Field(1, description="replicas of each topic")
    flush_interval_ms: Annotated[int, Field(ge=10, le=5_000)] = Field(
        250, description="how often touched state is written and the source acknowledged"
    )
    rollup_interval_ms: Annotated[int, Field(ge=5, le=5_000)] = Field(
        25, description="how often shares of teams, workspaces and runs that have a cap are published"
    )
    usage_age_max_s: Annotated[int, Field(ge=60)] = Field(
        7 * 86_400, description="usage older than this goes to the dead letters"
    )
    usage_ahead_max_s: Annotated[int, Field(ge=0)] = Field(
        300, description="usage dated further in the future goes to the dead letters"
    )
    state_idle_days: Annotated[int, Field(ge=1, le=3_650)] = Field(
        35,
        description="a scope idle for so many days is forgotten once its windows have closed and no order stands; "
        "never sooner than 14 days and SPENDFUSE_USAGE_AGE_MAX_S",
    )
    heartbeat_s: Annotated[float, Field(gt=0, le=60)] = Field(2.0, description="interval of heartbeats")
    stale_lag_s: Annotated[int, Field(ge=1, le=86_400)] = Field(
        30, description="usage read so long after it was written: decisions are stale, and heartbeats say so"
    )
    audit_lag_s: Annotated[int, Field(ge=5, le=86_400)] = Field(
        300, description="a ledger message not in ClickHouse after so long raises an alert; halts go on without it"
    )
    ready_timeout_s: Annotated[float, Field(gt=0)] = Field(120.0, description="a worker not ready by then ends")
    ready_file: str = Field("", description="file that exists while the worker is ready (health checks)")
    price_book_file: str = Field("", description="price book to use instead of the one shipped")
    signing_key: SecretStr = Field(
        SecretStr(""),
        description="kid=base64 of the Ed25519 private key that signs commands (secret; or ..._FILE)",
    )
    public_keys: str = Field(
        "",
        description="further keys whose commands are genuine, as guards have them: operators', and one being retired",
    )
    unsigned_commands: bool = Field(False, description="publish commands unsigned: development only")
    guard_keys: str = Field(
        "",
        description="kid=base64[;scope=team:...] of each guard's public key: its acks are proved, others' only claimed "
        "(or ..._FILE)",
    )
    violation_grace_s: Annotated[float, Field(ge=0, le=86_400)] = Field(
        60.0, description="a call that ends later than this after a halt of its scope is a violation"
    )
    data_dir: str = Field(".spendfuse/worker", description="the worker's own files")


class AuditSettings(Settings):
    """Where the trail is kept."""

    clickhouse_url: str = Field(
        "", description="http(s)://user@host:port/database of a ClickHouse server; embedded chDB when empty"
    )
    clickhouse_password: SecretStr = Field(SecretStr(""), description="its password (secret; or ..._FILE)")
    chdb_dir: str = Field(".spendfuse/clickhouse", description="directory of the embedded ClickHouse")
    database: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_]{0,62}$")] = Field("spendfuse", description="database")
    http_port: Annotated[int, Field(ge=0, le=65_535)] = Field(
        8124, description="loopback port of the embedded ClickHouse's HTTP endpoint; 0 picks a free one"
    )
    http_token: SecretStr = Field(SecretStr(""), description="password of that endpoint (secret; or ..._FILE)")
    batch_rows_max: Annotated[int, Field(ge=1, le=100_000)] = Field(5_000, description="rows of one insert")
    batch_wait_ms: Annotated[int, Field(ge=10, le=60_000)] = Field(1_000, description="longest a row waits for it")
    retention_days: Annotated[int, Field(ge=RETENTION_DAYS_FLOOR, le=RETENTION_DAYS_MAX)] = Field(
        RETENTION_DAYS_MAX, description="days after which `audit retention` drops a month of usage; at least 184"
    )
    audit_key: SecretStr = Field(
        SecretStr(""),
        description="name=base64 of the Ed25519 private key that signs checkpoints (secret; or ..._FILE); "
        "an embedded audit without one makes its own",
    )
    audit_public_keys: str = Field(
        "", description="name=base64 of the public keys that `audit verify` checks checkpoints with (or ..._FILE)"
    )
    checkpoint_s: Annotated[int, Field(ge=1, le=86_400)] = Field(300, description="seconds between checkpoints")
    checkpoint_file: str = Field(
        "",
        description="file that checkpoints are appended to; checkpoints.notes in the ClickHouse directory when empty",
    )
