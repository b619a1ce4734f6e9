// What a guard knows and must do, without Kafka and without a clock: the same rules as spendfuse/client/{keys,accept,obey}.py.
// `schemas/vectors/` of the repository holds this and the Python guard to the same verdicts.
import { createPrivateKey, createPublicKey, sign, verify } from "node:crypto";

export const TOPIC = "spendfuse.commands.v1";
export const SIGNATURE_HEADER = "spendfuse-sig";
const KEYS_MAX = 16;
const RULINGS_MAX = 10_000; // beyond it only a halt is taken in
const HEADER_BYTES_MAX = 256;
const KID = /^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$/;
const SIGNATURE = /^ed25519;kid=([A-Za-z0-9][A-Za-z0-9._+-]{0,63});([A-Za-z0-9+/]{86}==)$/;
const INSTANT = /^(\d{4}-\d{2}-\d{2}[Tt]\d{2}:\d{2}:\d{2})(?:\.(\d{1,9}))?([Zz]|[+-]\d{2}:\d{2})$/;
const ACTIONS = ["warn", "resume", "degrade", "halt"]; // from the mildest

// Microseconds since the epoch of RFC 3339 text: exact, a number below 2^53. Throws for anything else.
export function instantUs(text) {
  const [, seconds, fraction = "", offset] = INSTANT.exec(text) ?? [];
  const ms = seconds === undefined ? NaN : Date.parse(`${seconds}${offset}`.toUpperCase());
  if (Number.isNaN(ms)) throw new Error(`${String(text).slice(0, 40)} is no RFC 3339 instant with an offset`);
  return ms * 1_000 + Number(fraction.padEnd(6, "0").slice(0, 6));
}

export const nowUs = () => Date.now() * 1_000;

export class Refused extends Error {
  constructor(reason, detail) {
    super(`${reason}: ${detail}`);
    this.reason = reason;
  }
}

// Public keys by id. A key with an end, `kid=base64;until=2026-12-01T00:00:00Z`, proves nothing from then on.
export class Verifier {
  #keys = new Map();
  #clock;
  #latestUs = 0;

  constructor(text, clock = nowUs) {
    this.#clock = clock;
    for (const item of text.split(/[,\s]+/).filter(Boolean)) {
      const [pair, end] = item.split(";until=");
      const equals = pair.indexOf("=");
      const [kid, encoded] = [pair.slice(0, equals), pair.slice(equals + 1)];
      const raw = Buffer.from(encoded, "base64");
      if (equals < 1 || !KID.test(kid) || raw.length !== 32) throw new Error("a public key is kid=<base64 of 32 bytes>");
      if (this.#keys.has(kid)) throw new Error(`key id ${kid} is given twice`);
      const jwk = { kty: "OKP", crv: "Ed25519", x: raw.toString("base64url") };
      this.#keys.set(kid, {
        key: createPublicKey({ key: jwk, format: "jwk" }),
        untilUs: end === undefined ? Infinity : instantUs(end),
      });
    }
    if (this.#keys.size < 1 || this.#keys.size > KEYS_MAX) throw new Error(`a guard takes 1 to ${KEYS_MAX} public keys`);
  }

  // The id of the key that signed exactly these bytes; throws Refused with the reason.
  verify(topic, key, value, header) {
    if (header === null || header === undefined) throw new Refused("unsigned", "no signature");
    const text = header.toString("latin1");
    const [, kid, signature] = (text.length <= HEADER_BYTES_MAX && SIGNATURE.exec(text)) || [];
    // JavaScript's $ also stands before nothing but the end, so no newline slips in behind.
    if (kid === undefined) throw new Refused("malformed", "no signature header");
    const known = this.#keys.get(kid);
    if (known === undefined) throw new Refused("key unknown", kid);
    if (known.untilUs !== Infinity) {
      this.#latestUs = Math.max(this.#latestUs, this.#clock()); // a clock that is set back revives no key
      if (this.#latestUs >= known.untilUs) throw new Refused("key retired", kid);
    }
    if (key.includes(0x0a) || topic.includes("\n")) throw new Refused("newline", "a key with a newline cannot be signed");
    const signed = Buffer.concat([Buffer.from(`spendfuse-sig-v1\n${topic}\n`), key, Buffer.from("\n"), value]);
    if (!verify(null, signed, known.key, Buffer.from(signature, "base64"))) throw new Refused("wrong", kid);
    return kid;
  }
}

// A guard's own private key, `kid=base64`: what it signs is proved where the key is enrolled.
export class Signer {
  #key;

