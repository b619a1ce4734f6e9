// Emits the usage of one model call: node emit.mjs '{"input":200,"cache_read":100000,"output":100}'
import { randomUUID } from "node:crypto";
import { Partitioners } from "kafkajs";
import { identity, kafka } from "./settings.mjs";

const tokens = JSON.parse(process.argv[2] ?? '{"input":200,"cache_read":100000,"output":100}');
const usage = {
  v: 1,
  id: `node:${randomUUID()}`, // one for each call: the same id twice is charged once
  ts: new Date().toISOString(),
  ...identity,
  provider: process.env.PROVIDER ?? "anthropic",
  model: process.env.MODEL ?? "claude-sonnet-4-6",
  tokens, // disjoint counters: input is what no cache served
  source: "spendfuse-node-example",
};

const producer = kafka("spendfuse-node-emit").producer({
  // Any partitioner will do, spendfuse routes by agent itself; this one is what Java and Python clients use.
  createPartitioner: Partitioners.DefaultPartitioner,
  allowAutoTopicCreation: false,
});
await producer.connect();
try {
  await producer.send({
    topic: "spendfuse.usage.v1",
    acks: -1,
    messages: [{ key: `${usage.workspace}/${usage.team}/${usage.agent}`, value: JSON.stringify(usage) }],
  });
  console.log(`emitted ${usage.id}`);
} finally {
  await producer.disconnect();
}
