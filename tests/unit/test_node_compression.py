"""What the Node guard unpacks is what cramjam packed, and no changed byte makes it hang or grow."""

from __future__ import annotations

import base64
import json
import random
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Final

import cramjam
import pytest

NODE: Final = Path(__file__).parents[2] / "deploy" / "guards" / "node" / "compression.mjs"
SNAPPY, LZ4 = 2, 3
UNPACKED_BYTES_MAX: Final = 16 * 1_048_576
PROGRAM: Final = """
import { CODECS } from %s;
let text = "";
for await (const part of process.stdin) text += part;
const answers = JSON.parse(text).map(([codec, packed]) => {
  try {
    return CODECS[codec](Buffer.from(packed, "base64")).toString("base64");
  } catch (error) {
    return { refused: error.message };
  }
});
console.log(JSON.stringify(answers));
"""


def unpacked(cases: list[tuple[int, bytes]]) -> list[bytes | None]:
    """What the Node guard makes of each, None where it refuses."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not on the PATH")
    done = subprocess.run(
        [node, "--input-type=module", "-e", PROGRAM % json.dumps(NODE.as_uri())],
        input=json.dumps([[codec, base64.b64encode(packed).decode()] for codec, packed in cases]),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [None if isinstance(answer, dict) else base64.b64decode(answer) for answer in json.loads(done.stdout)]


def lz4(plain: bytes, *, level: int, linked: bool, checksum: bool) -> bytes:
    machine = cramjam.lz4.Compressor(level=level, content_checksum=checksum, block_linked=linked)
    machine.compress(plain)
    return bytes(machine.finish())


def xerial(plain: bytes, block: int) -> bytes:
    blocks = [bytes(cramjam.snappy.compress_raw(plain[at : at + block])) for at in range(0, len(plain), block)]
    return b"\x82SNAPPY\x00" + struct.pack(">ii", 1, 1) + b"".join(struct.pack(">i", len(b)) + b for b in blocks)


def packed_samples() -> list[tuple[int, bytes, bytes]]:
    dice = random.Random(11)  # noqa: S311 - samples
    samples = []
    for size in (0, 1, 14, 15, 16, 63, 300, 70_000, 200_000):
        for letters in (1, 3, 256):
            plain = bytes(dice.randrange(letters) for _ in range(size))
            samples += [
                (SNAPPY, bytes(cramjam.snappy.compress_raw(plain)), plain),
                (SNAPPY, xerial(plain, 4_096), plain),
                (LZ4, lz4(plain, level=1, linked=False, checksum=True), plain),
                (LZ4, lz4(plain, level=9, linked=True, checksum=False), plain),
            ]
    return samples


def test_the_node_guard_unpacks_what_others_pack() -> None:
    samples = packed_samples()
    assert unpacked([(codec, packed) for codec, packed, _ in samples]) == [plain for _, _, plain in samples]


def test_changed_bytes_are_refused_or_unpacked_within_the_bound() -> None:
    dice = random.Random(12)  # noqa: S311 - the changes
    cases = []
    for codec, packed, _ in packed_samples():
        for _ in range(5 if len(packed) < 1_000 else 1):
            changed = bytearray(packed or b"\0")
            changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
            cases.append((codec, bytes(changed[: dice.randrange(1, len(changed) + 1)])))
    answers = unpacked(cases)
    assert sum(answer is None for answer in answers) > len(answers) // 2
    assert all(answer is None or len(answer) <= UNPACKED_BYTES_MAX for answer in answers)


def test_what_would_fill_the_memory_is_refused() -> None:
    bomb = bytes(UNPACKED_BYTES_MAX + 1)
    fits = bytes(UNPACKED_BYTES_MAX)
    cases = [
        (SNAPPY, bytes(cramjam.snappy.compress_raw(bomb))),
        (LZ4, lz4(bomb, level=1, linked=False, checksum=False)),
        (LZ4, lz4(fits, level=1, linked=False, checksum=False)),
    ]
    assert unpacked(cases) == [None, None, fits]
