"""Check a bundle or a proof of spendfuse's audit trail without spendfuse: one file, nothing but Python's library.

`python verify.py BUNDLE --key NAME=BASE64` checks what `spendfuse audit export` wrote: every file, row, batch, link of
the chain and checkpoint. `python verify.py PROOF.json --key NAME=BASE64` checks what `spendfuse audit prove` wrote. The
key is the audit's public key, got from a place the trail's keeper does not rule; without it no signature is believed.
Exit 0: it holds; 1: it does not, each fault on a line; 2: it could not be checked. Parquet needs pyarrow; gzipped JSON
lines need nothing. The files are specified in README.md beside this, which is what this was written from.
"""

import argparse
import base64
import gzip
import hashlib
import json
import struct
import sys
from pathlib import Path

ORIGIN = "src_topic:s src_partition:H src_offset:Q src_index:H ledger_partition:H ledger_offset:Q"
FIELDS = {
    "usage_events": (
        "usage_id:s kind:s usage_kind:s workspace:s team:s agent:s run:s root_run:s parent_run:s workflow:s provider:s "
        "model:s tier:s currency:s price_book:s priced_by:s source:s tags:m rates:a occurred_at:q recorded_at:q "
        "input_tokens:I cache_read_tokens:I cache_write_5m_tokens:I cache_write_1h_tokens:I output_tokens:I "
        "reasoning_tokens:I cost_nanos:q tier_known:B late:B " + ORIGIN
    ),
    "corrections": (
        "correction_id:s usage_id:s workspace:s team:s agent:s run:s root_run:s parent_run:s workflow:s provider:s "
        "model:s tier:s currency:s reason:s note:s stated_by:s tags:m occurred_at:q stated_at:q recorded_at:q "
        "input_tokens:q cache_read_tokens:q cache_write_5m_tokens:q cache_write_1h_tokens:q output_tokens:q "
        "reasoning_tokens:q cost_nanos:q late:B " + ORIGIN
    ),
    "commands": (
        "command_id:s action:s scope:s scope_kind:s workspace:s budget:s cap:s window_kind:s window_label:s "
        "window_timezone:s unit:s cause_usage_id:s price_book:s issued_by:s reason:s message:s degrade_models:m "
        "degrade_max_output_tokens:? expires_at:? window_start:? window_end:? cause_ts:? decided_only:B seq:Q "
        "budget_version:Q issued_at:q cap_amount:q spend:q committed:q fraction_bp:Q cause_partition:H cause_offset:Q "
        "cause_produced_at_ms:q recorded_at:q " + ORIGIN
    ),
    "acks": (
        "command_id:s scope:s scope_kind:s workspace:s budget:s cap:s agent:s run:s guard:s state:s halt_lag_us:? "
        "seq:Q at:q recorded_at:q " + ORIGIN
    ),
    "alerts": (
        "alert_id:s kind:s severity:s scope:s scope_kind:s workspace:s budget:s cap:s unit:s usage_id:s message:s ts:q "
        "cap_amount:q spend:q committed:q fraction_bp:Q recorded_at:q " + ORIGIN
    ),
    "ledger_events": "kind:s data:s recorded_at:q " + ORIGIN,
}
HEADER = (
    "leaf_version:B ledger_partition:H seq:Q first_offset:Q last_offset:Q rows:I usage_rows:I leaf_sum:Q "
    "written_at_ms:q occurred_from_us:q occurred_to_us:q content_sha256:s merkle_root:s prev_hash:s"
)
FIELDS = {table: [word.split(":") for word in spec.split()] for table, spec in FIELDS.items()}
HEADER = [word.split(":") for word in HEADER.split()]
GENESIS = "0" * 64
FAULTS_SHOWN_MAX = 1_000


class Unusable(Exception):
    """What was given cannot be read at all."""


def sha256(data):
    return hashlib.sha256(data).digest()


# ---- RowBinary ----------------------------------------------------------------------------------------------------


def varint(number):
    out = b""
    while number >= 0x80:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def text(value):
    raw = value.encode("utf-8")
    return varint(len(raw)) + raw


def encoded(kind, value):
    if kind == "s":
        return text(value)
    if kind == "m":
        pairs = value.items() if isinstance(value, dict) else (value or [])
        pairs = sorted((key.encode("utf-8"), each) for key, each in pairs)
        return varint(len(pairs)) + b"".join(varint(len(key)) + key + text(each) for key, each in pairs)
    if kind == "a":
        return varint(len(value)) + b"".join(struct.pack("<q", int(each)) for each in value)
    if kind == "?":
        return b"\x01" if value is None else b"\x00" + struct.pack("<q", int(value))
    return struct.pack("<" + kind, int(value))


