-- The database, and the list of the migrations it has seen.
CREATE DATABASE IF NOT EXISTS ${DB};

CREATE TABLE IF NOT EXISTS ${DB}.schema_migrations (
  version UInt32,
  name String,
  sha256 FixedString(64),
  applied_at DateTime64(3, 'UTC') DEFAULT now64(3, 'UTC')
) ENGINE = MergeTree ORDER BY version
SETTINGS non_replicated_deduplication_window = 1000;
