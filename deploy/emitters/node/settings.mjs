// The settings both examples read: the same SPENDFUSE_... variables as everywhere.
import { Kafka, logLevel } from "kafkajs";

export function required(name) {
  const value = process.env[`SPENDFUSE_${name}`];
  if (!value) {
    console.error(`set SPENDFUSE_${name}; README.md says to what`);
    process.exit(2);
  }
  return value;
}

export const identity = {
  workspace: required("WORKSPACE"),
  team: required("TEAM"),
  agent: required("AGENT"),
  run: required("RUN"),
};

export function kafka(clientId) {
  const brokers = (process.env.SPENDFUSE_BOOTSTRAP_SERVERS ?? "127.0.0.1:9092").split(",");
  return new Kafka({ clientId, brokers, logLevel: logLevel.ERROR, retry: { initialRetryTime: 100, retries: 8 } });
}
