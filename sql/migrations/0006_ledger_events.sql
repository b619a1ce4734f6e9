-- Everything else the ledger says: budgets, prices, refused usage, what an operator did, and what nobody could read.
--
-- data is JSON. Of kind 'unreadable' it holds the reason, the number of bytes and the bytes themselves in base64
-- (the first of them when they are many); its source is the message of the ledger.
CREATE TABLE IF NOT EXISTS ${DB}.ledger_events (
  kind LowCardinality(String),
  recorded_at DateTime64(6, 'UTC'),
  data String CODEC(ZSTD(3)),
  ingested_at DateTime64(3, 'UTC') DEFAULT now64(3, 'UTC'),
  src_topic LowCardinality(String),
  src_partition UInt16,
  src_offset UInt64,
  src_index UInt16,
  ledger_partition UInt16,
  ledger_offset UInt64,
  ts DateTime64(6, 'UTC') ALIAS recorded_at
) ENGINE = MergeTree ORDER BY (kind, recorded_at)
TTL toDateTime(ingested_at) + INTERVAL ${TTL_DAYS} DAY DELETE
SETTINGS non_replicated_deduplication_window = 10000, ttl_only_drop_parts = 1, fsync_after_insert = 1;
