-- The control plane as it happened: commands (sent, and decided in shadow), the guards' acks, alerts.
--
-- Amounts (cap_amount, spend, committed) are in `unit`: tokens, or nano-units of a currency. fraction_bp is in
-- 1/10,000 of the cap. A command is never updated: what became of it is its acks.
CREATE TABLE IF NOT EXISTS ${DB}.commands (
  command_id String,
  decided_only UInt8,
  seq UInt64,
  action Enum8('warn' = 1, 'degrade' = 2, 'halt' = 3, 'resume' = 4),
  scope String,
  scope_kind LowCardinality(String),
  workspace LowCardinality(String),
  budget LowCardinality(String),
  cap LowCardinality(String),
  budget_version UInt64,
  issued_at DateTime64(6, 'UTC'),
  expires_at Nullable(DateTime64(6, 'UTC')),
  window_kind LowCardinality(String),
  window_label LowCardinality(String),
  window_timezone LowCardinality(String),
  window_start Nullable(DateTime64(6, 'UTC')),
  window_end Nullable(DateTime64(6, 'UTC')),
  unit LowCardinality(String),
  cap_amount Int64,
  spend Int64,
  committed Int64,
  fraction_bp UInt64,
  cause_usage_id String,
  cause_ts Nullable(DateTime64(6, 'UTC')),
  cause_partition UInt16,
  cause_offset UInt64,
  cause_produced_at_ms Int64,
  degrade_models Map(String, String),
  degrade_max_output_tokens Nullable(Int64),
  price_book LowCardinality(String),
  issued_by LowCardinality(String),
  reason String,
  message String,
  recorded_at DateTime64(6, 'UTC'),
  ingested_at DateTime64(3, 'UTC') DEFAULT now64(3, 'UTC'),
  src_topic LowCardinality(String),
  src_partition UInt16,
  src_offset UInt64,
  src_index UInt16,
  ledger_partition UInt16,
  ledger_offset UInt64,
  ts DateTime64(6, 'UTC') ALIAS issued_at
) ENGINE = MergeTree ORDER BY (workspace, issued_at, command_id)
TTL toDateTime(ingested_at) + INTERVAL ${TTL_DAYS} DAY DELETE
SETTINGS non_replicated_deduplication_window = 10000, ttl_only_drop_parts = 1, fsync_after_insert = 1;

CREATE TABLE IF NOT EXISTS ${DB}.acks (
  command_id String,
  seq UInt64,
  scope String,
  scope_kind LowCardinality(String),
  workspace LowCardinality(String),
  budget LowCardinality(String),
  cap LowCardinality(String),
  agent LowCardinality(String),
  run String,
  guard String,
  state Enum8('received' = 1, 'enforced' = 2),
  at DateTime64(6, 'UTC'),
  halt_lag_us Nullable(Int64),
  recorded_at DateTime64(6, 'UTC'),
  ingested_at DateTime64(3, 'UTC') DEFAULT now64(3, 'UTC'),
  src_topic LowCardinality(String),
  src_partition UInt16,
  src_offset UInt64,
  src_index UInt16,
  ledger_partition UInt16,
  ledger_offset UInt64,
  ts DateTime64(6, 'UTC') ALIAS at
) ENGINE = MergeTree ORDER BY (workspace, command_id, agent, at)
TTL toDateTime(ingested_at) + INTERVAL ${TTL_DAYS} DAY DELETE
SETTINGS non_replicated_deduplication_window = 10000, ttl_only_drop_parts = 1, fsync_after_insert = 1;

CREATE TABLE IF NOT EXISTS ${DB}.alerts (
  alert_id String,
  ts DateTime64(6, 'UTC'),
  kind LowCardinality(String),
  severity LowCardinality(String),
  scope String,
  scope_kind LowCardinality(String),
  workspace LowCardinality(String),
  budget LowCardinality(String),
  cap LowCardinality(String),
  unit LowCardinality(String),
  cap_amount Int64,
  spend Int64,
  committed Int64,
  fraction_bp UInt64,
  usage_id String,
  message String,
  recorded_at DateTime64(6, 'UTC'),
  ingested_at DateTime64(3, 'UTC') DEFAULT now64(3, 'UTC'),
  src_topic LowCardinality(String),
  src_partition UInt16,
  src_offset UInt64,
  src_index UInt16,
  ledger_partition UInt16,
  ledger_offset UInt64
) ENGINE = MergeTree ORDER BY (workspace, ts, alert_id)
TTL toDateTime(ingested_at) + INTERVAL ${TTL_DAYS} DAY DELETE
SETTINGS non_replicated_deduplication_window = 10000, ttl_only_drop_parts = 1, fsync_after_insert = 1;
