// Kafka's compressions, unpacked within a bound: gzip and (from Node 22.15 on) zstd are Node's own, snappy and LZ4 are here.
import zlib from "node:zlib";

export const UNPACKED_BYTES_MAX = 16 * 1_048_576;
const XERIAL = Buffer.from("82534e4150505900", "hex"); // how the Java client begins: snappy in blocks
const XERIAL_HEAD = 16;
const LZ4_MAGIC = 0x184d2204;

const bounded = (unpack) => (payload) => unpack(payload, { maxOutputLength: UNPACKED_BYTES_MAX });

// Bytes that grow up to the bound; a copy may overlap what it writes.
class Output {
  #bytes = Buffer.alloc(1_024);
  length = 0;

  #room(count) {
    const needed = this.length + count;
    if (needed > UNPACKED_BYTES_MAX) throw new Error(`it is more than ${UNPACKED_BYTES_MAX} bytes`);
    if (needed > this.#bytes.length) {
      const larger = Buffer.alloc(Math.min(UNPACKED_BYTES_MAX, Math.max(needed, 2 * this.#bytes.length)));
      this.#bytes.copy(larger, 0, 0, this.length);
      this.#bytes = larger;
    }
  }

  append(input, from, count) {
    if (count < 0 || from + count > input.length) throw new Error("it is cut off");
    this.#room(count);
    input.copy(this.#bytes, this.length, from, from + count);
    this.length += count;
  }

  repeat(distance, count) {
    if (distance < 1 || distance > this.length) throw new Error("it points before its beginning");
    this.#room(count);
    for (let nth = 0; nth < count; nth++, this.length++) this.#bytes[this.length] = this.#bytes[this.length - distance];
  }

  taken() {
    return this.#bytes.subarray(0, this.length);
  }
}

// https://github.com/google/snappy/blob/main/format_description.txt
function snappyBlock(input, output) {
  let [place, length, shift] = [0, 0, 0];
  for (;;) {
    const byte = input.readUInt8(place++);
    length += (byte & 0x7f) * 2 ** shift;
    if (byte < 0x80) break;
    if ((shift += 7) > 28) throw new Error("its length cannot be read");
  }
  const end = output.length + length;
  while (place < input.length) {
    const tag = input[place++];
    const kind = tag & 3;
    if (kind === 0) {
      let count = tag >> 2;
      if (count >= 60) {
        const bytes = count - 59;
        count = input.readUIntLE(place, bytes);
        place += bytes;
      }
      output.append(input, place, count + 1);
      place += count + 1;
    } else if (kind === 1) {
      output.repeat(((tag >> 5) << 8) | input.readUInt8(place++), ((tag >> 2) & 7) + 4);
    } else {
      const bytes = kind === 2 ? 2 : 4;
      output.repeat(input.readUIntLE(place, bytes), (tag >> 2) + 1);
      place += bytes;
    }
  }
  if (output.length !== end) throw new Error("it is not as long as it says");
}

function snappy(payload) {
  const output = new Output();
  if (!payload.subarray(0, XERIAL.length).equals(XERIAL)) {
    snappyBlock(payload, output);
    return output.taken();
  }
  for (let place = XERIAL_HEAD; place < payload.length; ) {
    const size = payload.readInt32BE(place);
    place += 4;
    if (size < 1 || place + size > payload.length) throw new Error("a block is cut off");
    snappyBlock(payload.subarray(place, place + size), output);
    place += size;
  }
  return output.taken();
}

// https://github.com/lz4/lz4/blob/dev/doc/lz4_Frame_format.md; checksums are not checked: the batch has its own.
function lz4(payload) {
  if (payload.readUInt32LE(0) !== LZ4_MAGIC) throw new Error("it is no LZ4 frame");
  const flags = payload.readUInt8(4);
  if (flags >> 6 !== 1 || flags & 0x01) throw new Error("it is an LZ4 frame of another version, or with a dictionary");
  const output = new Output();
  let place = 7 + (flags & 0x08 ? 8 : 0);
  for (;;) {
    const head = payload.readUInt32LE(place);
    place += 4;
    if (head === 0) return output.taken();
    const size = head & 0x7fffffff;
    if (place + size > payload.length) throw new Error("a block is cut off");
    if (head & 0x80000000) output.append(payload, place, size);
    else lz4Block(payload.subarray(place, place + size), output);
    place += size + (flags & 0x10 ? 4 : 0);
  }
}

function lz4Block(input, output) {
  let place = 0;
  const more = (count) => {
    if (count !== 15) return count;
    let byte;
    do {
      byte = input.readUInt8(place++);
      count += byte;
    } while (byte === 255);
    return count;
  };
  while (place < input.length) {
    const token = input[place++];
    const literals = more(token >> 4);
    output.append(input, place, literals);
    place += literals;
    if (place >= input.length) return; // the last sequence is literals alone
    const distance = input.readUInt16LE(place);
    place += 2;
    output.repeat(distance, more(token & 0x0f) + 4);
  }
}

// By Kafka's number of the codec.
export const CODECS = { 0: (payload) => payload, 1: bounded(zlib.gunzipSync), 2: snappy, 3: lz4 };
if (zlib.zstdDecompressSync) CODECS[4] = bounded(zlib.zstdDecompressSync);
