"""The table of topics: key, partitions, cleanup and retention of each."""

from dataclasses import dataclass
from typing import Final, Literal

HOUR_MS: Final = 3_600_000
DAY_MS: Final = 24 * HOUR_MS
LEDGER_RETENTION_DAYS: Final = 400
FOREVER: Final = -1


@dataclass(frozen=True, slots=True)
class Topic:
    """One topic; `partitions` of `0` means the deployment's partition count (fixed at birth)."""

    name: str
    key: str
    partitions: int
    cleanup: Literal["delete", "compact", "compact,delete"]
    retention_ms: int
    what: str

    def configs(self) -> dict[str, str]:
        """Return the Kafka topic settings, explicit so that no broker default decides."""
        settings = {
            "cleanup.policy": self.cleanup,
            "max.message.bytes": str(MESSAGE_BYTES_MAX),
            "message.timestamp.type": "CreateTime",
        }
        if "delete" in self.cleanup:
            settings["retention.ms"] = str(self.retention_ms)
        if "compact" in self.cleanup:
            # A reader that is this far behind still sees every command, not only the last of each key.
            settings["min.compaction.lag.ms"] = str(HOUR_MS)
        return settings


MESSAGE_BYTES_MAX: Final = 1_048_576

USAGE: Final = Topic(
    "spendfuse.usage.v1", "workspace/team/agent (any key is accepted)", 0, "delete", 7 * DAY_MS,
    "usage as emitted, single or packed",
)  # fmt: skip
PACKED: Final = Topic(
    "spendfuse.usage.packed.v1", "partition number", 0, "delete", 7 * DAY_MS,
    "validated usage with its origin; one agent always on one partition",
)  # fmt: skip
DEAD_LETTERS: Final = Topic(
    "spendfuse.usage.dlq.v1", "origin topic/partition/offset", 1, "delete", 30 * DAY_MS,
    "what was refused: its bytes, with reason and origin in the headers",
)  # fmt: skip
BUDGETS: Final = Topic(
    "spendfuse.budgets.v1", "budget id, or workspace/<name>", 1, "compact", FOREVER,
    "budgets and workspace settings, the latest of each",
)  # fmt: skip
PRICES: Final = Topic(
    "spendfuse.prices.v1", "override id", 1, "compact", FOREVER,
    "price overrides, the latest of each",
)  # fmt: skip
COMMANDS: Final = Topic(
    "spendfuse.commands.v1", "scope|budget|cap", 1, "compact,delete", 45 * DAY_MS,
    "signed warn, degrade, halt and resume, the latest of each cap",
)  # fmt: skip
REMAINING: Final = Topic(
    "spendfuse.remaining.v1", "scope|budget|cap", 1, "compact,delete", DAY_MS,
    "what is left of each cap that halts, signed, the latest of each",
)  # fmt: skip
HEARTBEATS: Final = Topic(
    "spendfuse.heartbeats.v1", "emitter", 1, "compact,delete", DAY_MS,
    "signs of life of the workers",
)  # fmt: skip
ACKS: Final = Topic(
    "spendfuse.acks.v1", "scope", 1, "delete", 30 * DAY_MS,
    "guards: command received, command enforced",
)  # fmt: skip
ALERTS: Final = Topic(
    "spendfuse.alerts.v1", "scope", 1, "delete", 30 * DAY_MS,
    "what a person should know",
)  # fmt: skip
ROLLUPS: Final = Topic(
    "spendfuse.rollups.v1", "scope", 0, "delete", DAY_MS,
    "cumulative totals of shared scopes, by packed partition",
)  # fmt: skip
LEDGER: Final = Topic(
    "spendfuse.ledger.v1", "packed partition, or topic", 0, "delete", LEDGER_RETENTION_DAYS * DAY_MS,
    "everything that happened, for the audit",
)  # fmt: skip
BATCHES: Final = Topic(
    "spendfuse.batches.v1", "ledger partition", 1, "compact", FOREVER,
    "headers of the audit's batches, written before their rows",
)  # fmt: skip
CHECKPOINTS: Final = Topic(
    "spendfuse.checkpoints.v1", "origin", 1, "delete", FOREVER,
    "signed notes that say where the audit's chains stood",
)  # fmt: skip

TOPICS: Final[tuple[Topic, ...]] = (
    USAGE, PACKED, DEAD_LETTERS, BUDGETS, PRICES, COMMANDS, REMAINING,
    HEARTBEATS, ACKS, ALERTS, ROLLUPS, LEDGER, BATCHES, CHECKPOINTS,
)  # fmt: skip
