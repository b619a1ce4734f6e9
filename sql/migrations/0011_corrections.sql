-- Corrections: what an operator adds to an earlier charge, or takes from it. One row each, never changed; usage stays as it was.
--
-- Differences are signed. The names are those of the usage that is corrected, and occurred_at is its event time: so a
-- correction lands in the very sums its usage is in. It adds no call.
-- In terms of FOCUS each row is a charge of ChargeClass 'Correction'.
CREATE TABLE IF NOT EXISTS ${DB}.corrections (
  correction_id String CODEC(ZSTD(3)),
  usage_id String CODEC(ZSTD(3)),
  occurred_at DateTime64(6, 'UTC') CODEC(Delta, ZSTD(1)),
  stated_at DateTime64(6, 'UTC') CODEC(Delta, ZSTD(1)),
  recorded_at DateTime64(6, 'UTC') CODEC(Delta, ZSTD(1)),
  ingested_at DateTime64(3, 'UTC') DEFAULT now64(3, 'UTC') CODEC(Delta, ZSTD(1)),
  workspace LowCardinality(String),
  team LowCardinality(String),
  agent LowCardinality(String),
  run String CODEC(ZSTD(3)),
  root_run String CODEC(ZSTD(3)),
  parent_run String CODEC(ZSTD(3)),
  workflow LowCardinality(String),
  provider LowCardinality(String),
  model LowCardinality(String),
  tier LowCardinality(String),
  input_tokens Int64,
  cache_read_tokens Int64,
  cache_write_5m_tokens Int64,
  cache_write_1h_tokens Int64,
  output_tokens Int64,
  reasoning_tokens Int64,
  cost_nanos Int64,
  currency LowCardinality(String),
  reason LowCardinality(String),
  note String CODEC(ZSTD(3)),
  stated_by LowCardinality(String),
  late UInt8,
  tags Map(LowCardinality(String), String) CODEC(ZSTD(3)),
  src_topic LowCardinality(String),
  src_partition UInt16,
  src_offset UInt64,
  src_index UInt16,
  ledger_partition UInt16,
  ledger_offset UInt64,
  batch_seq UInt64 DEFAULT 0,
  batch_row UInt32 DEFAULT 0,
  INDEX ix_usage usage_id TYPE bloom_filter(0.01) GRANULARITY 2,
  INDEX ix_root_run root_run TYPE bloom_filter(0.01) GRANULARITY 2
) ENGINE = MergeTree PARTITION BY toYYYYMM(occurred_at)
ORDER BY (workspace, team, agent, occurred_at)
TTL toDateTime(ingested_at) + INTERVAL ${TTL_DAYS} DAY DELETE
SETTINGS non_replicated_deduplication_window = 10000, ttl_only_drop_parts = 1, fsync_after_insert = 1;

ALTER TABLE ${DB}.corrections
  ADD COLUMN IF NOT EXISTS cost_center LowCardinality(String) MATERIALIZED tags['cost_center'];

-- The rollups' token columns are UInt64, and a type is not changed under a trail that nobody may alter. Their sums are
-- modulo 2^64, so that a difference below zero added as its complement gives the right sum; whoever reads one that may
-- itself be below zero says toInt64, as the views below do.
CREATE MATERIALIZED VIEW IF NOT EXISTS ${DB}.spend_1m_corrections_mv TO ${DB}.spend_1m AS
SELECT toStartOfMinute(toDateTime(e.occurred_at, 'UTC')) AS bucket, e.workspace AS workspace, e.team AS team, e.agent AS agent,
  e.workflow AS workflow, e.provider AS provider, e.model AS model, e.currency AS currency,
  toUInt64(0) AS calls, toUInt64(0) AS late_calls,
  toUInt64(sum(e.input_tokens)) AS input_tokens,
  toUInt64(sum(e.cache_read_tokens)) AS cache_read_tokens,
  toUInt64(sum(e.cache_write_5m_tokens)) AS cache_write_5m_tokens,
  toUInt64(sum(e.cache_write_1h_tokens)) AS cache_write_1h_tokens,
  toUInt64(sum(e.output_tokens)) AS output_tokens,
  toUInt64(sum(e.reasoning_tokens)) AS reasoning_tokens,
  sum(e.cost_nanos) AS cost_nanos
FROM ${DB}.corrections AS e
GROUP BY bucket, workspace, team, agent, workflow, provider, model, currency;

