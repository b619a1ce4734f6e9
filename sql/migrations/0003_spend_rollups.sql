-- Spend per minute, hour and day, summed as the usage is inserted; duplicates do not count.
--
-- Each view hangs on usage_events itself: a cascade (minute to hour to day) heals less simply after a crash.
-- Every target has a deduplication window of its own, or a repeated insert would double it.
-- No TTL, not even on the minutes: buckets are of event time, and a replay or a demo of an old weekend would lose
-- its rows at the first merge. Where traffic is dense, add `TTL bucket + INTERVAL 7 DAY` in a later migration.
-- Sums are of one currency each: never add cost_nanos over different currencies.

CREATE TABLE IF NOT EXISTS ${DB}.spend_1m (
  bucket DateTime('UTC') CODEC(DoubleDelta, ZSTD(1)),
  workspace LowCardinality(String),
  team LowCardinality(String),
  agent LowCardinality(String),
  workflow LowCardinality(String),
  provider LowCardinality(String),
  model LowCardinality(String),
  currency LowCardinality(String),
  calls SimpleAggregateFunction(sum, UInt64),
  late_calls SimpleAggregateFunction(sum, UInt64),
  input_tokens SimpleAggregateFunction(sum, UInt64),
  cache_read_tokens SimpleAggregateFunction(sum, UInt64),
  cache_write_5m_tokens SimpleAggregateFunction(sum, UInt64),
  cache_write_1h_tokens SimpleAggregateFunction(sum, UInt64),
  output_tokens SimpleAggregateFunction(sum, UInt64),
  reasoning_tokens SimpleAggregateFunction(sum, UInt64),
  cost_nanos SimpleAggregateFunction(sum, Int64),
  cost_usd Float64 ALIAS cost_nanos / 1e9
) ENGINE = AggregatingMergeTree PARTITION BY toYYYYMM(bucket)
ORDER BY (workspace, team, agent, workflow, provider, model, currency, bucket)
SETTINGS non_replicated_deduplication_window = 10000;

CREATE MATERIALIZED VIEW IF NOT EXISTS ${DB}.spend_1m_mv TO ${DB}.spend_1m AS
SELECT toStartOfMinute(toDateTime(e.occurred_at, 'UTC')) AS bucket, e.workspace AS workspace, e.team AS team, e.agent AS agent,
  e.workflow AS workflow, e.provider AS provider, e.model AS model, e.currency AS currency,
  count() AS calls, sum(e.late) AS late_calls,
  sum(e.input_tokens) AS input_tokens, sum(e.cache_read_tokens) AS cache_read_tokens,
  sum(e.cache_write_5m_tokens) AS cache_write_5m_tokens, sum(e.cache_write_1h_tokens) AS cache_write_1h_tokens,
  sum(e.output_tokens) AS output_tokens, sum(e.reasoning_tokens) AS reasoning_tokens,
  sum(e.cost_nanos) AS cost_nanos
FROM ${DB}.usage_events AS e
WHERE e.kind = 'charge'
GROUP BY bucket, workspace, team, agent, workflow, provider, model, currency;

CREATE TABLE IF NOT EXISTS ${DB}.spend_1h (
  bucket DateTime('UTC') CODEC(DoubleDelta, ZSTD(1)),
  workspace LowCardinality(String),
  team LowCardinality(String),
  agent LowCardinality(String),
  workflow LowCardinality(String),
  provider LowCardinality(String),
  model LowCardinality(String),
  currency LowCardinality(String),
  calls SimpleAggregateFunction(sum, UInt64),
  late_calls SimpleAggregateFunction(sum, UInt64),
  input_tokens SimpleAggregateFunction(sum, UInt64),
  cache_read_tokens SimpleAggregateFunction(sum, UInt64),
  cache_write_5m_tokens SimpleAggregateFunction(sum, UInt64),
  cache_write_1h_tokens SimpleAggregateFunction(sum, UInt64),
  output_tokens SimpleAggregateFunction(sum, UInt64),
  reasoning_tokens SimpleAggregateFunction(sum, UInt64),
  cost_nanos SimpleAggregateFunction(sum, Int64),
  cost_usd Float64 ALIAS cost_nanos / 1e9
) ENGINE = AggregatingMergeTree PARTITION BY toYYYYMM(bucket)
ORDER BY (workspace, team, agent, workflow, provider, model, currency, bucket)
SETTINGS non_replicated_deduplication_window = 10000;

