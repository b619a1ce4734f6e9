// The vectors that the Python guard passes too. Needs node:crypto alone: run it with `node --test test/`.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { accept, instantUs, Obedience, Refused, Verifier } from "../core.mjs";

const VECTORS = process.env.SPENDFUSE_VECTORS ?? new URL("../../../../schemas/vectors/", import.meta.url).pathname;
const read = (name) => JSON.parse(readFileSync(`${VECTORS}/${name}.json`, "utf8"));
const bytes = (text) => (text === null ? null : Buffer.from(text, "utf8"));

const signatures = read("signatures");
for (const vector of signatures.vectors) {
  test(`signature: ${vector.name}`, () => {
    const verifier = new Verifier(signatures.public_keys, () => instantUs(vector.at));
    const [key, value] = [vector.key_base64, vector.value_base64].map((text) => Buffer.from(text, "base64"));
    let verdict;
    try {
      verdict = verifier.verify(vector.topic, key, value, bytes(vector.header));
    } catch (error) {
      assert.ok(error instanceof Refused, error);
      verdict = error.reason;
    }
    assert.equal(verdict, vector.verdict);
  });
}

const obedience = read("obedience");
for (const scenario of obedience.scenarios) {
  test(`commands: ${scenario.name}`, () => {
    const verifier = new Verifier(obedience.public_keys, () => instantUs(obedience.read_at));
    const state = new Obedience(obedience.scopes);
    const refused = {};
    const count = (reason) => (refused[reason] = (refused[reason] ?? 0) + 1);
    for (const { key, value, header } of scenario.records) {
      try {
        const record = { topic: obedience.topic, key: bytes(key), value: bytes(value), header: bytes(header) };
        if (state.apply(accept(record, verifier)) === "old") count("old");
      } catch (error) {
        assert.ok(error instanceof Refused, error);
        count(error.reason);
      }
    }
    for (const ask of scenario.asks) {
      const verdict = state.strictest(instantUs(ask.at));
      assert.deepEqual({ action: verdict.action, seq: verdict.command?.seq ?? null }, { action: ask.action, seq: ask.seq });
      for (const [name, model] of Object.entries(ask.models ?? {})) assert.equal(verdict.model(name), model);
      if ("max_output_tokens" in ask) assert.equal(verdict.maxOutputTokens, ask.max_output_tokens);
    }
    assert.deepEqual(refused, scenario.refused);
  });
}

test("a clock that is set back revives no key", () => {
  const key = signatures.vectors.find((vector) => vector.verdict === "key retired");
  let us = instantUs(key.at);
  const verifier = new Verifier(signatures.public_keys, () => us);
  const attempt = () =>
    verifier.verify(key.topic, Buffer.from(key.key_base64, "base64"), Buffer.from(key.value_base64, "base64"), bytes(key.header));
  assert.throws(attempt, { reason: "key retired" });
  us = 0;
  assert.throws(attempt, { reason: "key retired" });
});

test("keys that are none are refused", () => {
  for (const text of ["", "k=AAAA", "=AAAA", "k", `${signatures.public_keys},${signatures.public_keys}`]) {
    assert.throws(() => new Verifier(text));
  }
});
