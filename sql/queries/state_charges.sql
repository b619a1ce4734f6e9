-- What was charged and corrected in some batches of a ledger partition, in the order of the ledger, as a rebuild of the state folds it?
--
-- Parameters: partition; seq_from, seq_to (batches, both included); former_seq, former (of an earlier Kafka: batches up to
-- it, or recorded before it); after_seq, after_offset, after_row (the last row read, unless first = 1), rows_max.
-- Units: times in microseconds since the epoch, cost in nano-units. Of a correction, name is its own id, stated_us when
-- it was stated (else 0), and the numbers are signed.
SELECT * FROM (
SELECT
  workspace, team, agent, root_run, usage_id AS name,
  toUnixTimestamp64Micro(occurred_at) AS ts_us, toUnixTimestamp64Micro(recorded_at) AS at_us, cost_nanos,
  toInt64(toUInt64(input_tokens) + cache_read_tokens + cache_write_5m_tokens + cache_write_1h_tokens + output_tokens) AS tokens,
  batch_seq, ledger_offset, toUInt64(src_partition) * 281474976710656 + src_offset * 65536 + src_index AS place,
  toInt64(0) AS stated_us
FROM usage_events
WHERE ledger_partition = {partition:UInt16} AND batch_seq BETWEEN {seq_from:UInt64} AND {seq_to:UInt64}
  AND kind = 'charge'
  AND (batch_seq <= {former_seq:UInt64} OR recorded_at < {former:DateTime64(6, 'UTC')})
  AND ({first:UInt8} = 1 OR (batch_seq, ledger_offset, place) > ({after_seq:UInt64}, {after_offset:UInt64}, {after_row:UInt64}))
UNION ALL
SELECT
  workspace, team, agent, root_run, correction_id AS name,
  toUnixTimestamp64Micro(occurred_at) AS ts_us, toUnixTimestamp64Micro(recorded_at) AS at_us, cost_nanos,
  input_tokens + cache_read_tokens + cache_write_5m_tokens + cache_write_1h_tokens + output_tokens AS tokens,
  batch_seq, ledger_offset, toUInt64(src_partition) * 281474976710656 + src_offset * 65536 + src_index AS place,
  toUnixTimestamp64Micro(stated_at) AS stated_us
FROM corrections
WHERE ledger_partition = {partition:UInt16} AND batch_seq BETWEEN {seq_from:UInt64} AND {seq_to:UInt64}
  AND (batch_seq <= {former_seq:UInt64} OR recorded_at < {former:DateTime64(6, 'UTC')})
  AND ({first:UInt8} = 1 OR (batch_seq, ledger_offset, place) > ({after_seq:UInt64}, {after_offset:UInt64}, {after_row:UInt64}))
)
ORDER BY batch_seq, ledger_offset, place
LIMIT {rows_max:UInt64}