  constructor(text) {
    const equals = text.indexOf("=");
    const [kid, raw] = [text.slice(0, equals), Buffer.from(text.slice(equals + 1), "base64")];
    if (equals < 1 || !KID.test(kid) || raw.length !== 32) throw new Error("a private key is kid=<base64 of 32 bytes>");
    this.kid = kid;
    // RFC 8410: an Ed25519 private key in PKCS #8 is these bytes, then its 32.
    const der = Buffer.concat([Buffer.from("302e020100300506032b657004220420", "hex"), raw]);
    this.#key = createPrivateKey({ key: der, format: "der", type: "pkcs8" });
  }

  // The value of the header: `ed25519;kid=<id>;<base64>`.
  sign(topic, key, value) {
    if (key.includes("\n") || topic.includes("\n")) throw new Error("a topic or key with a newline cannot be signed");
    const signature = sign(null, Buffer.from(`spendfuse-sig-v1\n${topic}\n${key}\n${value}`), this.#key);
    return `ed25519;kid=${this.kid};${signature.toString("base64")}`;
  }
}

export const FAIL_MODES = ["bounded", "closed", "open"];

// What a guard does that hears nothing: whether it still knows enough, and for how long its agent may go on.
// Times are seconds of one clock that never goes back.
export class Silence {
  commandsRead = false;
  unread = false; // a command may have come that this guard cannot read
  #settings;
  #lastSign = -Infinity;
  #graceFrom = null; // {at, tokens}

  constructor(settings) {
    if (!FAIL_MODES.includes(settings.failMode)) {
      throw new Error(`SPENDFUSE_FAIL_MODE is ${settings.failMode}: set ${FAIL_MODES.join(", ")}`);
    }
    for (const name of ["staleAfterS", "blindAfterS", "graceS", "graceTokens"]) {
      if (!(settings[name] >= 0)) throw new Error(`the guard's setting ${name} is ${settings[name]}: give a number of 0 or more`);
    }
    this.#settings = settings;
  }

  heard(at, now) {
    this.#lastSign = Math.max(this.#lastSign, at);
    if (this.state(now) === "live") this.#graceFrom = null;
  }

  state(now) {
    if (!this.commandsRead) return "syncing";
    if (this.unread) return "blind";
    const silence = now - this.#lastSign;
    return silence > this.#settings.blindAfterS ? "blind" : silence > this.#settings.staleAfterS ? "stale" : "live";
  }

