// The vectors that the Python guard passes too. Needs node:crypto alone: run it with `node --test test/`.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { accept, instantUs, Obedience, Refused, Signer, Silence, Verifier } from "../core.mjs";

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

const acks = read("acks");
for (const vector of acks.vectors) {
  test(`ack: ${vector.name}`, () => {
    const header = new Signer(vector.private_key).sign(acks.topic, vector.key, vector.value);
    assert.equal(header, vector.header);
    new Verifier(vector.public_key).verify(acks.topic, bytes(vector.key), bytes(vector.value), bytes(header));
  });
}

const silence = read("silence");
for (const scenario of silence.scenarios) {
  test(`silence: ${scenario.name}`, () => {
    const one = new Silence({
      failMode: scenario.fail_mode,
      staleAfterS: silence.stale_after_s,
      blindAfterS: silence.blind_after_s,
      graceS: silence.grace_s,
      graceTokens: silence.grace_tokens,
    });
    let tokens = 0;
    for (const step of scenario.steps) {
      if (step.do === "commands") one.commandsRead = true;
      else if (step.do === "sign") one.heard(step.at_s, step.at_s);
      else if (step.do === "used") tokens += step.tokens;
      else {
        const go = one.whyHalted(step.at_s, tokens) === null;
        assert.deepEqual({ state: one.state(step.at_s), go }, { state: step.state, go: step.go }, JSON.stringify(step));
      }
    }
  });
}

test("settings that are none are refused", () => {
  const right = { failMode: "bounded", staleAfterS: 1, blindAfterS: 2, graceS: 3, graceTokens: 4 };
  assert.throws(() => new Silence({ ...right, failMode: "opne" }), /SPENDFUSE_FAIL_MODE/);
  assert.throws(() => new Silence({ ...right, graceS: NaN }), /graceS/);
  for (const text of ["", "k=AAAA", "=AAAA", "k"]) assert.throws(() => new Signer(text));
});

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