def fields(spec, row):
    return b"".join([encoded(kind, row[name]) for name, kind in spec])


def leaf_of(table, version, row):
    return sha256(b"\x00" + bytes([version]) + text(table) + fields(FIELDS[table], row))


def hash_of(header):
    return sha256(b"\x02" + fields(HEADER, header)).hex()


# ---- RFC 6962 -----------------------------------------------------------------------------------------------------


def root_of(leaves):
    """The tree as RFC 6962 writes it: split at the largest power of two below the size."""
    if not leaves:
        return sha256(b"")
    if len(leaves) == 1:
        return leaves[0]
    at = 1 << ((len(leaves) - 1).bit_length() - 1)
    return sha256(b"\x01" + root_of(leaves[:at]) + root_of(leaves[at:]))


def root_by_path(leaf, index, size, path):
    """RFC 6962 2.1.1, from the leaf's side; None when the path is too long or too short for the tree."""
    if size == 1:
        return leaf if index == 0 and not path else None
    if not path or not 0 <= index < size:
        return None
    at = 1 << ((size - 1).bit_length() - 1)
    if index < at:
        inner = root_by_path(leaf, index, at, path[:-1])
        return None if inner is None else sha256(b"\x01" + inner + path[-1])
    inner = root_by_path(leaf, index - at, size - at, path[:-1])
    return None if inner is None else sha256(b"\x01" + path[-1] + inner)


# ---- Ed25519 (RFC 8032, 5.1; verification only, slow and plain) ----------------------------------------------------

