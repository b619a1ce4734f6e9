// Follows the commands that concern one agent; prints one JSON line whenever what holds changes.
// With --until-halted it ends with exit code 3 at the first halt: wrap it around what must stop.
import { createPublicKey, randomUUID, verify } from "node:crypto";
import { identity, kafka, required } from "./settings.mjs";

const TOPIC = "spendfuse.commands.v1";
const SIGNATURE = /^ed25519;kid=([A-Za-z0-9][A-Za-z0-9._+-]{0,63});([A-Za-z0-9+/]{86}==)$/;
const TICK_MS = 1_000;

// kid=base64[;until=<when it ends>][,...]: raw Ed25519 public keys, which Node takes as JWK. One that has ended is left out.
const keys = new Map(
  required("PUBLIC_KEYS").split(/[,\s]+/).filter(Boolean).map((item) => item.split(";until=")).filter(
    ([, until]) => until === undefined || Date.parse(until) > Date.now(),
  ).map(([item]) => {
    const equals = item.indexOf("=");
    const x = Buffer.from(item.slice(equals + 1), "base64").toString("base64url");
    return [item.slice(0, equals), createPublicKey({ key: { kty: "OKP", crv: "Ed25519", x }, format: "jwk" })];
  }),
);

const { workspace, team, agent, run } = identity;
const scopes = [
  `agent:${workspace}/${team}/${agent}`,
  `team:${workspace}/${team}`,
  `workspace:${workspace}`,
  `run:${workspace}/${process.env.SPENDFUSE_ROOT_RUN || run}`,
];

// The bytes that came are verified, and only then parsed. No value, no signature: a deleted record commands nothing.
function accepted(message) {
  const { key, value, headers } = message;
  if (key === null || value === null || key.includes(0x0a)) return null;
  if (!scopes.includes(key.toString().split("|")[0])) return null;
  const [, kid, signature] = SIGNATURE.exec(headers?.["spendfuse-sig"]?.toString() ?? "") ?? [];
  const publicKey = keys.get(kid);
  const signed = Buffer.concat([Buffer.from(`spendfuse-sig-v1\n${TOPIC}\n`), key, Buffer.from("\n"), value]);
  if (!publicKey || !verify(null, signed, publicKey, Buffer.from(signature, "base64"))) {
    console.error(`refused the command at offset ${message.offset}: its signature is missing or wrong`);
    return null;
  }
  const command = JSON.parse(value.toString());
  return `${command.scope}|${command.budget}|${command.cap}` === key.toString() ? command : null;
}

const rulings = new Map(); // scope|budget|cap -> the command of the highest seq; a warning rules nothing

function apply(message) {
  const command = accepted(message);
  if (command === null || command.action === "warn") return;
  const key = message.key.toString();
  if ((rulings.get(key)?.seq ?? -1) < command.seq) rulings.set(key, command);
}

function strictest() {
  const now = Date.now();
  const holding = [...rulings.values()].filter((c) => !c.expires_at || Date.parse(c.expires_at) > now);
  return holding.find((c) => c.action === "halt") ?? holding.find((c) => c.action === "degrade") ?? null;
}

let caughtUp = false;
let shown;
function show() {
  const command = strictest();
  if (!caughtUp || shown === (command?.id ?? "go")) return;
  shown = command?.id ?? "go";
  console.log(
    JSON.stringify(
      command === null
        ? { action: "go" }
        : { action: command.action, scope: command.scope, seq: command.seq, message: command.message ?? "" },
    ),
  );
  if (command?.action === "halt" && process.argv.includes("--until-halted")) finish(3);
}

const client = kafka("spendfuse-node-follow");
const admin = client.admin();
await admin.connect();
// Asking for all topics, since asking for one by its name would create it.
while (!(await admin.listTopics()).includes(TOPIC)) await new Promise((done) => setTimeout(done, TICK_MS));
const [{ high, low }] = await admin.fetchTopicOffsets(TOPIC); // it has one partition

// Every follower must see every command, so each has a group of its own. It commits nothing and is gone with us.
const groupId = `spendfuse-node-follow-${randomUUID()}`;
const consumer = client.consumer({
  groupId,
  allowAutoTopicCreation: false,
  sessionTimeout: 6_000,
  rebalanceTimeout: 6_000,
  heartbeatInterval: 1_000,
  maxWaitTimeInMs: Number(process.env.SPENDFUSE_FETCH_MAX_WAIT_MS ?? 500),
});

let finishing = false;
async function finish(code) {
  if (finishing) return;
  finishing = true;
  setTimeout(() => process.exit(code), 5_000).unref();
  await consumer.disconnect();
  await admin.deleteGroups([groupId]).catch(() => {}); // an empty group also expires by itself
  await admin.disconnect();
  process.exit(code);
}
for (const signal of ["SIGINT", "SIGTERM"]) process.on(signal, () => finish(0));

await consumer.connect();
await consumer.subscribe({ topics: [TOPIC], fromBeginning: true });
await consumer.run({
  autoCommit: false,
  eachBatch: async ({ batch }) => {
    for (const message of batch.messages) {
      try {
        apply(message);
      } catch (error) {
        console.error(`cannot read the command at offset ${message.offset}: ${error.message}`);
      }
    }
    caughtUp ||= BigInt(batch.lastOffset()) + 1n >= BigInt(high);
    show();
  },
});
caughtUp ||= BigInt(high) <= BigInt(low);
setInterval(show, TICK_MS); // a halt that expires does so without a message
show();
