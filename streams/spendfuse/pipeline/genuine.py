"""The keys of a worker: what it signs commands with, and whose commands it takes for genuine."""

from spendfuse.client.keys import PublicKey, Signer, Verifier, parse_public_keys
from spendfuse.settings import SettingsError, WorkerSettings


def signer_of(settings: WorkerSettings) -> Signer | None:
    """Return what signs commands, None where they may go unsigned (development); raises `SettingsError`."""
    key = settings.signing_key.get_secret_value()
    if key:
        try:
            return Signer.parse(key)
        except ValueError as error:
            raise SettingsError(f"SPENDFUSE_SIGNING_KEY cannot be used: {error}") from error
    if settings.unsigned_commands:
        return None
    raise SettingsError(
        "SPENDFUSE_SIGNING_KEY or SPENDFUSE_SIGNING_KEY_FILE must hold the key that signs commands "
        "(make one with `spendfuse keys new`); SPENDFUSE_UNSIGNED_COMMANDS=true does without, in development only"
    )


def verifier_of(signer: Signer | None, settings: WorkerSettings) -> Verifier | None:
    """Return what knows a genuine command: our own key, and those that operators and former workers sign with."""
    if signer is None:
        return None
    try:
        further = parse_public_keys(settings.public_keys) if settings.public_keys else {}
        return Verifier(further | {signer.kid: PublicKey(signer.public_bytes)})
    except ValueError as error:
        raise SettingsError(f"SPENDFUSE_PUBLIC_KEYS cannot be used: {error}") from error