P = 2**255 - 19
Q = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, P - 2, P) % P
ROOT_OF_MINUS_1 = pow(2, (P - 1) // 4, P)


def add(one, two):
    a = (one[1] - one[0]) * (two[1] - two[0]) % P
    b = (one[1] + one[0]) * (two[1] + two[0]) % P
    c = 2 * one[3] * two[3] * D % P
    d = 2 * one[2] * two[2] % P
    e, f, g, h = b - a, d - c, d + c, b + a
    return (e * f % P, g * h % P, f * g % P, e * h % P)


def times(number, point):
    out = (0, 1, 1, 0)
    while number > 0:
        if number & 1:
            out = add(out, point)
        point = add(point, point)
        number >>= 1
    return out


def x_of(y, sign):
    if y >= P:
        return None
    square = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
    if square == 0:
        return None if sign else 0
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P != 0:
        x = x * ROOT_OF_MINUS_1 % P
    if (x * x - square) % P != 0:
        return None
    return P - x if (x & 1) != sign else x


def point_of(raw):
    y = int.from_bytes(raw, "little")
    sign, y = y >> 255, y & ((1 << 255) - 1)
    x = x_of(y, sign)
    return None if x is None else (x, y, 1, x * y % P)


BASE_Y = 4 * pow(5, P - 2, P) % P
BASE = (x_of(BASE_Y, 0), BASE_Y, 1, x_of(BASE_Y, 0) * BASE_Y % P)


def is_signed(public, message, signature):
    if len(public) != 32 or len(signature) != 64:
        return False
    a, r, s = point_of(public), point_of(signature[:32]), int.from_bytes(signature[32:], "little")
    if a is None or r is None or s >= Q:
        return False
    h = int.from_bytes(hashlib.sha512(signature[:32] + public + message).digest(), "little") % Q
    one, two = times(s, BASE), add(r, times(h, a))
    return (one[0] * two[2] - two[0] * one[2]) % P == 0 and (one[1] * two[2] - two[1] * one[2]) % P == 0


# ---- Checkpoints (C2SP signed note) --------------------------------------------------------------------------------


def notes_of(content):
    note, signed = "", False
    for line in content.splitlines(keepends=True):
        is_signature = line.startswith("\u2014 ")
        if signed and not is_signature:
            yield note
            note, signed = "", False
        if note or line.strip():
            note += line
        signed = is_signature
    if note:
        yield note


def heads_of(note, keys):
    """The heads of a note that one of the keys signed: [(partition, seq, hash)]; ValueError says why not."""
    body, empty, signatures = note.rpartition("\n\n")
    if not empty:
        raise ValueError("a checkpoint without signatures")
    body += "\n"
    lines = body.split("\n")[:-1]
    heads = [line.split(" ") for line in lines[4:]]
    if len(lines) < 4 or any(len(words) != 4 or words[0] != "head" for words in heads):
        raise ValueError("a checkpoint that is none")
    found = [(int(words[1]), int(words[2]), words[3]) for words in heads]
    root = root_of([sha256(b"\x00" + line.encode()) for line in lines[4:]])
    if lines[1] != str(sum(seq for _, seq, _ in found)) or lines[2] != base64.b64encode(root).decode():
        raise ValueError("a checkpoint whose size or root is not that of its heads")
    for line in signatures.splitlines():
        name, _, encoded_signature = line[2:].partition(" ")
        raw, public = base64.b64decode(encoded_signature), keys.get(name)
        if public is None or raw[:4] != sha256(name.encode() + b"\n\x01" + public)[:4]:
            continue
        if not is_signed(public, body.encode(), raw[4:]):
            raise ValueError(f"a checkpoint with a wrong signature of {name}")
        return lines[3], found
    raise ValueError("a checkpoint that none of the given keys signed")


# ---- Bundles and proofs --------------------------------------------------------------------------------------------


def rows_of(path):
    if path.name.endswith(".parquet"):
        try:
            import pyarrow.parquet  # noqa: PLC0415 - only who has Parquet needs it
        except ImportError:
            raise Unusable("Parquet needs pyarrow (pip install pyarrow); or export with --format jsonl") from None
        file = pyarrow.parquet.ParquetFile(path)
        for batch in file.iter_batches(batch_size=10_000):
            yield from batch.to_pylist()
        return
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


class Bundle:
    def __init__(self, directory, keys):
        self.directory, self.keys = directory, keys
        self.faults, self.rows, self.batches, self.heads = [], 0, 0, 0
        self.headers = {}

    def fault(self, what):
        if len(self.faults) < FAULTS_SHOWN_MAX:
            self.faults.append(what)

    def check(self):
        manifest = json.loads((self.directory / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != 1:
            raise Unusable("a bundle of a newer format: get a newer verify.py")
        there = {path.name for path in self.directory.iterdir()} - {"manifest.json"}
        for name in sorted(there ^ set(manifest["files"])):
            self.fault(f"{name}: {'not in the manifest' if name in there else 'missing'}")
        for name, said in manifest["files"].items():
            if name in there and hashlib.sha256((self.directory / name).read_bytes()).hexdigest() != said:
                self.fault(f"{name}: its SHA-256 is not that of the manifest")
        self.check_chain()
        for nth, piece in enumerate(manifest["slices"]):
            self.check_rows(nth, piece, there)
        notes = self.directory / "checkpoints.notes"
        if notes.exists():
            self.check_notes(notes.read_text(encoding="utf-8"))

    def check_chain(self):
        before = None
        for header in rows_of(self.directory / "headers.jsonl.gz"):
            place = (header["ledger_partition"], header["seq"])
            first = before is None or before["ledger_partition"] != place[0]
            where = f"batch {place[1]} of ledger partition {place[0]}"
            link = GENESIS if first else before["header_hash"] or before["content_sha256"]
            if header["seq"] != (1 if first else before["seq"] + 1):
                self.fault(f"{where}: missing header: the one before it is {0 if first else before['seq']}")
            elif header["leaf_version"] > 1:
                raise Unusable(f"{where} has a newer leaf version: get a newer verify.py")
            elif header["leaf_version"] == 0:
                if not first and before["leaf_version"]:
                    self.fault(f"{where}: unsealed after a sealed one")
            elif hash_of(header) != header["header_hash"]:
                self.fault(f"{where}: header altered: it does not hash to its own hash")
            elif header["prev_hash"] != link:
                self.fault(f"{where}: forked chain: it does not follow the batch before it")
            if place in self.headers:
                self.fault(f"{where}: two headers")
            self.headers[place] = before = header
            self.batches += 1

    def check_rows(self, nth, piece, there):
        batches = {}
        for table in FIELDS:
            for suffix in ("parquet", "jsonl.gz"):
                name = f"{table}-{nth:05d}.{suffix}"
                if name in there:
                    for row in rows_of(self.directory / name):
                        place = (int(row["ledger_partition"]), int(row["batch_seq"]))
                        batches.setdefault(place, []).append((int(row["batch_row"]), leaf_of(table, 1, row)))
                        self.rows += 1
        wanted = {(piece["partition"], seq) for seq in range(piece["seq_from"], piece["seq_to"] + 1)}
        for place in sorted(set(batches) | (wanted & set(self.headers))):
            self.check_batch(place, sorted(batches.get(place, [])), place in wanted)

    def check_batch(self, place, found, wanted):
        where = f"batch {place[1]} of ledger partition {place[0]}"
        header = self.headers.get(place)
        if header is None or not wanted:
            self.fault(f"{where}: {len(found)} rows of a batch that should not be here")
            return
        if [at for at, _ in found] != list(range(header["rows"])):
            missing = sorted(set(range(header["rows"])) - {at for at, _ in found})
            detail = f"the first one missing is row {missing[0]}" if missing else "some are not of it"
            cause = "rows deleted (or expired)" if missing else "rows inserted"
            self.fault(f"{where}: {cause}: {len(found)} rows for {header['rows']}: {detail}")
        elif root_of([leaf for _, leaf in found]).hex() != header["merkle_root"]:
            total = sum(int.from_bytes(leaf[:8], "little") for _, leaf in found) % 2**64
            self.fault(f"{where}: rows {'reordered' if total == header['leaf_sum'] else 'altered'}")

    def check_notes(self, content):
        if not self.keys:
            self.fault("checkpoints.notes: give the audit's public key with --key, or nothing here is believed")
            return
        for note in notes_of(content):
            try:
                at, heads = heads_of(note, self.keys)
            except ValueError as error:
                self.fault(f"checkpoints.notes: {error}")
                continue
            for partition, seq, said in heads:
                header = self.headers.get((partition, seq))
                own = header and (header["header_hash"] or header["content_sha256"])
                self.heads += 1
                if own != said:
                    what = "truncated: it is not there" if header is None else "it has another hash"
                    self.fault(f"batch {seq} of ledger partition {partition}: checkpoint of {at}: {what}")


def check_proof(proof, keys):  # noqa: PLR0911 - a step after the other
    """Return the faults of one proof, and what it proves."""
    row, headers = proof["row"], proof["headers"]
    leaf = leaf_of(proof["table"], int(headers[0]["leaf_version"]), row)
    path = [bytes.fromhex(each) for each in proof["path"]]
    root = root_by_path(leaf, int(row["batch_row"]), int(headers[0]["rows"]), path)
    if root is None or root.hex() != headers[0]["merkle_root"]:
        return ["the row does not lead to the root of its batch"], ""
    if any(int(headers[0][one]) != int(row[two]) for one, two in (("ledger_partition",) * 2, ("seq", "batch_seq"))):
        return ["the header is that of another batch"], ""
    for nth, header in enumerate(headers):
        if hash_of(header) != header["header_hash"]:
            return [f"the header of batch {header['seq']} does not hash to its own hash"], ""
        if nth and header["prev_hash"] != headers[nth - 1]["header_hash"]:
            return [f"batch {header['seq']} does not follow the one before it"], ""
    where = f"row {row['batch_row']} of batch {row['batch_seq']} of ledger partition {row['ledger_partition']}"
    if not proof["checkpoint"]:
        return ["no checkpoint is part of the proof: it holds only if you trust its header"], where
    try:
        at, heads = heads_of(proof["checkpoint"], keys)
    except ValueError as error:
        return [str(error)], where
    if (int(headers[-1]["ledger_partition"]), int(headers[-1]["seq"]), headers[-1]["header_hash"]) not in heads:
        return ["the checkpoint was signed over another chain"], where
    return [], f"{where} was sealed before the checkpoint of {at.removeprefix('time ')}"


def check(path, keys):
    """Return (faults, what was checked)."""
    if path.is_dir():
        bundle = Bundle(path, keys)
        bundle.check()
        return bundle.faults, f"{bundle.rows} rows, {bundle.batches} headers, {bundle.heads} checkpointed heads"
    faults, said = [], []
    proofs = json.loads(path.read_text(encoding="utf-8"))
    for proof in proofs if isinstance(proofs, list) else [proofs]:
        found, what = check_proof(proof, keys)
        faults += found
        said.append(what)
    return faults, "; ".join(said)


def main():
    parser = argparse.ArgumentParser(description="Check a bundle or a proof of spendfuse's audit trail.")
    parser.add_argument("path", type=Path, help="directory of a bundle, or file of a proof")
    parser.add_argument("--key", action="append", default=[], metavar="NAME=BASE64", help="the audit's public key")
    options = parser.parse_args()
    try:
        keys = {name: base64.b64decode(raw) for name, _, raw in (each.partition("=") for each in options.key)}
        faults, what = check(options.path, keys)
    except (Unusable, OSError) as error:
        print(f"cannot be checked: {error}", file=sys.stderr)
        return 2
    except (LookupError, TypeError, ValueError, AttributeError, struct.error, EOFError) as error:
        print(f"NOT intact: it cannot be read: {type(error).__name__}: {error}")
        return 1
    for fault in faults:
        print(f"NOT intact: {fault}")
    if not faults:
        print(f"intact: {what}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
