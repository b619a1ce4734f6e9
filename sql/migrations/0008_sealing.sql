-- Sealing: where each row lies in its batch's hash tree, and the header that the tree's root and the chain are in.
--
-- batch_seq is the batch of the row's ledger partition, batch_row its place in it over all tables, from 0.
-- Rows that were there before are of batch 0, and their batches of leaf version 0: not sealed, and reported as such.
-- Hashes are SHA-256 in lower-case hex. ingested_at and inserted_at are ClickHouse's own clock and are not sealed.
ALTER TABLE ${DB}.usage_events ADD COLUMN IF NOT EXISTS batch_seq UInt64 DEFAULT 0 CODEC(Delta, ZSTD(1));
ALTER TABLE ${DB}.usage_events ADD COLUMN IF NOT EXISTS batch_row UInt32 DEFAULT 0 CODEC(T64, ZSTD(1));
ALTER TABLE ${DB}.commands ADD COLUMN IF NOT EXISTS batch_seq UInt64 DEFAULT 0;
ALTER TABLE ${DB}.commands ADD COLUMN IF NOT EXISTS batch_row UInt32 DEFAULT 0;
ALTER TABLE ${DB}.acks ADD COLUMN IF NOT EXISTS batch_seq UInt64 DEFAULT 0;
ALTER TABLE ${DB}.acks ADD COLUMN IF NOT EXISTS batch_row UInt32 DEFAULT 0;
ALTER TABLE ${DB}.alerts ADD COLUMN IF NOT EXISTS batch_seq UInt64 DEFAULT 0;
ALTER TABLE ${DB}.alerts ADD COLUMN IF NOT EXISTS batch_row UInt32 DEFAULT 0;
ALTER TABLE ${DB}.ledger_events ADD COLUMN IF NOT EXISTS batch_seq UInt64 DEFAULT 0;
ALTER TABLE ${DB}.ledger_events ADD COLUMN IF NOT EXISTS batch_row UInt32 DEFAULT 0;

-- written_at is the ledger's time of the batch's last message; occurred_* span its usage, 1970 when it has none.
-- usage_rows of its rows are usage, which retention drops before the rest; leaf_sum tells rows in another order from
-- other rows. The header's hash covers all of it but generation and
-- inserted_at; prev_hash is the header hash before it: of the first one zeros, or the last unsealed batch's content.
ALTER TABLE ${DB}.audit_batches ADD COLUMN IF NOT EXISTS leaf_version UInt8 DEFAULT 0;
ALTER TABLE ${DB}.audit_batches ADD COLUMN IF NOT EXISTS usage_rows UInt32 DEFAULT 0;
ALTER TABLE ${DB}.audit_batches ADD COLUMN IF NOT EXISTS leaf_sum UInt64 DEFAULT 0;
ALTER TABLE ${DB}.audit_batches ADD COLUMN IF NOT EXISTS written_at DateTime64(3, 'UTC') DEFAULT toDateTime64(0, 3, 'UTC');
ALTER TABLE ${DB}.audit_batches ADD COLUMN IF NOT EXISTS occurred_from DateTime64(6, 'UTC') DEFAULT toDateTime64(0, 6, 'UTC');
ALTER TABLE ${DB}.audit_batches ADD COLUMN IF NOT EXISTS occurred_to DateTime64(6, 'UTC') DEFAULT toDateTime64(0, 6, 'UTC');
ALTER TABLE ${DB}.audit_batches ADD COLUMN IF NOT EXISTS merkle_root FixedString(64) DEFAULT toFixedString('', 64);
ALTER TABLE ${DB}.audit_batches ADD COLUMN IF NOT EXISTS prev_hash FixedString(64) DEFAULT toFixedString('', 64);
ALTER TABLE ${DB}.audit_batches ADD COLUMN IF NOT EXISTS header_hash FixedString(64) DEFAULT toFixedString('', 64);

-- A batch's rows lie together in time: verifying one batch reads few granules.
ALTER TABLE ${DB}.usage_events ADD INDEX IF NOT EXISTS ix_batch batch_seq TYPE minmax GRANULARITY 1;