CREATE MATERIALIZED VIEW IF NOT EXISTS ${DB}.spend_1h_mv TO ${DB}.spend_1h AS
SELECT toStartOfHour(toDateTime(e.occurred_at, 'UTC')) AS bucket, e.workspace AS workspace, e.team AS team, e.agent AS agent,
  e.workflow AS workflow, e.provider AS provider, e.model AS model, e.currency AS currency,
  count() AS calls, sum(e.late) AS late_calls,
  sum(e.input_tokens) AS input_tokens, sum(e.cache_read_tokens) AS cache_read_tokens,
  sum(e.cache_write_5m_tokens) AS cache_write_5m_tokens, sum(e.cache_write_1h_tokens) AS cache_write_1h_tokens,
  sum(e.output_tokens) AS output_tokens, sum(e.reasoning_tokens) AS reasoning_tokens,
  sum(e.cost_nanos) AS cost_nanos
FROM ${DB}.usage_events AS e
WHERE e.kind = 'charge'
GROUP BY bucket, workspace, team, agent, workflow, provider, model, currency;

CREATE TABLE IF NOT EXISTS ${DB}.spend_1d (
  bucket DateTime('UTC') CODEC(DoubleDelta, ZSTD(1)),
  workspace LowCardinality(String),
  team LowCardinality(String),
  agent LowCardinality(String),
  workflow LowCardinality(String),
  provider LowCardinality(String),
  model LowCardinality(String),
  currency LowCardinality(String),
  calls SimpleAggregateFunction(sum, UInt64),
  late_calls SimpleAggregateFunction(sum, UInt64),
  input_tokens SimpleAggregateFunction(sum, UInt64),
  cache_read_tokens SimpleAggregateFunction(sum, UInt64),
  cache_write_5m_tokens SimpleAggregateFunction(sum, UInt64),
  cache_write_1h_tokens SimpleAggregateFunction(sum, UInt64),
  output_tokens SimpleAggregateFunction(sum, UInt64),
  reasoning_tokens SimpleAggregateFunction(sum, UInt64),
  cost_nanos SimpleAggregateFunction(sum, Int64),
  cost_usd Float64 ALIAS cost_nanos / 1e9
) ENGINE = AggregatingMergeTree PARTITION BY toYYYYMM(bucket)
ORDER BY (workspace, team, agent, workflow, provider, model, currency, bucket)
SETTINGS non_replicated_deduplication_window = 10000;

CREATE MATERIALIZED VIEW IF NOT EXISTS ${DB}.spend_1d_mv TO ${DB}.spend_1d AS
SELECT toStartOfDay(toDateTime(e.occurred_at, 'UTC')) AS bucket, e.workspace AS workspace, e.team AS team, e.agent AS agent,
  e.workflow AS workflow, e.provider AS provider, e.model AS model, e.currency AS currency,
  count() AS calls, sum(e.late) AS late_calls,
  sum(e.input_tokens) AS input_tokens, sum(e.cache_read_tokens) AS cache_read_tokens,
  sum(e.cache_write_5m_tokens) AS cache_write_5m_tokens, sum(e.cache_write_1h_tokens) AS cache_write_1h_tokens,
  sum(e.output_tokens) AS output_tokens, sum(e.reasoning_tokens) AS reasoning_tokens,
  sum(e.cost_nanos) AS cost_nanos
FROM ${DB}.usage_events AS e
WHERE e.kind = 'charge'
GROUP BY bucket, workspace, team, agent, workflow, provider, model, currency;