CREATE MATERIALIZED VIEW IF NOT EXISTS ${DB}.spend_1h_corrections_mv TO ${DB}.spend_1h AS
SELECT toStartOfHour(toDateTime(e.occurred_at, 'UTC')) AS bucket, e.workspace AS workspace, e.team AS team, e.agent AS agent,
  e.workflow AS workflow, e.provider AS provider, e.model AS model, e.currency AS currency,
  toUInt64(0) AS calls, toUInt64(0) AS late_calls,
  toUInt64(sum(e.input_tokens)) AS input_tokens,
  toUInt64(sum(e.cache_read_tokens)) AS cache_read_tokens,
  toUInt64(sum(e.cache_write_5m_tokens)) AS cache_write_5m_tokens,
  toUInt64(sum(e.cache_write_1h_tokens)) AS cache_write_1h_tokens,
  toUInt64(sum(e.output_tokens)) AS output_tokens,
  toUInt64(sum(e.reasoning_tokens)) AS reasoning_tokens,
  sum(e.cost_nanos) AS cost_nanos
FROM ${DB}.corrections AS e
GROUP BY bucket, workspace, team, agent, workflow, provider, model, currency;

CREATE MATERIALIZED VIEW IF NOT EXISTS ${DB}.spend_1d_corrections_mv TO ${DB}.spend_1d AS
SELECT toStartOfDay(toDateTime(e.occurred_at, 'UTC')) AS bucket, e.workspace AS workspace, e.team AS team, e.agent AS agent,
  e.workflow AS workflow, e.provider AS provider, e.model AS model, e.currency AS currency,
  toUInt64(0) AS calls, toUInt64(0) AS late_calls,
  toUInt64(sum(e.input_tokens)) AS input_tokens,
  toUInt64(sum(e.cache_read_tokens)) AS cache_read_tokens,
  toUInt64(sum(e.cache_write_5m_tokens)) AS cache_write_5m_tokens,
  toUInt64(sum(e.cache_write_1h_tokens)) AS cache_write_1h_tokens,
  toUInt64(sum(e.output_tokens)) AS output_tokens,
  toUInt64(sum(e.reasoning_tokens)) AS reasoning_tokens,
  sum(e.cost_nanos) AS cost_nanos
FROM ${DB}.corrections AS e
GROUP BY bucket, workspace, team, agent, workflow, provider, model, currency;

-- As before, and signed. spend_over(since, until): the minutes from since to until, both included, as the fewest rows that add up to them: whole
-- UTC days from spend_1d, hours from spend_1h, the rest from spend_1m. Bounds are seconds since 1970 and not instants,
-- which a server would read in a time zone of its own.
CREATE OR REPLACE VIEW ${DB}.spend_over AS
WITH
  toDateTime({since:UInt32}, 'UTC') AS from_minute, toDateTime({until:UInt32} + 1, 'UTC') AS to_minute,
  toStartOfHour(from_minute + 3599) AS from_hour, toStartOfHour(to_minute) AS to_hour,
  toStartOfDay(from_minute + 86399) AS from_day, toStartOfDay(to_minute) AS to_day
SELECT workspace, team, agent, workflow, provider, model, currency, bucket, calls, late_calls,
  toInt64(s.input_tokens) AS input_tokens,
  toInt64(s.cache_read_tokens) AS cache_read_tokens,
  toInt64(s.cache_write_5m_tokens) AS cache_write_5m_tokens,
  toInt64(s.cache_write_1h_tokens) AS cache_write_1h_tokens,
  toInt64(s.output_tokens) AS output_tokens,
  toInt64(s.reasoning_tokens) AS reasoning_tokens, cost_nanos
FROM ${DB}.spend_1m AS s
WHERE bucket >= from_minute AND bucket < to_minute AND (bucket < from_hour OR bucket >= to_hour)
UNION ALL
WITH
  toDateTime({since:UInt32}, 'UTC') AS from_minute, toDateTime({until:UInt32} + 1, 'UTC') AS to_minute,
  toStartOfHour(from_minute + 3599) AS from_hour, toStartOfHour(to_minute) AS to_hour,
  toStartOfDay(from_minute + 86399) AS from_day, toStartOfDay(to_minute) AS to_day
SELECT workspace, team, agent, workflow, provider, model, currency, bucket, calls, late_calls,
  toInt64(s.input_tokens) AS input_tokens,
  toInt64(s.cache_read_tokens) AS cache_read_tokens,
  toInt64(s.cache_write_5m_tokens) AS cache_write_5m_tokens,
  toInt64(s.cache_write_1h_tokens) AS cache_write_1h_tokens,
  toInt64(s.output_tokens) AS output_tokens,
  toInt64(s.reasoning_tokens) AS reasoning_tokens, cost_nanos
