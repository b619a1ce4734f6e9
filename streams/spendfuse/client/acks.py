"""What a guard says of the halts it obeys: received, then enforced, once each."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from spendfuse.client.identity import Identity
from spendfuse.client.keys import Signer
from spendfuse.client.outbox import Message, Outbox
from spendfuse.settings import BrokerSettings
from spendfuse.wire.base import encode, from_us, to_us
from spendfuse.wire.cloudevents import headers
from spendfuse.wire.control import Ack, Command
from spendfuse.wire.signing import SIGNATURE_HEADER
from spendfuse.wire.topics import ACKS

ACKS_MAX: Final = 1_000


@dataclass(slots=True)
class _Obeyed:
    """The halt of one cap that was acknowledged last."""

    seq: int
    live: bool
    tokens_before: int
    enforced: bool = False


class Acks:
    """The acknowledgements of one guard. Its lock protects `received` and `enforced`; neither waits for the broker.

    With a key of the guard's own (`signer`) they are signed: who enrolled it knows that this guard said so.
    """

    def __init__(self, identity: Identity, guard_id: str, broker: BrokerSettings, signer: Signer | None) -> None:
        self._signer = signer
        self._identity = identity
        self._guard_id = guard_id
        self._obeyed: dict[str, _Obeyed] = {}
        self._outbox: Outbox[Ack] = Outbox(
            *(broker, ACKS.name, self._pack), client_id="spendfuse-guard", buffer_max=ACKS_MAX, linger_s=0.0
        )

    def received(self, command: Command, now_us: int, tokens: int, *, live: bool) -> None:
        """Acknowledge a halt that was read; `live` unless it was there before the guard.

        `tokens` are those the agent has used so far.
        """
        self._obeyed[command.key] = _Obeyed(command.seq, live, tokens)
        self._outbox.put(self._ack(command, "received", now_us))

    def enforced(self, halts: Iterable[Command], now_us: int, tokens: int, calls_in_flight: int) -> None:
        """Acknowledge halts as enforced, each once."""
        for command in halts:
            obeyed = self._obeyed.get(command.key)
            if obeyed is None or obeyed.seq != command.seq or obeyed.enforced:
                continue
            obeyed.enforced = True
            ack = self._ack(command, "enforced", now_us)
            since = tokens - obeyed.tokens_before
            self._outbox.put(ack.model_copy(update={"calls_in_flight": calls_in_flight, "tokens_since": since}))

    def flush(self, timeout_s: float) -> bool:
        """Send what waits, and say whether all was sent in time."""
        return self._outbox.flush(timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Send what waits and take no more; say whether all was sent in time."""
        return self._outbox.close(timeout_s)

    @property
    def dropped(self) -> int:
        """Return how many were never sent."""
        return self._outbox.counts().dropped

    def forked(self, guard_id: str) -> None:
        """Begin anew under another id: this is a forked child."""
        self._guard_id = guard_id
        self._obeyed = {}
        self._outbox.forked()

    def _ack(self, command: Command, state: Literal["received", "enforced"], now_us: int) -> Ack:
        # A halt that was there before the guard says nothing about how fast halts arrive.
        live = self._obeyed[command.key].live
        return Ack(
            command_id=command.id,
            seq=command.seq,
            scope=command.scope,
            budget=command.budget,
            cap=command.cap,
            agent=self._identity.agent_scope,
            run=self._identity.run,
            guard=self._guard_id,
            state=state,
            at=from_us(now_us),
            halt_lag_us=now_us - to_us(command.cause.ts) if command.cause is not None and live else None,
        )

    def _pack(self, acks: list[Ack]) -> list[Message[Ack]]:
        messages = []
        for ack in acks:
            key, value = ack.scope.encode(), encode(ack)
            told = headers("ack.v1", f"/guards/{ack.guard}", f"{ack.command_id}:{ack.guard}:{ack.state}", ack.at)
            if self._signer is not None:
                told.append((SIGNATURE_HEADER, self._signer.sign(ACKS.name, key, value)))
            messages.append(Message(key, value, told, (ack,)))
        return messages
