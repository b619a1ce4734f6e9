"""A guard's halts on disk, so that a restart does not forget them while the broker is away.

What is kept are the signed records themselves: they are verified again when they are read, so a file that somebody
changed can halt nobody and let nobody go on that the topic would not.
"""

import base64
import binascii
import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from spendfuse.client.follow import Record
from spendfuse.wire.signing import SIGNATURE_HEADER
from spendfuse.wire.topics import COMMANDS

OFF: Final = "off"
RECORDS_MAX: Final = 1_000
BYTES_MAX: Final = 4_194_304
_log = logging.getLogger("spendfuse")


def write_private(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Put a file in place at once and whole, for its owner only; `durable`: over a power cut. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # made with mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


class Memory:
    """The file of one guard. What cannot be read or written is said, once, and the guard goes on without.

    What a full disk did not take is written when there is room again: call `keep_again` now and then.
    """

    def __init__(self, directory: str, servers: str, kept_for: Sequence[str]) -> None:
        """`directory` is where the files lie (`off` keeps nothing), `kept_for` what names this guard's among them."""
        name = hashlib.sha256("\n".join([servers, *kept_for]).encode()).hexdigest()[:24]
        self.path = None if directory == OFF else Path(directory).expanduser() / f"{name}.json"
        self._kept: list[Record] = []
        self._unkept: list[Record] | None = None

    def read(self) -> list[Record]:
        """Return the records kept, none when there are none or they cannot be read."""
        if self.path is None:
            return []
        try:
            with self.path.open("rb") as file:
                data = file.read(BYTES_MAX + 1)
            if len(data) > BYTES_MAX:
                raise ValueError(f"larger than {BYTES_MAX} bytes")  # noqa: TRY301 - the same answer as for any fault
            self._kept = [_record(item) for item in json.loads(data)["records"][:RECORDS_MAX]]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError, KeyError, AttributeError, binascii.Error) as error:
            _log.warning("spendfuse guard cannot read the halts kept in %s: %s", self.path, error)
            return []
        return self._kept

    def keep(self, records: Iterable[Record]) -> None:
        """Replace what is kept; nothing is written when nothing changed."""
        wanted = sorted(records, key=lambda record: record.key or b"")[:RECORDS_MAX]
        if self.path is None or (wanted == self._kept and self._unkept is None):
            return
        was_unkept = self._unkept is not None
        try:
            if wanted:
                text = json.dumps({"v": 1, "records": [_item(record) for record in wanted]})
                write_private(self.path, text.encode())
            else:
                self.path.unlink(missing_ok=True)
        except OSError as error:
            self._unkept = wanted
            if not was_unkept:
                _log.warning("spendfuse guard cannot keep its halts over a restart: %s; it tries again", error)
            return
        self._kept, self._unkept = wanted, None
        if was_unkept:
            _log.warning("spendfuse guard keeps its halts over a restart again, in %s", self.path)

    def keep_again(self) -> None:
        """Write what could not be written before; costs nothing when nothing is left."""
        if self._unkept is not None:
            self.keep(self._unkept)


def _item(record: Record) -> dict[str, str]:
    parts = {"key": record.key, "value": record.value, "signature": record.header(SIGNATURE_HEADER)}
    return {name: base64.b64encode(part).decode() for name, part in parts.items() if part is not None}


def _record(item: dict[str, str]) -> Record:
    parts = {name: base64.b64decode(text, validate=True) for name, text in item.items()}
    signature = parts.get("signature")
    headers = () if signature is None else ((SIGNATURE_HEADER, signature),)
    return Record(COMMANDS.name, 0, -1, -1, parts["key"], parts["value"], headers)
