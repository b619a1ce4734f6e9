"""A person in the trail: a keyed hash, made before anything leaves the process.

subjects = Subjects.from_env()     # SPENDFUSE_SUBJECT_KEY_FILE
meter.record(..., tags={"subject": subjects.of("acme", "ada@example.org")})

The hash is HMAC-SHA256 under a key of the workspace's that only emitters hold. It is pseudonymous, not anonymous: who
has the key can try ids. Once every copy of the key is destroyed (`spendfuse audit forget`), it leads to nobody.
"""

import hashlib
import hmac
from typing import Final, Self

from spendfuse.client.keys import parse_keys
from spendfuse.settings import SettingsError, SubjectSettings

TAG: Final = "subject"
"""The tag that holds it; no other field of a usage may say who a person is."""
_DOMAIN: Final = b"spendfuse-subject-v1\n"


class Subjects:
    """A key, and the hashes it makes."""

    def __init__(self, kid: str, key: bytes) -> None:
        self.kid = kid
        self._key = key

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the hasher of `kid=<base64 of 32 bytes>`; ValueError (without the text) if it is none."""
        keys = parse_keys(text)
        if len(keys) != 1:
            raise ValueError(f"a subject key is one kid=base64, not {len(keys)}")
        ((kid, key),) = keys.items()
        return cls(kid, key)

    @classmethod
    def from_env(cls, **overrides: object) -> Self:
        """Return the hasher of SPENDFUSE_SUBJECT_KEY(_FILE); raises SettingsError without one."""
        key = SubjectSettings.from_env(None, **overrides).subject_key.get_secret_value()
        if not key:
            raise SettingsError("SPENDFUSE_SUBJECT_KEY_FILE is not set: make a key with `spendfuse audit subject-key`")
        try:
            return cls.parse(key)
        except ValueError as error:
            raise SettingsError(f"SPENDFUSE_SUBJECT_KEY cannot be used: {error}") from error

    def of(self, workspace: str, person: str) -> str:
        """Return `kid:hash` of a person's id (e-mail address, user id, ...) in a workspace: 64 hex digits.

        The same person has another hash in another workspace, and under the next key. The id is taken as it is: bring
        it into one form (case, white space) before.
        """
        name = workspace.encode()
        text = _DOMAIN + len(name).to_bytes(4, "big") + name + person.encode()
        return f"{self.kid}:{hmac.new(self._key, text, hashlib.sha256).hexdigest()}"
