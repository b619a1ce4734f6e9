-- Every usage that was charged, and every duplicate that was not: one row each, never changed.
--
-- Plain MergeTree on purpose: Replacing and Collapsing drop rows at merges, and an audit trail may not.
-- Counters are disjoint; input_tokens is what no cache served. rates are nano-units per million tokens of
-- input, cache read, cache write 5m, cache write 1h and output, as they were applied.
-- The retention runs from ingested_at, not from occurred_at: a replay of old usage is kept as long as any other.
CREATE TABLE IF NOT EXISTS ${DB}.usage_events (
  usage_id String CODEC(ZSTD(3)),
  occurred_at DateTime64(6, 'UTC') CODEC(Delta, ZSTD(1)),
  recorded_at DateTime64(6, 'UTC') CODEC(Delta, ZSTD(1)),
  ingested_at DateTime64(3, 'UTC') DEFAULT now64(3, 'UTC') CODEC(Delta, ZSTD(1)),
  kind Enum8('charge' = 1, 'duplicate' = 2),
  usage_kind Enum8('finished' = 1, 'started' = 2, 'progress' = 3),
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
  input_tokens UInt32 CODEC(T64, ZSTD(1)),
  cache_read_tokens UInt32 CODEC(T64, ZSTD(1)),
  cache_write_5m_tokens UInt32 CODEC(T64, ZSTD(1)),
  cache_write_1h_tokens UInt32 CODEC(T64, ZSTD(1)),
  output_tokens UInt32 CODEC(T64, ZSTD(1)),
  reasoning_tokens UInt32 CODEC(T64, ZSTD(1)),
  cost_nanos Int64 CODEC(T64, ZSTD(1)),
  currency LowCardinality(String),
  price_book LowCardinality(String),
  priced_by LowCardinality(String),
  tier_known UInt8,
  rates Array(Int64) CODEC(ZSTD(1)),
  late UInt8,
  source LowCardinality(String),
  tags Map(LowCardinality(String), String) CODEC(ZSTD(3)),
  src_topic LowCardinality(String),
  src_partition UInt16,
  src_offset UInt64 CODEC(Delta, ZSTD(1)),
  src_index UInt16,
  ledger_partition UInt16,
  ledger_offset UInt64 CODEC(Delta, ZSTD(1)),
  ts DateTime64(6, 'UTC') ALIAS occurred_at,
  cost_usd Float64 ALIAS cost_nanos / 1e9,
  CONSTRAINT cost_is_not_negative CHECK cost_nanos >= 0,
  INDEX ix_run run TYPE bloom_filter(0.01) GRANULARITY 2,
  INDEX ix_root_run root_run TYPE bloom_filter(0.01) GRANULARITY 2
) ENGINE = MergeTree PARTITION BY toYYYYMM(occurred_at)
ORDER BY (workspace, team, agent, occurred_at)
TTL toDateTime(ingested_at) + INTERVAL ${TTL_DAYS} DAY DELETE
SETTINGS non_replicated_deduplication_window = 10000, ttl_only_drop_parts = 1, fsync_after_insert = 1;
