// Fetched record batches made readable: no batch that a broker takes may stop the guard, or lie about its offsets.
//
// kafkajs 2.2.4 cannot go on after a batch of a codec it lacks (by its source; not tried), says nothing of one it skips, has
// no bound on what it decompresses, and takes a record's offset from the record. Whoever may produce could so silence a
// guard. So this module decodes batches in its place; import it before kafkajs. A batch that cannot be read becomes one
// record at its last offset, without key and value, with the reason in the header `spendfuse-unreadable`.
//
// Kafka's record batch, version 2: https://kafka.apache.org/documentation/#recordbatch
import { createRequire } from "node:module";
import { CODECS } from "./compression.mjs";

export const UNREADABLE = "spendfuse-unreadable";
export const NO_CODEC = "no codec"; // the reason of a batch that another program may be able to read
const DECODER = "kafkajs/src/protocol/recordBatch/v0/decoder.js";
const HEAD_BYTES = 61;
const LENGTH_AT = 8; // the length counts what follows it
const RECORDS_MAX = 10_000; // of one batch; kafkajs spreads them over the arguments of one call
const HEADERS_MAX = 1_000; // of one record

class Unreadable extends Error {}

// The batch at the beginning of some bytes, in the form of kafkajs; null when the broker has cut it off.
export function decodeBatch(raw) {
  if (raw.length < HEAD_BYTES) return null;
  const length = raw.readInt32BE(LENGTH_AT);
  const end = LENGTH_AT + 4 + length;
  if (end > raw.length) return null;
  const attributes = raw.readInt16BE(21);
  const head = {
    firstOffset: raw.readBigInt64BE(0).toString(),
    firstTimestamp: raw.readBigInt64BE(27).toString(),
    partitionLeaderEpoch: raw.readInt32BE(12),
    inTransaction: (attributes & 0x10) > 0,
    isControlBatch: (attributes & 0x20) > 0,
    lastOffsetDelta: raw.readInt32BE(23),
    producerId: raw.readBigInt64BE(43).toString(),
    producerEpoch: raw.readInt16BE(51),
    firstSequence: raw.readInt32BE(53),
    maxTimestamp: raw.readBigInt64BE(35).toString(),
    timestampType: (attributes & 0x08) > 0 ? 1 : 0,
    magicByte: raw.readInt8(16),
  };
  let records;
  try {
    const unpack = CODECS[attributes & 0x07];
    if (unpack === undefined) throw new Unreadable(`${NO_CODEC} ${attributes & 0x07}`);
    records = [...recordsOf(unpack(raw.subarray(HEAD_BYTES, end)), raw.readInt32BE(57), head)];
  } catch (error) {
    records = [recordAt(head, head.lastOffsetDelta, 0n, null, null, { [UNREADABLE]: Buffer.from(String(error.message)) })];
  }
  return { ...head, records, end };
}

function* recordsOf(payload, count, head) {
  if (count < 0 || count > RECORDS_MAX) throw new Unreadable(`${count} records, of at most ${RECORDS_MAX}`);
  const reader = new Reader(payload);
  let last = -1;
  for (let nth = 0; nth < count; nth++) {
    const record = new Reader(reader.bytes() ?? Buffer.alloc(0));
    record.skip(1); // attributes, of which there are none
    const laterMs = record.varint();
    const delta = Number(record.varint());
    if (!(last < delta && delta <= head.lastOffsetDelta)) throw new Unreadable(`a record lies ${delta} after its batch`);
    last = delta;
    const [key, value, headers] = [record.bytes(), record.bytes(), headersOf(record)];
    if (!record.isAtEnd) throw new Unreadable("a record has more bytes than it says");
    yield recordAt(head, delta, laterMs, key, value, headers);
  }
  if (!reader.isAtEnd) throw new Unreadable("it has more bytes than its records");
}

// A name that is given twice has an array, the last one behind; a name that is not UTF-8 is given with U+FFFD.
function headersOf(record) {
  const count = Number(record.varint());
  if (count < 0 || count > HEADERS_MAX) throw new Unreadable(`${count} headers, of at most ${HEADERS_MAX}`);
  const headers = Object.create(null);
  for (let nth = 0; nth < count; nth++) {
    const name = record.bytes();
    if (name === null) throw new Unreadable("a header has no name");
    (headers[name.toString("utf8")] ??= []).push(record.bytes());
  }
  return headers;
}

function recordAt(head, delta, laterMs, key, value, headers) {
  const timestamp = head.timestampType === 1 ? head.maxTimestamp : (BigInt(head.firstTimestamp) + laterMs).toString();
  const offset = (BigInt(head.firstOffset) + BigInt(delta)).toString();
  const { magicByte, ...batchContext } = head;
  return { magicByte, attributes: 0, timestamp, offset, key, value, headers, isControlRecord: head.isControlBatch, batchContext };
}

class Reader {
  #bytes;
  #place = 0;

  constructor(bytes) {
    this.#bytes = bytes;
  }

  get isAtEnd() {
    return this.#place === this.#bytes.length;
  }

  skip(count) {
    if (this.#place + count > this.#bytes.length) throw new Unreadable("a record is cut off");
    this.#place += count;
  }

  varint() {
    let [number, shift] = [0n, 0n];
    for (;;) {
      if (this.isAtEnd || shift > 63n) throw new Unreadable("a number in it cannot be read");
      const byte = this.#bytes[this.#place++];
      number |= BigInt(byte & 0x7f) << shift;
      if (byte < 0x80) break;
      shift += 7n;
    }
    return (number >> 1n) ^ -(number & 1n);
  }

  bytes() {
    const size = Number(this.varint());
    if (size < 0) return null;
    const from = this.#place;
    this.skip(size);
    return this.#bytes.subarray(from, this.#place);
  }
}

const require = createRequire(import.meta.url);

// Have kafkajs decode with `decodeBatch`; throws when kafkajs has been loaded already, or is built otherwise.
export function install() {
  const loaded = (path) => require.cache[require.resolve(path)];
  if (loaded("kafkajs/src/protocol/requests/fetch/v4/decodeMessages.js")) throw new Error("import batches.mjs before kafkajs");
  const { KafkaJSPartialMessageError } = require("kafkajs/src/errors.js");
  if (typeof require(DECODER) !== "function") throw new Error("kafkajs is built in another way than 2.2.4");
  loaded(DECODER).exports = async (decoder) => {
    const batch = decodeBatch(decoder.buffer.subarray(decoder.offset));
    if (batch === null) throw new KafkaJSPartialMessageError("the broker has cut off a batch");
    decoder.offset += batch.end;
    return batch;
  };
}