FROM ${DB}.spend_1h AS s
WHERE bucket >= from_hour AND bucket < to_hour AND (bucket < from_day OR bucket >= to_day)
UNION ALL
WITH
  toDateTime({since:UInt32}, 'UTC') AS from_minute, toDateTime({until:UInt32} + 1, 'UTC') AS to_minute,
  toStartOfDay(from_minute + 86399) AS from_day, toStartOfDay(to_minute) AS to_day
SELECT workspace, team, agent, workflow, provider, model, currency, bucket, calls, late_calls,
  toInt64(s.input_tokens) AS input_tokens,
  toInt64(s.cache_read_tokens) AS cache_read_tokens,
  toInt64(s.cache_write_5m_tokens) AS cache_write_5m_tokens,
  toInt64(s.cache_write_1h_tokens) AS cache_write_1h_tokens,
  toInt64(s.output_tokens) AS output_tokens,
  toInt64(s.reasoning_tokens) AS reasoning_tokens, cost_nanos
FROM ${DB}.spend_1d AS s
WHERE bucket >= from_day AND bucket < to_day;

-- spend_by(step, since, until): the buckets of a graph with one point each `step` seconds, from whole points at since to
-- the minute of until: hours where the points are of whole hours, else minutes.
CREATE OR REPLACE VIEW ${DB}.spend_by AS
SELECT workspace, team, agent, workflow, provider, model, currency, bucket, calls, late_calls,
  toInt64(s.input_tokens) AS input_tokens,
  toInt64(s.cache_read_tokens) AS cache_read_tokens,
  toInt64(s.cache_write_5m_tokens) AS cache_write_5m_tokens,
  toInt64(s.cache_write_1h_tokens) AS cache_write_1h_tokens,
  toInt64(s.output_tokens) AS output_tokens,
  toInt64(s.reasoning_tokens) AS reasoning_tokens, cost_nanos
FROM ${DB}.spend_1m AS s
WHERE {step:UInt32} % 3600 != 0 AND bucket >= toDateTime(intDiv({since:UInt32}, {step:UInt32}) * {step:UInt32}, 'UTC')
  AND bucket <= toDateTime({until:UInt32}, 'UTC')
UNION ALL
SELECT workspace, team, agent, workflow, provider, model, currency, bucket, calls, late_calls,
  toInt64(s.input_tokens) AS input_tokens,
  toInt64(s.cache_read_tokens) AS cache_read_tokens,
  toInt64(s.cache_write_5m_tokens) AS cache_write_5m_tokens,
  toInt64(s.cache_write_1h_tokens) AS cache_write_1h_tokens,
  toInt64(s.output_tokens) AS output_tokens,
  toInt64(s.reasoning_tokens) AS reasoning_tokens, cost_nanos
FROM ${DB}.spend_1h AS s
WHERE {step:UInt32} % 3600 = 0 AND bucket >= toDateTime(intDiv({since:UInt32}, {step:UInt32}) * {step:UInt32}, 'UTC')
  AND bucket <= toDateTime({until:UInt32}, 'UTC');

-- net_charges: every charge, and every correction as a charge of no call: what money is summed from.
CREATE VIEW IF NOT EXISTS ${DB}.net_charges AS
SELECT usage_id, occurred_at, recorded_at, workspace, team, agent, run, root_run, workflow, provider, model, tier, currency,
  priced_by, cost_center, src_topic, src_partition, src_offset, src_index, toUInt64(1) AS calls,
  toInt64(e.input_tokens) AS input_tokens,
  toInt64(e.cache_read_tokens) AS cache_read_tokens,
  toInt64(e.cache_write_5m_tokens) AS cache_write_5m_tokens,
  toInt64(e.cache_write_1h_tokens) AS cache_write_1h_tokens,
  toInt64(e.output_tokens) AS output_tokens,
  toInt64(e.reasoning_tokens) AS reasoning_tokens,
  cost_nanos
FROM ${DB}.usage_events AS e
WHERE kind = 'charge'
UNION ALL
SELECT usage_id, occurred_at, recorded_at, workspace, team, agent, run, root_run, workflow, provider, model, tier, currency,
  CAST('' AS LowCardinality(String)) AS priced_by, cost_center, src_topic, src_partition, src_offset, src_index, toUInt64(0) AS calls,
  input_tokens,
  cache_read_tokens,
  cache_write_5m_tokens,
  cache_write_1h_tokens,
  output_tokens,
  reasoning_tokens,
  cost_nanos
FROM ${DB}.corrections;