  // Why the agent may not go on, or null; `tokens` are those it has used so far.
  whyHalted(now, tokens) {
    const { failMode, graceS, graceTokens } = this.#settings;
    const state = this.state(now);
    if (failMode === "open" || state === "stale") return null;
    if (state === "live") {
      this.#graceFrom = null; // what was used meanwhile is counted by the worker now
      return null;
    }
    if (failMode === "closed") return `the guard is ${state}, and fail_mode is closed`;
    this.#graceFrom ??= { at: now, tokens };
    const [since, used] = [now - this.#graceFrom.at, tokens - this.#graceFrom.tokens];
    if (since < graceS && used <= graceTokens) return null;
    return `the guard is ${state}, and the grace of ${graceS} s and ${graceTokens} tokens is used up`;
  }
}

export const scopesOf = ({ workspace, team, agent, rootRun }) => [
  `agent:${workspace}/${team}/${agent}`,
  `team:${workspace}/${team}`,
  `workspace:${workspace}`,
  ...(rootRun ? [`run:${workspace}/${rootRun}`] : []),
];

// The scope that a record's key names; no more is known of it before its signature is checked.
export const scopeOfKey = (key) => (key ?? Buffer.alloc(0)).toString("utf8").split("|", 1)[0];

// The command of a record {topic, key, value, header}, or Refused. The bytes that came are verified, and only then parsed.
export function accept(record, verifier) {
  const { topic, value, header } = record;
  const key = record.key ?? Buffer.alloc(0);
  if (topic !== TOPIC) throw new Refused("topic", `${topic} is not ${TOPIC}`);
  if (value === null || value === undefined) throw new Refused("tombstone", "no value"); // else deleting it would free
  try {
    verifier.verify(topic, key, value, header);
  } catch (error) {
    throw error.reason === "unsigned" ? error : new Refused("signature", error.message);
  }
  const command = parsed(value);
  if (`${command.scope}|${command.budget}|${command.cap}` !== key.toString("utf8")) {
    throw new Refused("key", "the command is of another scope, budget or cap than its key");
  }
  return command;
}

function parsed(value) {
  try {
    const command = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(value));
    const whole = Number.isSafeInteger(command.seq) && command.seq >= 0;
    if (command.v !== 1 || !whole || !ACTIONS.includes(command.action)) throw new Error("no command of version 1");
    const expiresUs = command.expires_at == null ? Infinity : instantUs(command.expires_at);
    instantUs(command.issued_at);
    return Object.freeze({ ...command, key: `${command.scope}|${command.budget}|${command.cap}`, expiresUs });
  } catch (error) {
    throw new Refused("invalid", error.message);
  }
}

const stronger = (a, b) =>
  a.seq - b.seq || ACTIONS.indexOf(a.action) - ACTIONS.indexOf(b.action) || (a.id > b.id ? 1 : a.id < b.id ? -1 : 0);
const byKey = (a, b) => (a.key < b.key ? -1 : a.key > b.key ? 1 : 0);

// The commands that rule some scopes; the answer depends on the set of commands taken in, not on order or number.
export class Obedience {
  #ranks;
  #rulings = new Map();
  #warnings = new Map();

  constructor(scopes) {
    this.#ranks = new Map(scopes.map((scope, rank) => [scope, rank]));
  }

  concerns(scope) {
    return this.#ranks.has(scope);
  }

  // "ruling", "warning", "old", "elsewhere" or "full"
  apply(command) {
    if (!this.concerns(command.scope)) return "elsewhere";
    const warning = command.action === "warn";
    const kept = warning ? this.#warnings : this.#rulings;
    const before = kept.get(command.key);
    if (before !== undefined && stronger(command, before) <= 0) return "old";
    if (before === undefined && kept.size >= RULINGS_MAX && command.action !== "halt") return "full";
    kept.set(command.key, command);
    return warning ? "warning" : "ruling";
  }

  // What holds at a time: the halts, then the degrades, the agent's own scope first.
  strictest(us) {
    const holding = [...this.#rulings.values()]
      .filter((command) => command.action !== "resume" && command.expiresUs > us)
      .sort((a, b) => this.#ranks.get(a.scope) - this.#ranks.get(b.scope) || byKey(a, b));
    return new Verdict(holding);
  }
}

export class Verdict {
  constructor(holding) {
    this.halts = holding.filter((command) => command.action === "halt");
    this.degrades = holding.filter((command) => command.action === "degrade");
  }

  get action() {
    return this.halts.length ? "halt" : this.degrades.length ? "degrade" : "go";
  }

  get command() {
    return this.halts[0] ?? this.degrades[0] ?? null;
  }

  // The model to use for one: an exact entry before a pattern, a longer pattern first, the nearest scope first.
  model(name) {
    for (const { degrade } of this.degrades) {
      const models = new Map(Object.entries(degrade?.models ?? {}));
      if (models.has(name)) return models.get(name);
      const patterns = [...models.keys()].sort((a, b) => b.length - a.length || (a < b ? -1 : 1));
      for (const pattern of patterns) if (glob(pattern).test(name)) return models.get(pattern);
    }
    return name;
  }

  get maxOutputTokens() {
    const limits = this.degrades.map(({ degrade }) => degrade?.max_output_tokens).filter((limit) => limit != null);
    return limits.length ? Math.min(...limits) : null;
  }
}

// `*` and `?`, as in Python's fnmatch; its [...] is taken literally here.
function glob(pattern) {
  const source = pattern.replace(/[.+^${}()|[\]\\]/g, "\\$&").replace(/\*+/g, ".*").replace(/\?/g, ".");
  return new RegExp(`^${source}$`, "s");
}
