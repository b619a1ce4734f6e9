// The obeyer beside a Node.js agent: check() before every call, and it throws Halted when a cap has tripped.
//
//   const guard = await Guard.start();     // SPENDFUSE_WORKSPACE, _TEAM, _AGENT, _PUBLIC_KEYS, _BOOTSTRAP_SERVERS
//   guard.check();                         // throws Halted; reads memory only
//   const model = guard.model("gpt-5");    // another one while degraded
import { randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { install, NO_CODEC, UNREADABLE } from "./batches.mjs";
import { accept, instantUs, nowUs, Obedience, Refused, scopeOfKey, scopesOf, SIGNATURE_HEADER, Signer, Silence, TOPIC, Verifier } from "./core.mjs";

install();
const { Kafka, logLevel, Partitioners } = createRequire(import.meta.url)("kafkajs"); // after that: see batches.mjs

const HEARTBEATS = "spendfuse.heartbeats.v1";
const ACKS = "spendfuse.acks.v1";
const ACKS_MAX = 1_000; // acknowledgements that wait for the broker; the oldest are dropped beyond it
const EMITTERS_MAX = 1_000; // whose last heartbeat is remembered
const TOPIC_POLL_MS = 500;
const STOP_TIMEOUT_MS = 5_000;

export class Halted extends Error {
  constructor(message, command = null) {
    super(message);
    this.name = "Halted";
    this.command = command;
  }
}

function setting(name, otherwise) {
  const value = process.env[`SPENDFUSE_${name}`] || otherwise;
  if (value === undefined) throw new Error(`set SPENDFUSE_${name}; README.md says to what`);
  return value;
}

const seconds = () => performance.now() / 1_000;

// A setting that may be given as a file, SPENDFUSE_..._FILE.
function secret(name, otherwise) {
  const file = process.env[`SPENDFUSE_${name}_FILE`];
  return !process.env[`SPENDFUSE_${name}`] && file ? readFileSync(file, "utf8").trim() : setting(name, otherwise);
}

// The last of a header's values, as bytes.
function lastOf(header) {
  const last = Array.isArray(header) ? header.at(-1) : header;
  return last && Buffer.from(last);
}

export class Guard {
  id = `node-${randomUUID()}`;
  refused = {}; // records that were not obeyed, by reason
  #identity;
  #scopes;
  #obedience;
  #verifier;
  #signer;
  #silence = new Silence({
    failMode: setting("FAIL_MODE", "bounded"),
    staleAfterS: Number(setting("STALE_AFTER_S", "15")),
    blindAfterS: Number(setting("BLIND_AFTER_S", "120")),
    graceS: Number(setting("GRACE_S", "300")),
    graceTokens: Number(setting("GRACE_TOKENS", "50000")),
  });
  #syncTimeoutMs = 1_000 * Number(setting("SYNC_TIMEOUT_S", "2"));
  #tokens = 0;
  #kafka;
  #consumer;
  #producer;
  #groupId;
  #acked = new Map(); // key -> {seq, live, enforced} of the halt that was acknowledged last
  #waiting = [];
  #sending = null;
  #high = new Map();
  #read = new Map();
  #beats = new Map(); // emitter -> when its last heartbeat was said
  #listeners = new Set();

  // Returns when all commands are read, or after SPENDFUSE_SYNC_TIMEOUT_S: then the guard is syncing, and goes on trying.
  static async start(options = {}) {
    const guard = new Guard(options);
    const followed = guard.#follow();
    const late = new Promise((done) => setTimeout(done, guard.#syncTimeoutMs).unref());
    await Promise.race([followed, late]);
    return guard;
  }

  constructor({ workspace, team, agent, run, rootRun, publicKeys, guardKey, kafka } = {}) {
    this.#identity = {
      workspace: workspace ?? setting("WORKSPACE"),
      team: team ?? setting("TEAM"),
      agent: agent ?? setting("AGENT"),
      run: run ?? setting("RUN", randomUUID()),
    };
    this.#identity.rootRun = rootRun ?? setting("ROOT_RUN", this.#identity.run);
    this.#scopes = scopesOf(this.#identity);
    this.#obedience = new Obedience(this.#scopes);
    this.#verifier = new Verifier(publicKeys ?? secret("PUBLIC_KEYS"));
    const ownKey = guardKey ?? secret("GUARD_KEY", "");
    this.#signer = ownKey ? new Signer(ownKey) : null; // else its acks are only claimed
    this.#kafka =
      kafka ??
      new Kafka({
        clientId: "spendfuse-node-guard",
        brokers: setting("BOOTSTRAP_SERVERS", "127.0.0.1:9092").split(","),
        logLevel: logLevel.ERROR,
      });
  }

  // syncing: not all read yet; live; stale, blind: no worker's sign of life for a while
  get state() {
    return this.#silence.state(seconds());
  }

  // Count what the agent used: while no worker is heard of, its grace is also so many tokens.
  used(tokens) {
    if (!(tokens >= 0)) throw new Error(`used ${tokens}: give a number of tokens, 0 or more`);
    this.#tokens += tokens;
  }

  // Return if the agent may go on, else throw Halted, and acknowledge each halt as enforced, once.
  check() {
    const verdict = this.#obedience.strictest(nowUs());
    if (verdict.action === "halt") {
      for (const command of verdict.halts) this.#ack(command, "enforced");
      const command = verdict.command;
      const what = command.message || `${command.scope} is halted by budget ${command.budget}, cap ${command.cap}`;
      throw new Halted(`${this.#scopes[0]} is halted: ${what} [by ${command.by ?? "spendfuse"}, seq ${command.seq}]`, command);
    }
    const why = this.#silence.whyHalted(seconds(), this.#tokens);
    if (why !== null) throw new Halted(`${this.#scopes[0]} must stop: ${why}`);
  }

  model(name) {
    return this.#obedience.strictest(nowUs()).model(name);
  }

  get maxOutputTokens() {
    return this.#obedience.strictest(nowUs()).maxOutputTokens;
  }

  // Call back with the Halted that check() would throw, as soon as a halt arrives; returns how to stop listening.
  onHalt(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  async close() {
    const timeout = new Promise((done) => setTimeout(done, STOP_TIMEOUT_MS).unref());
    await Promise.race([timeout, this.#stop()]);
  }

  async #stop() {
    await this.#flush();
    await this.#consumer?.disconnect();
    await this.#producer?.disconnect();
    const admin = this.#kafka.admin();
    await admin.connect();
    await admin.deleteGroups([this.#groupId]).catch(() => {}); // an empty group also expires by itself
    await admin.disconnect();
  }

  async #follow() {
    const admin = this.#kafka.admin();
    await admin.connect();
    // Asking for all topics, since asking for one by its name would create it.
    for (;;) {
      const known = await admin.listTopics();
      if ([TOPIC, HEARTBEATS, ACKS].every((name) => known.includes(name))) break;
      await new Promise((done) => setTimeout(done, TOPIC_POLL_MS));
    }
    for (const topic of [TOPIC, HEARTBEATS]) {
      const [{ high, low }] = await admin.fetchTopicOffsets(topic); // each has one partition
      this.#high.set(topic, BigInt(high) > BigInt(low) ? BigInt(high) : 0n);
    }
    await admin.disconnect();
    this.#producer = this.#kafka.producer({ createPartitioner: Partitioners.DefaultPartitioner, allowAutoTopicCreation: false });
    await this.#producer.connect();
    // Every guard must see every command, so each has a group of its own, which commits nothing.
    this.#groupId = `spendfuse-${this.id}`;
    this.#consumer = this.#kafka.consumer({
      groupId: this.#groupId,
      allowAutoTopicCreation: false,
      sessionTimeout: 6_000,
      rebalanceTimeout: 6_000,
      heartbeatInterval: 1_000,
      maxWaitTimeInMs: Number(setting("FETCH_MAX_WAIT_MS", "500")),
    });
    await this.#consumer.connect();
    await this.#consumer.subscribe({ topics: [TOPIC, HEARTBEATS], fromBeginning: true });
    const synced = new Promise((done) => (this.#onSynced = done));
    await this.#consumer.run({ autoCommit: false, eachBatch: async ({ batch }) => this.#take(batch) });
    this.#settle();
    await synced;
  }

  #onSynced = () => {};

  #take(batch) {
    for (const message of batch.messages) {
      const why = lastOf(message.headers?.[UNREADABLE]);
      if (message.key === null && message.value === null && why) this.#unreadable(batch.topic, message.offset, why.toString());
      else if (batch.topic === TOPIC) this.#command(message);
      else this.#heartbeat(message);
    }
    this.#read.set(batch.topic, BigInt(batch.lastOffset()) + 1n);
    this.#settle();
  }

  #unreadable(topic, offset, why) {
    this.#count("unreadable");
    console.error(`spendfuse guard cannot read the record batch that ends at offset ${offset} of ${topic}: ${why}`);
    // No guard can read what is broken. What others can read may be a halt: this one knows too little to be live.
    if (topic === TOPIC && why.startsWith(NO_CODEC)) this.#silence.unread = true;
  }

  #settle() {
    if (this.#silence.commandsRead) return;
    const behind = [...this.#high].some(([topic, high]) => (this.#read.get(topic) ?? 0n) < high);
    if (behind) return;
    this.#silence.commandsRead = true;
    // Of the past, only what still holds is acknowledged.
    for (const command of this.#obedience.strictest(nowUs()).halts) this.#received(command, false);
    this.#onSynced();
  }

  #command(message) {
    // A signature costs a hundred times what the rest does, and most commands are for others.
    if (message.key !== null && !this.#obedience.concerns(scopeOfKey(message.key))) return;
    let command;
    try {
      const header = lastOf(message.headers?.[SIGNATURE_HEADER]);
      command = accept({ topic: TOPIC, key: message.key, value: message.value, header }, this.#verifier);
    } catch (error) {
      const reason = error instanceof Refused ? error.reason : "invalid";
      this.#count(reason);
      console.error(`spendfuse guard refused the command at offset ${message.offset}: ${error.message}`);
      return;
    }
    const worth = this.#obedience.apply(command);
    if (command.expiresUs <= nowUs()) this.#count("expired");
    else if (worth === "old" || worth === "full") this.#count(worth);
    else if (command.action === "halt" && this.#silence.commandsRead) {
      this.#received(command, true);
      for (const listener of this.#listeners) listener(new Halted(command.message || `${command.scope} is halted`, command));
    }
  }

  #heartbeat(message) {
    if (message.value === null) return;
    try {
      const key = message.key ?? Buffer.alloc(0);
      this.#verifier.verify(HEARTBEATS, key, message.value, lastOf(message.headers?.[SIGNATURE_HEADER]));
      const beat = JSON.parse(message.value.toString());
      if (beat.emitter !== key.toString()) throw new Error("another emitter's");
      const ts = instantUs(beat.ts);
      if (ts <= (this.#beats.get(beat.emitter) ?? -Infinity)) return; // recorded and written again: no sign of life
      if (this.#beats.size >= EMITTERS_MAX) this.#beats.delete(this.#beats.keys().next().value);
      this.#beats.delete(beat.emitter);
      this.#beats.set(beat.emitter, ts);
      if (!beat.ready || beat.stale) return;
      const ageS = this.#silence.commandsRead ? 0 : Math.max(0, Date.now() - Number(message.timestamp)) / 1_000;
      this.#silence.heard(seconds() - ageS, seconds());
    } catch {
      this.#count("heartbeat");
    }
  }

  #count(reason) {
    this.refused[reason] = (this.refused[reason] ?? 0) + 1;
  }

  #received(command, live) {
    this.#acked.set(command.key, { seq: command.seq, live, enforced: false });
    this.#put(command, "received", live);
  }

  #ack(command, state) {
    const acked = this.#acked.get(command.key);
    if (acked === undefined || acked.seq !== command.seq || acked.enforced) return;
    acked.enforced = true;
    this.#put(command, state, acked.live);
  }

  #put(command, state, live) {
    const us = nowUs();
    const ack = {
      v: 1,
      command_id: command.id,
      seq: command.seq,
      scope: command.scope,
      budget: command.budget,
      cap: command.cap,
      agent: this.#scopes[0],
      run: this.#identity.run,
      guard: this.id,
      state,
      at: new Date(us / 1_000).toISOString(),
      // A halt that was there before the guard says nothing about how fast halts arrive.
      ...(live && command.cause ? { halt_lag_us: us - instantUs(command.cause.ts) } : {}),
    };
    const [key, value] = [command.scope, JSON.stringify(ack)];
    const headers = this.#signer ? { [SIGNATURE_HEADER]: this.#signer.sign(ACKS, key, value) } : {};
    this.#waiting.push({ key, value, headers });
    if (this.#waiting.length > ACKS_MAX) this.#waiting.shift();
    this.#flush();
  }

  // What is put while a send is under way goes with the next one.
  #flush() {
    this.#sending ??= (async () => {
      try {
        while (this.#waiting.length && this.#producer) {
          const messages = this.#waiting.splice(0);
          await this.#producer.send({ topic: ACKS, acks: -1, messages }).catch((error) => {
            console.error(`spendfuse guard could not acknowledge: ${error.message}`);
          });
        }
      } finally {
        this.#sending = null;
      }
    })();
    return this.#sending;
  }
}
