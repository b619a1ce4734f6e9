-- Which runs of ledger messages are in: one row for each batch, written after its rows. No TTL: it is small, and it
-- says that a range has expired rather than gone missing.
CREATE TABLE IF NOT EXISTS ${DB}.audit_batches (
  ledger_partition UInt16,
  generation UInt64,
  seq UInt64,
  first_offset UInt64,
  last_offset UInt64,
  rows UInt32,
  content_sha256 FixedString(64),
  inserted_at DateTime64(3, 'UTC') DEFAULT now64(3, 'UTC')
) ENGINE = MergeTree ORDER BY (ledger_partition, seq)
SETTINGS non_replicated_deduplication_window = 10000, fsync_after_insert = 1;
